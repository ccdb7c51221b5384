"""Scores worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from pixelstory_jax.evaluation.metrics import score_masks, score_question
from pixelstory_jax.evaluation.protocol import EvaluationExample, baseline_masks, evaluate_answers
from pixelstory_jax.inference.answers import Answer, Target, phrases, readable

NONE = np.zeros((0, 4, 4), bool)


def rows(*spans: tuple[int, int]) -> np.ndarray:
    """One mask [4, 4] per span of rows."""
    masks = np.zeros((len(spans), 4, 4), bool)
    for mask, (first, last) in zip(masks, spans, strict=True):
        mask[first:last] = True
    return masks


def test_perfect_in_any_order():
    ious, intersection, union = score_masks(rows((2, 4), (0, 1)), rows((0, 1), (2, 4)))
    assert ious == (1.0, 1.0) and intersection == union == 12


def test_a_mask_too_few_and_one_too_many():
    ious, intersection, union = score_masks(rows((0, 2)), rows((2, 4), (0, 1)))
    assert ious == (0.5, 0.0) and (intersection, union) == (4, 8 + 8)
    ious, intersection, union = score_masks(rows((0, 1), (1, 4)), rows((0, 1)))
    assert ious == (1.0, 0.0) and (intersection, union) == (4, 4 + 12)


def test_nothing_asked():
    assert score_masks(NONE, NONE) == ((1.0,), 0, 0)
    assert score_masks(rows((0, 1)), NONE) == ((0.0,), 0, 4)
    assert score_masks(NONE, rows((0, 1))) == ((0.0,), 0, 4)


def test_empty_prediction_for_a_target_is_zero():
    assert score_masks(rows((0, 0)), rows((0, 2)))[0] == (0.0,)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (("It is the Car ", 0, " and an apple ", 1, "."), True),
        (("The apple ", 0, "."), False),
        (("apple ", 0, ", apple ", 1, ", car ", 2), False),
        (("No.",), False),
    ],
)
def test_names(said, named):
    expected = ("The apple is ", 2, " and the car is ", 0, ".")
    assert score_question(NONE, rows((0, 1), (1, 2)), said, expected).named is named


def test_rejection():
    expected = ("There is no dog here.",)
    assert score_question(NONE, NONE, ("I see no dog.",), expected).rejected is True
    assert score_question(NONE, NONE, ("The dog.",), expected).rejected is False
    assert score_question(rows((0, 1)), NONE, ("No dog ", 0), expected).rejected is False


@dataclass(frozen=True)
class Asked:
    kind: str
    text: str
    answer: tuple[str | int, ...]
    targets: tuple[int, ...]


def answer(pieces: tuple[str | int, ...], masks: np.ndarray) -> Answer:
    targets = [Target(name, mask, 1.0, (0, 0, 1, 1)) for name, mask in zip(phrases(pieces), masks, strict=True)]
    return Answer(readable(pieces), tuple(targets), pieces)


def examples() -> list[EvaluationExample]:
    picture, masks = np.zeros((4, 4, 3), np.uint8), rows((0, 1), (2, 4))
    one = Asked("one", "Where is the car?", ("The car is ", 1, "."), (1,))
    more = Asked("follow_up", "And the apple?", ("The apple is ", 0, "."), (0,))
    absent = Asked("absent", "Where is the dog?", ("There is no dog.",), ())
    return [
        EvaluationExample("new scenes", picture, masks, (one, more)),
        EvaluationExample("new scenes", picture, masks, (absent,)),
        EvaluationExample("new names", picture, masks, (one,)),
    ]


def test_protocol_asks_in_turns_and_sums_up():
    seen = []

    def answer_batch(pictures, conversations):
        assert len(pictures) == len(conversations) == 2
        seen.extend(conversations)
        replies = []
        for turns in conversations:
            if "dog" in turns[-1].question:
                replies.append(answer(("There is no dog.",), NONE))
            elif "apple" in turns[-1].question:
                replies.append(answer(("The apple is ", 0, "."), rows((0, 2))))
            else:
                replies.append(answer(("The car is ", 0, "."), rows((2, 4))))
        return replies

    report = evaluate_answers(answer_batch, examples(), batch_size=2)
    metrics = report.metrics
    assert metrics["new scenes/one/giou"] == 1 and metrics["new scenes/one/names"] == 1
    assert metrics["new scenes/follow_up/giou"] == 0.5 and metrics["new scenes/follow_up/ciou"] == 0.5
    assert metrics["new scenes/absent/rejected"] == 1 and "new scenes/absent/ciou" not in metrics
    np.testing.assert_allclose(metrics["new scenes/all/giou"], 2.5 / 3)
    np.testing.assert_allclose(metrics["new scenes/one/giou_united"], 8 / 12)
    assert metrics["new scenes/one/giou_nothing"] == 0 and metrics["new scenes/absent/giou_nothing"] == 1
    assert metrics["new scenes/absent/giou_random"] == 0
    # United is the car (8 pixels) and the apple (4); asked for the absent dog it is 12 pixels too many.
    np.testing.assert_allclose(metrics["new scenes/one/ciou_united"], 8 / 12)
    np.testing.assert_allclose(metrics["new scenes/follow_up/ciou_united"], 4 / 12)
    np.testing.assert_allclose(metrics["new scenes/all/ciou_united"], 12 / 36)
    assert metrics["new scenes/one/ciou_nothing"] == 0 and "new scenes/absent/ciou_nothing" not in metrics
    lines = report.table.splitlines()
    (titles, *_) = (line.split() for line in lines if line.startswith("kind"))
    (cells, *_) = (line.split() for line in lines if line.startswith("one"))
    assert titles[-6:] == ["united", "random", "nothing"] * 2 and max(map(len, lines)) <= 120
    assert (cells[-6], cells[-3]) == ("0.667", "0.667") and len(cells) == len(titles)
    second = [turns for turns in seen if len(turns) == 2]
    assert second[0][0].answer == ("The car is ", 0, ".") and second[0][1].answer is None
    assert len(report.records) == 4 and "New names" in report.table and "follow up" in report.table


def test_random_baseline_repeats_with_the_seed_and_draws_different_things():
    objects = rows((0, 1), (1, 2), (2, 3))
    first, second = (baseline_masks(objects, 3, np.random.default_rng(4))["random"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.any(axis=0)[:3].all()
