"""The count of an answer's operations, against the trace of our own network and against published figures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pixelstory_jax.evaluation.answer_flops import (
    CLAIMS,
    closest_tokens,
    decoding_macs,
    flops_report,
    language_macs,
    pixellm_cost,
    published_cost,
    sam_decoder_macs,
    sam_encoder_macs,
)
from pixelstory_jax.models.attention import attention_backend
from pixelstory_jax.models.layers import without_rematerialisation
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.objectives.flops import flops_by_scope

TOKENS = 300


@pytest.fixture(scope="module", params=["7B", "13B"])
def config(request) -> PixelLMConfig:
    return PixelLMConfig.pixellm_7b() if request.param == "7B" else PixelLMConfig.pixellm_13b()


def test_the_formulas_are_what_our_network_computes(config):
    """Every part, to the last operation; our tower leaves the last layer out."""
    model, canvas = PixelLM(config), config.vision.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((1, canvas, canvas, 3), jnp.uint8),
        "image_size": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "tokens": jax.ShapeDtypeStruct((1, 1, TOKENS), jnp.int32),
        "token_valid": jax.ShapeDtypeStruct((1, 1, TOKENS), jnp.bool),
        "target_positions": jax.ShapeDtypeStruct((1, 1, config.group), jnp.int32),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), batch)

    def answer(params, batch):
        pixels = batch["image"].astype(jnp.float32)
        features = model.apply(params, pixels, batch["image_size"], method=PixelLM.encode_image)
        hidden = model.apply(params, batch["tokens"], batch["token_valid"], features, method=PixelLM.states)
        logits = model.apply(params, hidden, method=PixelLM.logits)
        states = model.apply(params, hidden, batch["target_positions"], method=PixelLM.target_states)
        return logits, model.apply(params, features, states, all_masks=True, method=PixelLM.decode_masks)

    with without_rematerialisation(), attention_backend("xla"):
        scopes = flops_by_scope(jax.make_jaxpr(answer)(params, batch))

    def traced(*names: str) -> float:
        parts = {scope: {part.split(".")[0] for part in scope.split("/")} for scope in scopes}  # "llama.logits" too
        return sum(flops for scope, flops in scopes.items() if parts[scope] & {*names}) / 2

    cost = pixellm_cost(config, TOKENS, vision_layers=config.vision.layers).parts
    assert traced("vision") == cost["CLIP"]
    assert traced("mm_projector", "out_mm_projector", "neck") == cost["projectors"]
    assert traced("llama") == cost["language model"]
    assert traced("mask_decoder", "prompt_encoder", "text_projector") == cost["masks"]


def test_published_counts():
    """timm: 81.1 and 191.1 * 10^9 for CLIP at 224 and 336; SAM's encoder is usually given as 2.97 * 10^12."""
    assert published_cost("LISA-7B", 320).parts["CLIP"] / 1e9 == pytest.approx(81.1, rel=0.002)
    assert sam_encoder_macs() / 1e12 == pytest.approx(2.98, rel=0.005)
    assert sam_decoder_macs() / 1e9 == pytest.approx(1.80, rel=0.01)
    ratio = published_cost("PixelLM-7B", 320).total / published_cost("LISA-7B", 320).total
    assert ratio == pytest.approx(CLAIMS["PixelLM-7B"] / CLAIMS["LISA-7B"], rel=0.01)


def test_a_cache_saves_nothing_but_repetition():
    llama = LlamaConfig.llama_7b()
    step_by_step = language_macs(llama, 100) + sum(language_macs(llama, 1, 100 + k) for k in range(20))
    whole = language_macs(llama, 120)
    unread = 2 * llama.width * llama.layers * (120**2 - 100**2 - sum(101 + k for k in range(20)))
    assert step_by_step == whole - unread  # pairs with later tokens, which a causal mask throws away
    assert decoding_macs(llama, 100, 1) == llama.width * llama.vocab


def test_one_number_of_tokens_gives_the_papers_figures_only_with_global_attention():
    plain, all_global = closest_tokens(False), closest_tokens(True)
    off = {
        name: (
            published_cost(name, plain).total / claim,
            published_cost(name, all_global, all_global=True).total / claim,
        )
        for name, claim in CLAIMS.items()
    }
    assert max(abs(pair[0] - 1) for pair in off.values()) > 0.05
    assert max(abs(pair[1] - 1) for pair in off.values()) < 0.012
    report = flops_report()
    assert all(name in report for name in CLAIMS) and "none" in report
