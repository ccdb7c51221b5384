"""The count of operations against the published figure and against XLA's own count."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.objectives.flops import forward_flops


def test_the_7b_model_needs_the_known_number_of_operations():
    """CLIP without its last layer 347, projectors 97, neck 3.4, LLaMA at 320 tokens 2,141, decoder 2.2 (10^9 each)."""
    parts = forward_flops(PixelLMConfig.pixellm_7b(), questions=1, length=320, slots=1)
    multiply_adds = {part: flops / 2e9 for part, flops in parts.items()}
    assert multiply_adds["out_mm_projector"] == pytest.approx(85.9, rel=0.01)
    assert multiply_adds["mm_projector"] == pytest.approx(10.7, rel=0.01)
    assert multiply_adds["neck"] == pytest.approx(3.4, rel=0.02)
    assert multiply_adds["mask_decoder"] == pytest.approx(2.19, rel=0.03)
    assert sum(multiply_adds.values()) == pytest.approx(2610, rel=0.02)


def test_the_count_agrees_with_xla_where_stacks_have_one_layer():
    sizes = PixelLMConfig.tiny()
    config = dataclasses.replace(
        sizes,
        vision=dataclasses.replace(sizes.vision, layers=1),
        llama=dataclasses.replace(sizes.llama, layers=1),
        feature_layers=(1, 1),
    )
    canvas, questions, length, slots = config.vision.canvas, 2, 64, 4
    model = PixelLM(config)
    batch = {
        "image": jax.ShapeDtypeStruct((1, canvas, canvas, 3), "uint8"),
        "image_size": jax.ShapeDtypeStruct((1, 2), "int32"),
        "tokens": jax.ShapeDtypeStruct((1, questions, length), "int32"),
        "token_valid": jax.ShapeDtypeStruct((1, questions, length), "bool"),
        "target_positions": jax.ShapeDtypeStruct((1, slots, config.group), "int32"),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    counted = jax.jit(model.apply).lower(params, batch).cost_analysis()["flops"]
    assert sum(forward_flops(config, questions, length, slots).values()) == pytest.approx(counted, rel=0.15)
