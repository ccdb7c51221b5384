"""Masks at the size of the picture: what the package does, and the same steps where gradients are asked.

S masks, m side of the logits on the canvas, H, W size of the picture.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference.restore import restore_mask, restored_rows
from pixelstory_jax.models.resize import resize_bilinear


def restored(logits: np.ndarray, image_size: np.ndarray, original_size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [S, H, W] and scores [S] of logits [S, m, m], computed by the functions that answers are made with.

    Args:
      image_size: (height, width) in the canvas, whose side is the larger. original_size: (H, W).
    """
    canvas, size = int(max(image_size)), (int(original_size[0]), int(original_size[1]))
    masks = np.zeros((len(logits), *size), np.float32)
    scores = np.zeros(len(logits))
    for number, one in enumerate(np.asarray(logits)):
        for top, part in restored_rows(one, canvas, size):
            masks[number, top : top + len(part)] = part
        shown, scores[number] = restore_mask(one, canvas, size)
        np.testing.assert_array_equal(shown, masks[number] > 0)
    return masks, scores


def restore_masks(
    logits: jax.Array, image_size: tuple[int, int], original_size: tuple[int, int], crop: bool = True
) -> jax.Array:
    """The logits of `restored`, differentiable.

    Args:
      logits: [..., m, m] of the whole canvas.
      image_size: (height, width) of the resized picture in the canvas, whose side is the larger of the two.
      original_size: (height, width) of the result.
      crop: False resizes to the canvas side and stops there.

    Returns:
      [..., height, width] float32.
    """
    side = int(max(image_size))
    canvas = resize_bilinear(logits.astype(jnp.float32), side, side)
    if not crop:
        return canvas
    height, width = (int(n) for n in image_size)
    return resize_bilinear(canvas[..., :height, :width], int(original_size[0]), int(original_size[1]))
