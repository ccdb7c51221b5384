"""Products of linear maps in half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.models.layers import times


def test_bfloat16_products_are_summed_in_float32_and_rounded_once():
    """Results and gradients are those of float32 products of the same numbers, rounded."""
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 64), (64, 7), (2, 5, 7))
    x, kernel, of_y = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    y, pull_back = jax.vjp(times, x, kernel)
    exact, exact_pull_back = jax.vjp(jnp.matmul, x.astype(jnp.float32), kernel.astype(jnp.float32))
    got, expected = (y, *pull_back(of_y)), (exact, *exact_pull_back(of_y.astype(jnp.float32)))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.shape == theirs.shape
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-8, atol=1e-3)


def test_a_cpu_turns_no_kernel_into_float32():
    kernel = jax.ShapeDtypeStruct((512, 384), jnp.bfloat16)
    compiled = jax.jit(times).lower(jax.ShapeDtypeStruct((64, 512), jnp.bfloat16), kernel).compile()
    assert "f32[512,384]" not in compiled.as_text()
