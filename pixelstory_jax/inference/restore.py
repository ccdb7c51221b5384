"""Masks from the padded canvas back to the picture.

m  side of the predicted logits, which cover the whole canvas        C  side of the canvas
h, w  size of the picture inside the canvas                          H, W  size of the picture

The steps are the reference's (PixelLM's `postprocess_masks`): bilinear to C x C, cut to h x w, bilinear to H x W, with
half-pixel centres, clamped edges and no antialiasing; a pixel belongs to the mask where the logit is above zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pixelstory_jax.data.images import fitted_size

_CHUNK = 4_000_000  # pixels at a time, so that large photos need little memory


def restore_mask(logits: np.ndarray, canvas: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """The mask of a picture of `size` (H, W) from logits [m, m] on the canvas.

    Returns:
      mask bool [H, W], and its score: the mean probability of the mask's pixels, 0 for an empty mask.
    """
    mask, total = np.zeros(size, bool), 0.0
    for top, part in restored_rows(logits, canvas, size):
        positive = part > 0
        mask[top : top + len(part)] = positive
        total += float((1 / (1 + np.exp(-part[positive], dtype=np.float64))).sum())
    return mask, total / (np.count_nonzero(mask) + 1e-6)


def restored_rows(logits: np.ndarray, canvas: int, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """The logits of the picture, piece by piece: (first row, float32 [rows, W]). Arguments as `restore_mask`."""
    height, width = size
    inside = fitted_size(size, canvas)
    on_canvas = _resize(_resize(np.asarray(logits, np.float32), 0, canvas), 1, canvas)[: inside[0], : inside[1]]
    tall = _resize(on_canvas, 0, height)
    rows = max(1, _CHUNK // width)
    for top in range(0, height, rows):
        yield top, _resize(tall[top : top + rows], 1, width)


def _resize(x: np.ndarray, axis: int, target: int) -> np.ndarray:
    """Bilinear resizing of one axis of [h, w]."""
    source = x.shape[axis]
    if source == target:
        return x
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(position.astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    share = np.expand_dims((position - low).astype(np.float32), 1 - axis)
    return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
