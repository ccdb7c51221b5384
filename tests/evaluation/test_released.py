"""Every array of the reference run in tests/golden/match_eval.npz."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.evaluation import released

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "match_eval.npz")
META = json.loads(str(GOLDEN["meta"]))
POINTS = GOLDEN["in/match/point_coords"][0]


@pytest.mark.parametrize("case", META["match_cases"])
def test_cost_and_assignment(case):
    logits, targets = GOLDEN[f"in/match/{case}/pred_logits"], GOLDEN[f"in/match/{case}/gt_masks"]
    expected = GOLDEN[f"out/match/{case}/cost"]
    error, largest = META["tolerance_f32_vs_f64"][f"out/match/{case}/cost"]
    cost = released.matching_cost(logits, targets, POINTS)
    assert np.abs(cost - expected).max() <= max(10 * error, 1e-4 * largest)
    prediction, target = released.match_predictions(logits, targets, POINTS)
    np.testing.assert_array_equal(prediction, GOLDEN[f"out/match/{case}/pred_index"])
    np.testing.assert_array_equal(target, GOLDEN[f"out/match/{case}/gt_index"])


def test_validate():
    images = []
    for i in range(META["validate_images"]):
        image = released.validate_image(GOLDEN[f"in/validate/pred_logits_{i}"], GOLDEN[f"in/validate/gt_masks_{i}"])
        np.testing.assert_array_equal(image.intersection, GOLDEN[f"out/validate/intersection_{i}"])
        np.testing.assert_array_equal(image.union, GOLDEN[f"out/validate/union_{i}"])
        np.testing.assert_allclose(image.mean_iou, GOLDEN[f"out/validate/mean_iou_{i}"], rtol=1e-6)
        assert image.weight == GOLDEN[f"out/validate/n_masks_{i}"]
        images.append(image)
    giou, ciou = released.summarise(images)
    np.testing.assert_allclose([giou, ciou], [GOLDEN["out/validate/giou"], GOLDEN["out/validate/ciou"]], rtol=1e-6)


@pytest.mark.parametrize("variant", ["ar", "ar_binarised"])
def test_ar_validate(variant):
    images = []
    for k in range(META["ar_images"]):
        image = released.ar_validate_image(
            GOLDEN[f"in/ar/pred_logits_{k}"],
            GOLDEN[f"in/ar/gt_masks_{k}"],
            GOLDEN[f"in/ar/pred_counts_{k}"].tolist(),
            GOLDEN[f"in/ar/gt_counts_{k}"].tolist(),
            POINTS,
            binarised=variant == "ar_binarised",
        )
        np.testing.assert_array_equal(image.rows, GOLDEN[f"out/{variant}/row_intersection_union_{k}"])
        np.testing.assert_array_equal(image.is_matched, GOLDEN[f"out/{variant}/row_is_matched_{k}"])
        np.testing.assert_array_equal(image.rows_per_question, GOLDEN[f"out/{variant}/rows_per_question_{k}"])
        np.testing.assert_array_equal(image.intersection, GOLDEN[f"out/{variant}/intersection_{k}"])
        np.testing.assert_array_equal(image.union, GOLDEN[f"out/{variant}/union_{k}"])
        np.testing.assert_allclose(image.mean_iou, GOLDEN[f"out/{variant}/mean_iou_{k}"], rtol=1e-6)
        assert image.weight == GOLDEN[f"out/{variant}/n_{k}"]
        for question, prediction in enumerate(image.matched_predictions):
            np.testing.assert_array_equal(
                prediction, GOLDEN[f"out/{variant}/matched_pred_index_{k}_question_{question}"]
            )
        images.append(image)
    giou, ciou = released.summarise(images)
    np.testing.assert_allclose([giou, ciou], [GOLDEN[f"out/{variant}/giou"], GOLDEN[f"out/{variant}/ciou"]], rtol=1e-6)


def test_points_repeat_with_the_seed():
    np.testing.assert_array_equal(released.random_points(5), released.random_points(5))
    assert released.random_points(5).shape == (12_544, 2)
