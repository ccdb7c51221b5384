"""Masks on pictures of any size, against PyTorch's interpolation."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pixelstory_jax.data.images import fit_mask, fitted_size
from pixelstory_jax.inference import restore


def reference(logits: np.ndarray, canvas: int, size: tuple[int, int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    height, width = fitted_size(size, canvas)
    interpolate = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    x = interpolate(torch.tensor(logits)[None, None], (canvas, canvas))
    return interpolate(x[..., :height, :width], size)[0, 0].numpy()


@pytest.mark.parametrize("size", [(90, 63), (50, 92), (448, 448), (1, 1), (20, 900), (700, 3)])
@pytest.mark.parametrize("side", [16, 128])
def test_equals_the_reference(size, side, monkeypatch):
    monkeypatch.setattr(restore, "_CHUNK", 1000)
    logits = np.random.default_rng(side).normal(size=(side, side)).astype(np.float32) * 3
    expected = reference(logits, 112, size)
    mask, score = restore.restore_mask(logits, 112, size)
    sure = np.abs(expected) > 1e-4
    np.testing.assert_array_equal(mask[sure], (expected > 0)[sure])
    if sure.all():
        positive = expected > 0
        probability = 1 / (1 + np.exp(-expected[positive], dtype=np.float64))
        np.testing.assert_allclose(score, probability.sum() / (positive.sum() + 1e-6), atol=1e-6)


def test_there_and_back():
    mask = np.zeros((300, 400), bool)
    mask[100:200, 50:350] = True
    logits = fit_mask(mask, 128).astype(np.float32) * 20 - 10
    back, score = restore.restore_mask(logits, 128, mask.shape)
    assert (back & mask).sum() / (back | mask).sum() > 0.97 and score > 0.9
    assert restore.restore_mask(-np.ones((8, 8)), 64, (5, 5))[1] == 0
