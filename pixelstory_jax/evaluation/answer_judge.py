"""Whether the words about a mask are right: MUSE's answer score (PixelLM paper, section 4 and its supplement).

The paper has GPT-3.5 read the answer with every mask replaced by the description and the box of the true object that it
is matched to, beside the list of the picture's objects, and give each mask 1 to 10 points for the agreement of text and
mask; more than half of the points are right. Its prompt and its scripts are not published in full; ours is `PROMPT`.

Without a language model, names are compared (a substitute, not the paper's score): the words about a mask are right
where more than half of the words of the object's category are in its phrase, or the F1 of the words of phrase and
description is more than 0.5; case, articles, punctuation and a plural s do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pixelstory_jax.inference.language_client import AnswerError, LanguageClient, Message
from pixelstory_jax.inference.parallel_asking import ask_all

Verdicts = dict[tuple[int, int], list[bool]]
"""(index of the picture, number of the question) -> for each predicted mask whether the words about it are right."""

MOST_POINTS = 10
PROMPT = """You check answers about a picture. An answer names objects and points at each of them with a mask. \
Every mask has been replaced by what it really shows, in parentheses: the description of the object and its box \
(left, top, right, bottom), or (nothing) where it shows none of the objects.

The picture is {width} pixels wide and {height} high. The objects in it and their boxes:
{objects}

Question: {question}
Answer: {answer}

For each pair of parentheses in the answer, in order, say how well the words before it agree with what is inside it: \
10 where they clearly mean the same object, 1 where they mean another one. Reply with the {count} numbers alone, \
separated by commas."""


def verdicts_by_names(records: Iterable[dict[str, Any]]) -> Verdicts:
    """The substitute for a language model, of the paper-form records of MUSE."""
    verdicts = {}
    for record in records:
        for number, question in enumerate(record["questions"]):
            target_of = _target_of(question)
            verdicts[record["index"], number] = [
                prediction in target_of and agreement(phrase, question["called"][target_of[prediction]]) > 0.5
                for prediction, phrase in enumerate(question["said"])
            ]
    return verdicts


def agreement(phrase: str, names: Sequence[str]) -> float:
    """Of a phrase and the names of an object, description first and category last: 0..1, see the module."""
    said = _words(phrase)
    description, category = _words(names[0]), _words(names[-1])
    named = (said & category).total() / category.total() if category else 0.0
    described = 2 * (said & description).total() / ((said + description).total() or 1)
    return max(named, described)


def _words(text: str) -> Counter[str]:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return Counter(re.sub(r"(?<=\w\w)s$", "", word) for word in words if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class Judged:
    """verdicts, the points behind them, and how many answers got no usable reply: their words count as wrong."""

    verdicts: Verdicts
    points: dict[tuple[int, int], list[int] | None]

    @property
    def failed(self) -> int:
        return sum(points is None for points in self.points.values())


def judge_records(records: Sequence[dict[str, Any]], client: LanguageClient, concurrency: int = 4) -> Judged:
    """Asks a language model about every answer with masks, of the paper-form records of MUSE.

    Raises:
      LanguageModelError: it cannot be asked anything.
    """
    asked = [
        ((record["index"], number), record, question)
        for record in records
        if "skipped" not in record
        for number, question in enumerate(record["questions"])
    ]
    points: dict[tuple[int, int], list[int] | None] = {place: [] for place, _, _ in asked}
    to_judge = [item for item in asked if item[2]["said"]]

    def ask(item: tuple[tuple[int, int], dict[str, Any], dict[str, Any]]) -> list[int] | None:
        _, record, question = item
        reply = client.ask([Message("user", judge_prompt(record, question))])
        return read_points(reply.text, len(question["said"]))

    for number, answer in ask_all(to_judge, ask, concurrency, client.stop):
        points[to_judge[number][0]] = None if isinstance(answer, AnswerError) else answer
    verdicts = {}
    for place, _, question in asked:
        given = points[place] or [0] * len(question["said"])
        verdicts[place] = [2 * value > MOST_POINTS for value in given]
    return Judged(verdicts, points)


def judge_prompt(record: dict[str, Any], question: dict[str, Any]) -> str:
    """What the language model reads about one answer."""
    objects = "\n".join(f"- {name} {box}" for name, box in _numbered(record["instances"]))
    target_of = _target_of(question)
    shown = [
        f"({question['called'][target_of[k]][0]} {question['boxes'][target_of[k]]})" if k in target_of else "(nothing)"
        for k in range(len(question["said"]))
    ]
    parts = [shown[piece] if isinstance(piece, int) else piece.strip() for piece in question["pieces"]]
    height, width = record["size"]
    return PROMPT.format(
        width=width,
        height=height,
        objects=objects,
        question=question["words"],
        answer=re.sub(r" ([.,;:!?])", r"\1", " ".join(parts)),
        count=len(shown),
    )


def read_points(reply: str, count: int) -> list[int] | None:
    """The points of `count` masks; None where the reply holds another number of numbers, or others than 1 to 10."""
    points = [int(number) for number in re.findall(r"\d+", reply)]
    return points if len(points) == count and all(1 <= value <= MOST_POINTS for value in points) else None


def _target_of(question: dict[str, Any]) -> dict[int, int]:
    """Predicted mask -> the true one that it is matched to."""
    return {p: t for p, t, *_ in question["pairs"] if p is not None and t is not None}


def _numbered(instances: Sequence[Sequence[Any]]) -> list[tuple[str, list[int]]]:
    """Names that occur several times get a number, as in the released code."""
    counts = Counter(name for name, _ in instances)
    seen: Counter[str] = Counter()
    numbered = []
    for name, box in instances:
        seen[name] += 1
        numbered.append((f"{name} {seen[name]}" if counts[name] > 1 else name, box))
    return numbered
