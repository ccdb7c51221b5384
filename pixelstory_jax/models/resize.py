"""Bilinear and nearest resizing like the references: half-pixel centres, edges clamped, no antialias."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=512)
def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] float32 matrix M with y = M x (torch `align_corners=False`, no antialias)."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0.0)
    low = np.minimum(np.floor(position).astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    fraction = position - low
    matrix = np.zeros((target, source), np.float64)
    np.add.at(matrix, (np.arange(target), low), 1 - fraction)
    np.add.at(matrix, (np.arange(target), high), fraction)
    return matrix.astype(np.float32)


def resize_bilinear(x: jax.Array, height: int, width: int, axes: tuple[int, int] = (-2, -1)) -> jax.Array:
    """`x` with the two `axes` (height, width) resized; computed in float32, the result has the dtype of `x`."""
    if height < 1 or width < 1:
        raise ValueError(f"Cannot resize to {height} x {width}.")
    out = x.astype(jnp.float32)
    for axis, target in zip(axes, (height, width), strict=True):
        source = x.shape[axis]
        if source != target:
            matrix = bilinear_matrix(source, target).T
            # A TPU would otherwise multiply in bfloat16.
            moved = jnp.matmul(jnp.moveaxis(out, axis, -1), matrix, precision=jax.lax.Precision.HIGHEST)
            out = jnp.moveaxis(moved, -1, axis)
    return out.astype(x.dtype)


def nearest_indices(source: int, target: int) -> np.ndarray:
    """[target] index into the source that nearest resizing reads: floor(i * source / target)."""
    return (np.arange(target) * source) // target
