"""Every check with a pair that passes and pairs that do not."""

from __future__ import annotations

import dataclasses

import pytest

from pixelstory_jax.data.muse.checks import Filter, Limits, wrong_with
from pixelstory_jax.data.muse.pair import Pair
from pixelstory_jax.data.muse.parsing import parse_answer
from pixelstory_jax.data.muse.pictures import Instance, Picture

NAMES = ("dog", "hot dog", "person", "person", "cup", "cup")
PICTURE = Picture(
    "a.jpg", "", 100, 100, tuple(Instance(n, n, 1, (0, 0, 9, 9), 81, []) for n in NAMES), frozenset({"kite"})
)
QUESTION = "What would a hungry animal want to steal, and who could stop it?"
ANSWER = "It would steal [the snack](2), and [the man in blue](3) could hold back [the dog](1)."
GOOD = Pair(QUESTION, parse_answer(ANSWER))
LIMITS = Limits()


def answered(text: str, question: str = QUESTION) -> Pair:
    return Pair(question, parse_answer(text))


def test_good_pair_passes():
    assert wrong_with(GOOD, PICTURE, LIMITS) == ""


@pytest.mark.parametrize(
    "pair, reason",
    [
        (answered("[The dog](1) would want [the cake](7) here."), "an instance that does not exist"),
        (answered("[The dog](1) would want [the cake](0) here."), "an instance that does not exist"),
        (answered("[The dog](1) would want what [the animal](1) sees."), "an instance named twice"),
        (answered("Only [the dog](1) would do that."), "too few targets"),
        (answered("It would steal it."), "too few targets"),
        (answered("[a](1), [b](2), [c](3) and [d](4)."), "too many targets"),
        (answered(ANSWER, "What now?"), "the question is too short"),
        (answered(ANSWER, "why " * 61), "the question is too long"),
        (answered("[Dog](1), [snack](2)"), "the answer is too short"),
        (answered(ANSWER + " very" * 151), "the answer is too long"),
        (answered(ANSWER, "What is in the box [10, 20, 30, 40] of this picture?"), "the question tells"),
        (answered(ANSWER, "What would object 3 want to do to the others?"), "the question tells"),
        (answered(ANSWER, "Which of the instances would want to steal the food?"), "the question tells"),
        (answered("At (3) the [the dog](1) sees [the snack](2) and is happy."), "the answer tells"),
        (answered("In the given list [the dog](1) sees [the snack](2)."), "the answer tells"),
        (answered("[two people](3, 4) see [the dog](1) and [the snack](2)."), "the answer tells"),
        (answered("It sees [the dog](1) and {seg} [the snack](2)."), "the answer tells"),
        (answered("[Der Hund](1) will [das Essen](2) stehlen.", "Was will der Hund stehlen und warum?"), "not English"),
        (answered("[собака](1) хочет [еду](2) украсть.", "Что хочет собака украсть у человека?"), "not English"),
        (answered("It would steal from [the dog](3) what [the snack](2) is."), "a phrase that names another thing"),
        (answered("It would steal [a kite](3) and [the snack](2) here."), "a phrase that names another thing"),
        (answered("The men are [a person](3) and [a person](4)."), "one phrase for several instances"),
        (answered("[The dog](1) would take [the snack](2) out of the cups."), "a thing named without a mask"),
        (answered("[The dog](1) would take [the snack](2) with a kite."), "a thing named without a mask"),
    ],
)
def test_bad_pairs(pair, reason):
    assert wrong_with(pair, PICTURE, dataclasses.replace(LIMITS, targets=(2, 3))).startswith(reason)


def test_names_inside_longer_names_are_no_names():
    pair = answered("It would steal [the hot dog](2) and run from [the tall person](3) in the end.")
    assert wrong_with(pair, PICTURE, LIMITS) == ""


def test_duplicates_within_a_picture_and_over_the_set():
    checked = Filter(dataclasses.replace(LIMITS, repeats=2))
    nearly = answered(ANSWER, QUESTION.replace("stop it", "stop it now"))
    other = answered("[The tall one](3) could hold [the cup on the left](5).", QUESTION.replace("hungry", "thirsty"))
    assert list(checked.kept([GOOD, nearly, other], PICTURE)) == [GOOD, other]
    assert list(checked.kept([GOOD], PICTURE)) == [GOOD]
    assert list(checked.kept([GOOD], PICTURE)) == []
    assert checked.rejected == {"asked of this picture already": 1, "question and answer occur too often": 1}
