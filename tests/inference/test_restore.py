"""Masks on pictures of any size, against PyTorch's interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pixelstory_jax.data.images import fit_mask, fitted_size
from pixelstory_jax.inference import restore


def reference(logits: np.ndarray, canvas: int, size: tuple[int, int]) -> torch.Tensor:
    height, width = fitted_size(size, canvas)
    x = F.interpolate(torch.tensor(logits)[None, None], (canvas, canvas), mode="bilinear", align_corners=False)
    return F.interpolate(x[..., :height, :width], size, mode="bilinear", align_corners=False)[0, 0]


@pytest.mark.parametrize("size", [(90, 63), (50, 92), (448, 448), (1, 1), (20, 900), (700, 3)])
@pytest.mark.parametrize("side", [16, 128])
def test_equals_the_reference(size, side, monkeypatch):
    monkeypatch.setattr(restore, "_CHUNK", 1000)
    logits = np.random.default_rng(side).normal(size=(side, side)).astype(np.float32) * 3
    expected = reference(logits, 112, size)
    mask, score = restore.restore_mask(logits, 112, size)
    sure = expected.abs().numpy() > 1e-4
    np.testing.assert_array_equal(mask[sure], (expected > 0).numpy()[sure])
    if sure.all():
        positive = (expected > 0).double()
        expected_score = (expected.double().sigmoid() * positive).sum() / (positive.sum() + 1e-6)
        np.testing.assert_allclose(score, float(expected_score), atol=1e-6)


def test_there_and_back():
    mask = np.zeros((300, 400), bool)
    mask[100:200, 50:350] = True
    logits = fit_mask(mask, 128).astype(np.float32) * 20 - 10
    back, score = restore.restore_mask(logits, 128, mask.shape)
    assert (back & mask).sum() / (back | mask).sum() > 0.97 and score > 0.9
    assert restore.restore_mask(-np.ones((8, 8)), 64, (5, 5))[1] == 0
