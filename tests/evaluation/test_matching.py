"""The assignment against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from pixelstory_jax.evaluation.matching import assign, intersections, match_masks


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2), (2, 6), (30, 30), (40, 25), (0, 3), (3, 0)])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
def test_equals_scipy(shape, kind):
    rng = np.random.default_rng(shape[0] * 100 + shape[1])
    for _ in range(10):
        cost = rng.normal(size=shape)
        if kind == "ties":
            cost = rng.integers(0, 4, shape).astype(float)
        if kind == "negative":
            cost = -rng.random(shape) * 1e3
        rows, columns = assign(cost)
        best_rows, best_columns = linear_sum_assignment(cost)
        assert len(rows) == min(shape) and len(set(rows)) == len(set(columns)) == min(shape)
        assert (np.diff(rows) > 0).all()
        np.testing.assert_allclose(cost[rows, columns].sum(), cost[best_rows, best_columns].sum(), rtol=1e-12)
        if kind == "normal":
            np.testing.assert_array_equal(columns, best_columns)


def test_gaps_in_the_cost_are_refused():
    with pytest.raises(ValueError, match="finite"):
        assign(np.array([[0.0, np.nan]]))


def test_masks_are_paired_by_overlap_not_by_order():
    true = np.zeros((2, 8, 8), bool)
    true[0, :4], true[1, 4:] = True, True
    predicted = true[::-1].copy()
    predicted[0, 4, :4] = False
    chosen, target, iou = match_masks(predicted, true)
    assert chosen.tolist() == [0, 1] and target.tolist() == [1, 0]
    np.testing.assert_allclose(iou, [28 / 32, 1])
    assert len(match_masks(predicted[:0], true)[0]) == 0


def test_intersections_count_pixels():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 11, 7)) < 0.5, rng.random((2, 11, 7)) < 0.5
    intersection, union = intersections(a, b)
    for i in range(3):
        for j in range(2):
            assert intersection[i, j] == (a[i] & b[j]).sum() and union[i, j] == (a[i] | b[j]).sum()
