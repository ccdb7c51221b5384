"""Pairs out of replies, as models write them."""

from __future__ import annotations

import pytest

from pixelstory_jax.data.muse.pair import Mention
from pixelstory_jax.data.muse.parsing import ParseError, parse_answer, parse_pairs

GOOD = '{"pairs": [{"question": "What can roll?", "answer": "[The car](1) and [the bus](2)."}]}'
ANSWER = (Mention("The car", 0), " and ", Mention("the bus", 1), ".")


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! Here are the pairs:\n\n{GOOD}\n\nI hope that helps {{}}.",
        '[{"Question": "What can roll?", "Answer": "[The car](1) and [the bus](2)."}]',
        '{"pairs": [{"question": "What can roll?", "answer": "[The car](1) and [the bus](2).",},]}',
        "{'pairs': [{'question': 'What can roll?', 'answer': '[The car](1) and [the bus](2).'}]}",
        GOOD.replace('"', "“"),
        GOOD.replace("can roll", "can\nroll"),
        GOOD.replace("](2)", "] ( #2 )"),
        GOOD[:-2] + ', {"question": "And what can f',
        '{"pairs": {"a": ' + GOOD[11:-2] + "}}",
    ],
)
def test_replies_that_are_understood(reply):
    (pair,) = parse_pairs(reply)
    assert (pair.question, pair.answer) == ("What can roll?", ANSWER)


@pytest.mark.parametrize("reply", ["", "I cannot see a picture.", "[]", "{" * 5000, "[" * 200_000, '{"question": "a"}'])
def test_replies_without_a_pair(reply):
    with pytest.raises(ParseError, match="no pair"):
        parse_pairs(reply)


def test_answer():
    assert parse_answer("No mention [of 3], (1).") == ("No mention [of 3], (1).",)
    assert parse_answer("[a](2)[b](1)") == (Mention("a", 1), Mention("b", 0))
    assert parse_answer("[two cups](1, 2)") == ("[two cups](1, 2)",)  # the checks find the bracket with numbers
