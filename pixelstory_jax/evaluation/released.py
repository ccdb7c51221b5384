"""The evaluation arithmetic of PixelLM's released code, quirks included, so that its numbers can be reproduced.

P  predictions        T  targets        N  sample points        H, W  height and width

Source: `validate`, `ar_validate` and `match_pred` of the released `train_ds.py` (and LISA's `intersectionAndUnionGPU`),
for gRefCOCO ReLA's `refer_evaluation.py`. The scores that this project reports by default are those of `metrics.py` and
of the form "paper" of `benchmark_scores.py`. Everything is float32 where the reference is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelstory_jax.data.annotations import Annotation, ClassMask, decode_mask
from pixelstory_jax.data.tokenizers import Tokenizer
from pixelstory_jax.evaluation.matching import assign

IGNORED = 255
POINTS = 12_544


def random_points(seed: int | Sequence[int], count: int = POINTS) -> np.ndarray:
    """Uniform sample points (x, y) in 0..1, [N, 2]; the reference draws new ones, unseeded, for every question."""
    return np.random.default_rng(seed).random((count, 2), np.float32)


def target_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """Positions int [K, G] of the codebook tokens of generated ids, in whatever order they come.

    Where their number is no multiple of G, the reference drops all masks of the answer.
    """
    kept = [int(id_) for id_ in ids]
    if tokenizer.eos_id in kept:
        kept = kept[: kept.index(tokenizer.eos_id)]
    group = len(tokenizer.codebook_ids)
    positions = np.flatnonzero(np.isin(kept, tokenizer.codebook_ids))
    return positions[: 0 if len(positions) % group else None].reshape(-1, group)


def summed_mask(annotation: Annotation, number: int) -> np.ndarray:
    """The true mask uint8 [H, W] of a region; its parts are added up, so that pixels of two of them hold 2."""
    mask = annotation.regions[number].mask
    if isinstance(mask, (np.ndarray, ClassMask, Mapping)) or len(mask) < 2:
        return annotation.mask(number).astype(np.uint8)
    total = np.zeros(annotation.size, np.uint8)
    parts: Sequence[Any] = mask
    for part in parts:
        total += decode_mask([part], annotation.size)
    return total


def sample_points(maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear samples [K, N] of [K, H, W] at points [N, 2] (x, y in 0..1, centres at half steps, zero outside)."""
    height, width = maps.shape[1:]
    x, y = points[:, 0] * np.float32(width) - np.float32(0.5), points[:, 1] * np.float32(height) - np.float32(0.5)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, bottom_share = x - left, y - top
    padded = np.pad(maps.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    samples = np.zeros((len(maps), len(points)), np.float32)
    for row, row_share in ((top, 1 - bottom_share), (top + 1, bottom_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            samples += padded[:, row + 1, column + 1] * (row_share * column_share)
    return samples


def matching_cost(logits: np.ndarray, targets: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean cross entropy plus dice (with +1 smoothing) on the sample points: float32 [P, T].

    Args:
      logits: [P, H, W].
      targets: [T, H, W], 0 or 1.
      points: [N, 2]. All pairs share them.
    """
    predicted, true = sample_points(logits, points), sample_points(targets, points)
    # log(1 + exp(-x)) is the loss of a positive, log(1 + exp(x)) of a negative.
    positive, negative = np.logaddexp(0, -predicted), np.logaddexp(0, predicted)
    cross_entropy = (positive @ true.T + negative @ (1 - true).T) / np.float32(len(points))
    probability = 1 / (1 + np.exp(-predicted))
    overlap = 2 * (probability @ true.T)
    total = probability.sum(-1)[:, None] + true.sum(-1)[None]
    dice = 1 - (overlap + 1) / (total + 1)
    return (cross_entropy + dice).astype(np.float32)


def match_predictions(logits: np.ndarray, targets: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`match_pred`: (prediction, target) of each pair, int [min(P, T)], by the least summed `matching_cost`."""
    if not len(logits) or not len(targets):
        return np.zeros(0, int), np.zeros(0, int)
    return assign(matching_cost(logits, targets, points))


def intersection_and_union(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pixel counts per class of one mask: float32 [2 (intersection, union), 2 (background, foreground)].

    `output` may hold any numbers; like the reference's histogram of two bins over 0..1, values below 0 or above 1 are
    in no class. Pixels whose target is 255 are ignored.
    """
    output = np.where(target == IGNORED, np.float32(IGNORED), output.astype(np.float32))
    target = target.astype(np.float32)

    def per_class(values: np.ndarray) -> np.ndarray:
        return np.array([((values >= 0) & (values < 0.5)).sum(), ((values >= 0.5) & (values <= 1)).sum()], np.float32)

    intersection = per_class(output[output == target])
    return np.stack([intersection, per_class(output) + per_class(target) - intersection])


def _iou(rows: np.ndarray) -> np.ndarray:
    """IoU per row and class of [R, 2, 2]; a class with an empty union counts 1."""
    intersection, union = rows[:, 0], rows[:, 1]
    return np.where(union == 0, np.float32(1), intersection / (union + np.float32(1e-5)))


@dataclass(frozen=True)
class ImageRows:
    """One picture. rows: [R, 2, 2] (`intersection_and_union` of every pair); weight: its n."""

    rows: np.ndarray
    weight: int

    @property
    def intersection(self) -> np.ndarray:
        return self.rows[:, 0].sum(0)

    @property
    def union(self) -> np.ndarray:
        return self.rows[:, 1].sum(0)

    @property
    def mean_iou(self) -> np.ndarray:
        """[2], per class, divided by the weight."""
        return _iou(self.rows).sum(0, dtype=np.float32) / np.float32(max(self.weight, 1))


@dataclass(frozen=True)
class ImageScore(ImageRows):
    """With what belongs together: is_matched [R]; the predictions [M] that were matched, question by question."""

    is_matched: np.ndarray
    rows_per_question: tuple[int, ...]
    matched_predictions: tuple[np.ndarray, ...]


def validate_image(logits: np.ndarray, targets: np.ndarray) -> ImageScore:
    """`validate`: prediction i belongs to target i (teacher-forced answers always have as many masks as targets).

    Args:
      logits: [K, H, W].
      targets: [K, H, W] with 0, 1, and 255 where a pixel is ignored.
    """
    binary = (logits > 0).astype(np.float32)
    rows = _stack([intersection_and_union(p, t) for p, t in zip(binary, targets, strict=True)])
    every = np.arange(len(rows))
    return ImageScore(rows, len(rows), np.ones(len(rows), bool), (len(rows),), (every,))


def ar_validate_image(
    logits: np.ndarray,
    targets: np.ndarray,
    prediction_counts: Sequence[int],
    target_counts: Sequence[int],
    points: np.ndarray,
    binarised: bool = False,
) -> ImageScore:
    """`ar_validate`: generated answers, matched per question; leftovers are paired with an empty mask.

    Args:
      logits, targets: [P, H, W] and [T, H, W] of all questions, one after the other.
      prediction_counts, target_counts: how many of them belong to each question.
      points: [N, 2], see `random_points`, or [Q, N, 2], others for each question.
      binarised: thresholds the predictions that are left over, too. The reference lets them in as raw logits, so that
        they hardly count. In both forms the mean IoU is divided by max(P, T) of the whole picture although there can
        be more rows than that.
    """
    empty = np.zeros(logits.shape[1:] or targets.shape[1:], np.float32)
    rows, is_matched, rows_per_question, matched_predictions = [], [], [], []
    first_prediction = first_target = 0
    own_points = np.broadcast_to(points, (len(target_counts), *points.shape[-2:]))
    for prediction_count, target_count, here in zip(prediction_counts, target_counts, own_points, strict=True):
        predictions = logits[first_prediction : first_prediction + prediction_count]
        masks = targets[first_target : first_target + target_count]
        first_prediction, first_target = first_prediction + prediction_count, first_target + target_count
        chosen, matched = match_predictions(predictions, masks, here)
        pairs = [(predictions[p] > 0, masks[t]) for p, t in zip(chosen, matched, strict=True)]
        pairs += [(empty, masks[t]) for t in range(len(masks)) if t not in matched]
        left_over = [predictions[p] for p in range(len(predictions)) if p not in chosen]
        pairs += [((p > 0) if binarised else p, empty) for p in left_over]
        rows += [intersection_and_union(prediction, target) for prediction, target in pairs]
        is_matched += [i < len(chosen) for i in range(len(pairs))]
        rows_per_question.append(len(pairs))
        matched_predictions.append(chosen)
    weight = max(len(logits), len(targets))
    stacked = _stack(rows)
    return ImageScore(stacked, weight, np.array(is_matched, bool), tuple(rows_per_question), tuple(matched_predictions))


def summarise(images: Sequence[ImageRows]) -> tuple[float, float]:
    """(gIoU, cIoU) of the foreground over all pictures: mean IoU weighted by their n; summed I over summed U."""
    weights = np.array([image.weight for image in images], np.float32)
    means = np.array([image.mean_iou[1] for image in images], np.float32)
    giou = (means * weights).sum() / (weights.sum() + 1e-5)
    intersection = sum(float(image.intersection[1]) for image in images)
    union = sum(float(image.union[1]) for image in images)
    return float(giou), intersection / (union + 1e-10)


def summarise_generalised(samples: Sequence[tuple[int, int, bool, bool]]) -> dict[str, float]:
    """gRefCOCO's scores by ReLA's `refer_evaluation.py`, as shares of 1.

    Args:
      samples: of every expression intersection and union of the merged masks, whether it has a target, and whether the
        answer gives one. Here an answer without mask pixels gives none; ReLA has a classifier for that.
    """
    ious, intersection, union = [], 0, 0
    for overlap, total, has_target, gives_one in samples:
        if has_target:
            overlap *= gives_one
            ious.append(overlap / total if total else 0.0)
            intersection, union = intersection + overlap, union + total
        else:
            ious.append(0.0 if gives_one else 1.0)
            union += total if gives_one else 0
    with_target = [iou for iou, sample in zip(ious, samples, strict=True) if sample[2]]
    found = sum(sample[3] for sample in samples if sample[2])
    refused = sum(not sample[3] for sample in samples if not sample[2])
    without = len(samples) - len(with_target)
    scores = {"giou": math.fsum(ious) / max(len(ious), 1), "ciou": intersection / max(union, 1)}
    # The script gives 0 for both where no expression is without target.
    scores["t_acc"] = found / len(with_target) if without and with_target else 0.0
    scores["n_acc"] = refused / without if without else 0.0
    for threshold in (0.7, 0.8, 0.9):
        hits = sum(iou >= threshold for iou in with_target)
        scores[f"pr@{threshold}"] = hits / max(len(with_target), 1)
    return scores


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    return np.stack(rows) if rows else np.zeros((0, 2, 2), np.float32)
