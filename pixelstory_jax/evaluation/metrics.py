"""Scores of generated answers, per question and summed up per split and kind of question.

Definitions (PixelLM paper, section 4, with the false positives counted that the released code lets pass):
  gIoU      mean IoU over the pairs of a question's one-to-one matching; a mask too many or too few is a pair of IoU 0,
            and a question without targets answered without masks is one pair of IoU 1;
  cIoU      summed intersection over summed union of the same pairs, so large things weigh more;
  names     share of answers that name the right things, each as often as it occurs, in any order;
  rejected  share of questions about absent things whose answer says so in words and gives no mask.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pixelstory_jax.evaluation.matching import intersections, match_masks
from pixelstory_jax.inference.answers import Pieces, phrases, rejects


@dataclass(frozen=True)
class QuestionScore:
    """ious: of every pair, leftovers included. named: None if no thing is to be named; rejected: None if one is."""

    ious: tuple[float, ...]
    intersection: int
    union: int
    named: bool | None
    rejected: bool | None

    @property
    def giou(self) -> float:
        return float(np.mean(self.ious))


def score_masks(predicted: np.ndarray, true: np.ndarray) -> tuple[tuple[float, ...], int, int]:
    """(IoU of every pair, summed intersection, summed union) of bool masks [P, H, W] and [T, H, W] of one question."""
    if not len(predicted) and not len(true):
        return (1.0,), 0, 0
    chosen, matched, ious = match_masks(predicted, true)
    left_over = np.concatenate([np.delete(predicted, chosen, axis=0), np.delete(true, matched, axis=0)])
    intersection, union = 0, int(np.count_nonzero(left_over))
    if len(chosen):
        pair_intersections, pair_unions = intersections(predicted, true)
        intersection += int(pair_intersections[chosen, matched].sum())
        union += int(pair_unions[chosen, matched].sum())
    return (*ious.tolist(), *[0.0] * len(left_over)), intersection, union


def score_question(predicted: np.ndarray, true: np.ndarray, said: Pieces, expected: Pieces) -> QuestionScore:
    """Scores one generated answer: its masks bool [P, H, W] and words against the true ones."""
    ious, intersection, union = score_masks(predicted, true)
    wanted = names_of(expected)
    named = names_of(said) == wanted if wanted else None
    return QuestionScore(ious, intersection, union, named, None if wanted else rejects(said))


def names_of(pieces: Pieces) -> Counter[str]:
    """The things that an answer names, and how often, in lower case and without articles."""
    return Counter(re.sub(r"\b(?:the|an?)\s+", "", phrase.lower()) for phrase in phrases(pieces))


@dataclass
class Tally:
    """Running sums of question scores."""

    questions: int = 0
    ious: list[float] = field(default_factory=list)
    intersection: int = 0
    union: int = 0
    named: list[bool] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)

    def add(self, score: QuestionScore) -> None:
        self.questions += 1
        self.ious += score.ious
        self.intersection += score.intersection
        self.union += score.union
        if score.named is not None:
            self.named.append(score.named)
        if score.rejected is not None:
            self.rejected.append(score.rejected)

    def summary(self) -> dict[str, float]:
        """gIoU, cIoU, and, where the questions ask for them, names and rejected."""
        values = {"giou": float(np.mean(self.ious)) if self.ious else 0.0}
        if self.union:
            values["ciou"] = self.intersection / self.union
        if self.named:
            values["names"] = float(np.mean(self.named))
        if self.rejected:
            values["rejected"] = float(np.mean(self.rejected))
        return values
