"""Pages of scored answers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from pixelstory_jax.evaluation.metrics import score_question
from pixelstory_jax.evaluation.protocol import EvaluationExample, ScoredAnswer
from pixelstory_jax.evaluation.sheets import answer_sheet
from pixelstory_jax.inference.overlay import colour_of
from tests.inference.test_overlay import answer, contains


def scored(size=(60, 90), pieces=("The red car is ", 0, "."), predicted=1) -> ScoredAnswer:
    masks = np.zeros((2, *size), bool)
    masks[0, 5:30, 5:30], masks[1, 35:50, 40:80] = True, True
    question = SimpleNamespace(
        kind="one", text="Where is the red car? " * 9, answer=("The red car ", 1, "."), targets=(1,)
    )
    example = EvaluationExample("new scenes", np.full((*size, 3), 128, np.uint8), masks, (question,))
    said = answer(pieces, masks[::-1][:predicted])
    score = score_question(masks[::-1][:predicted], masks[[1]], pieces, question.answer)
    return ScoredAnswer(example, question, said, score)


def test_sheet_shows_colours_of_matched_targets():
    items = [
        scored(),
        scored(pieces=(), predicted=0),
        scored(pieces=("A ", 0, ", a ", 1, "."), predicted=2),
    ]
    page = answer_sheet(items, "Step 3")
    assert page.dtype == np.uint8 and page.shape[1] == 2 * (3 * 256 + 4 * 16)
    assert contains(page, colour_of(0)) and contains(page, colour_of(1))
    assert answer_sheet(items[:1]).shape[1] == 3 * 256 + 4 * 16
