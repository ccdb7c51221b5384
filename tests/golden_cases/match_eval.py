"""match_eval.npz: matching and the evaluation arithmetic of the released code."""

from __future__ import annotations

import numpy as np

from pixelstory_jax.evaluation.released import (
    ImageScore,
    ar_validate_image,
    match_predictions,
    matching_cost,
    summarise,
    validate_image,
)
from tests.golden_cases.fixture import Fixture


def _image(prefix: str, number: int, score: ImageScore) -> dict[str, np.ndarray]:
    return {
        f"{prefix}/intersection_{number}": score.intersection,
        f"{prefix}/union_{number}": score.union,
        f"{prefix}/mean_iou_{number}": score.mean_iou,
    }


def _summary(prefix: str, scores: list[ImageScore]) -> dict[str, np.ndarray]:
    giou, ciou = summarise(scores)
    return {f"{prefix}/giou": np.float32(giou), f"{prefix}/ciou": np.float32(ciou)}


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    inputs, points = fixture.inputs, fixture.inputs["match/point_coords"][0]
    ours: dict[str, np.ndarray] = {}
    for case in fixture.meta["match_cases"]:
        logits, targets = inputs[f"match/{case}/pred_logits"], inputs[f"match/{case}/gt_masks"]
        ours[f"match/{case}/cost"] = matching_cost(logits, targets, points)
        predicted, true = match_predictions(logits, targets, points)
        ours[f"match/{case}/pred_index"], ours[f"match/{case}/gt_index"] = predicted, true

    pictures = zip(fixture.numbered("validate/pred_logits_"), fixture.numbered("validate/gt_masks_"), strict=True)
    scores = [validate_image(logits, targets) for logits, targets in pictures]
    for number, score in enumerate(scores):
        ours |= _image("validate", number, score) | {f"validate/n_masks_{number}": np.int32(score.weight)}
    ours |= _summary("validate", scores)

    for prefix, binarised in (("ar", False), ("ar_binarised", True)):
        names = ("pred_logits", "gt_masks", "pred_counts", "gt_counts")
        pictures = zip(*(fixture.numbered(f"ar/{name}_") for name in names), strict=True)
        scores = [ar_validate_image(*picture, points, binarised) for picture in pictures]
        for number, score in enumerate(scores):
            ours |= _image(prefix, number, score)
            ours[f"{prefix}/n_{number}"] = np.int32(score.weight)
            ours[f"{prefix}/row_intersection_union_{number}"] = score.rows
            ours[f"{prefix}/row_is_matched_{number}"] = score.is_matched
            ours[f"{prefix}/rows_per_question_{number}"] = np.array(score.rows_per_question)
            for question, matched in enumerate(score.matched_predictions):
                ours[f"{prefix}/matched_pred_index_{number}_question_{question}"] = matched
        ours |= _summary(prefix, scores)
    return ours
