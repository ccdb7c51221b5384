"""clip_tower.npz: the resized position table, padding masks and hidden states of a tower."""

from __future__ import annotations

import jax
import numpy as np
from einops import rearrange

from pixelstory_jax.interop.tables import CLIP_VISION
from pixelstory_jax.interop.torch_layout import read_torch_tensors
from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig, patch_validity, resize_position_table
from pixelstory_jax.models.pixellm import image_token_validity
from tests.golden_cases.fixture import Fixture


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    meta = fixture.meta
    config = ClipVisionConfig(
        canvas=meta["resize_vision_tower_size"],
        patch_size=meta["patch_size"],
        width=meta["hidden_size"],
        layers=meta["num_hidden_layers"],
        heads=meta["num_attention_heads"],
        mlp_width=meta["intermediate_size"],
        activation=meta["hidden_act"],
        norm_eps=meta["layer_norm_eps"],
        has_final_norm=True,
    )
    model = ClipVision(config)
    pixels = rearrange(fixture.inputs["images"], "b c h w -> b h w c")
    valid = patch_validity(fixture.inputs["clip_resize"], config.patch_size, config.grid)
    every = tuple(range(config.layers + 1))
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, valid, every))["params"]
    key = "vision_model.embeddings.position_embedding.weight"
    table = np.asarray(resize_position_table(fixture.weights[key], config.grid, faithful=True))
    params = read_torch_tensors(CLIP_VISION, {**fixture.weights, key: table}, expected)

    @jax.jit
    def run(patch_valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = model.apply({"params": params}, pixels, patch_valid, every)
        return states, model.apply({"params": params}, states[-1], method=ClipVision.pool)

    states, pooled = (np.asarray(x) for x in run(valid))
    bare, _ = (np.asarray(x) for x in run(np.ones_like(valid)))
    side = meta["llm_grid"]
    results = {
        "resized_position_embedding": table,
        "vit_attention_mask": np.pad(np.asarray(valid), ((0, 0), (1, 0)), constant_values=True),
        "llm_image_attention_mask": image_token_validity(
            fixture.inputs["clip_resize"], config.patch_size, config.grid, side
        ),
        "masked/hidden_states": states,
        "masked/pooler_output": pooled,
        "unmasked/last_hidden_state": bare[-1],
    }
    for name, layer in (
        ("features_select_layer", meta["mm_vision_select_layer"]),
        (f"features_layer_minus_{-meta['second_level_layer']}", meta["second_level_layer"]),
    ):
        results[f"masked/{name}"], results[f"unmasked/{name}"] = states[layer][:, 1:], bare[layer][:, 1:]
    return results
