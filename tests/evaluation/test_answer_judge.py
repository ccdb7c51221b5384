"""A language model as the judge of words."""

from __future__ import annotations

import pytest

from pixelstory_jax.evaluation.answer_judge import judge_prompt, judge_records, read_points
from pixelstory_jax.inference.language_client import AnswerError, LanguageModelError, Reply

QUESTION = {
    "words": "What could I sit on?",
    "pieces": ["The chair ", 0, ", the rug ", 1, " and a sofa ", 2, "."],
    "said": ["chair", "rug", "sofa"],
    "called": [["a red sofa", "sofa"], ["the old chair", "chair"]],
    "boxes": [[5, 6, 7, 8], [1, 2, 3, 4]],
    "pairs": [[0, 1, 5, 6, 5, 6], [2, 0, 5, 6, 5, 6], [1, None, 0, 4, 4, 0]],
}
RECORD = {
    "index": 4,
    "size": [30, 40],
    "instances": [
        ["a red sofa", [5, 6, 7, 8]],
        ["the old chair", [1, 2, 3, 4]],
        ["chair", [0, 0, 1, 1]],
        ["chair", [2, 2, 4, 4]],
    ],
    "questions": [QUESTION, {**QUESTION, "said": [], "pieces": ["No."], "pairs": [[None, 0, 0, 5, 0, 5]]}],
}


class Client:
    name = "toy"

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def ask(self, messages, picture=None):
        self.asked.append(messages[0].text)
        if isinstance(self.reply, Exception):
            raise self.reply
        return Reply(self.reply)

    def stop(self):
        pass


def test_the_prompt_shows_what_the_masks_are():
    prompt = judge_prompt(RECORD, QUESTION)
    assert "40 pixels wide and 30 high" in prompt and "Question: What could I sit on?" in prompt
    assert (
        "Answer: The chair (the old chair [1, 2, 3, 4]), the rug (nothing) and a sofa (a red sofa [5, 6, 7, 8])."
        in prompt
    )
    assert "- a red sofa [5, 6, 7, 8]\n- the old chair [1, 2, 3, 4]\n- chair 1 [0, 0, 1, 1]\n- chair 2" in prompt
    assert "the 3 numbers" in prompt


def test_more_than_half_of_the_points_are_right():
    client = Client("6, 1, 5")
    judged = judge_records([RECORD, {"index": 5, "skipped": "damaged"}], client)
    assert judged.verdicts == {(4, 0): [True, False, False], (4, 1): []} and judged.failed == 0
    assert judged.points[4, 0] == [6, 1, 5] and len(client.asked) == 1  # an answer without masks is not judged


@pytest.mark.parametrize("reply", ["I would say 7.", "6, 1", "6, 1, 11", "0, 1, 5", AnswerError("filtered")])
def test_replies_that_are_none_count_as_wrong(reply):
    judged = judge_records([RECORD], Client(reply))
    assert judged.failed == 1 and judged.verdicts[4, 0] == [False] * 3


def test_an_endpoint_that_is_down_ends_the_judging():
    with pytest.raises(LanguageModelError, match="no such model"):
        judge_records([RECORD], Client(LanguageModelError("no such model")))


def test_points_are_read_off_any_list():
    assert read_points("10,9 ,1", 3) == read_points("10\n9\n1\n", 3) == [10, 9, 1]
