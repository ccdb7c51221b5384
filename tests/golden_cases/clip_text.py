"""clip_text.npz and clip_text_projection.npz: states of a text encoder and its pooled vector by both end rules."""

from __future__ import annotations

import jax
import numpy as np

from pixelstory_jax.interop.clip_text_table import clip_text_config, read_clip_text
from pixelstory_jax.models.clip_text import LARGEST_ID, ClipText, TextFeatures
from tests.golden_cases.fixture import Fixture


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    meta = fixture.meta
    projected = meta["projection_dim"] is not None
    architecture = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    settings = {**meta, "architectures": [architecture], "eos_token_id": LARGEST_ID}
    rules = {
        "legacy": clip_text_config(settings),
        "modern": clip_text_config(settings, eos_id=meta["real_eos_token_id"]),
    }
    params = read_clip_text(rules["legacy"], fixture.weights)

    def run(rule: str, tokens: np.ndarray, layer: int, captured: tuple[int, ...] = ()) -> TextFeatures:
        encoder = ClipText(rules[rule])
        return jax.jit(lambda tokens: encoder.apply({"params": params}, tokens, layer, captured))(tokens)

    pooled = "text_embeds" if projected else "pooler_output"
    results = {}
    for name in (path.removesuffix("/input_ids") for path in fixture.inputs):
        tokens = fixture.inputs[f"{name}/input_ids"]
        whole = run("legacy", tokens, -1, (0, 1))
        results[f"{name}/embeddings"], results[f"{name}/first_layer"] = whole.captured
        results[f"{name}/last_hidden_state"] = whole.states
        results[f"{name}/{pooled}_legacy"] = whole.pooled
        modern = run("modern", tokens, -2)
        results[f"{name}/penultimate"] = modern.states
        results[f"{name}/{pooled}_modern"] = modern.pooled
    return {path: np.asarray(results[path]) for path in fixture.expected if path in results}  # not every file has all
