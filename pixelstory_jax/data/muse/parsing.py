"""Pairs out of what a language model wrote: JSON, or something that was meant to be JSON."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pixelstory_jax.data.muse.pair import Mention, Pair

LONGEST = 100_000  # characters of a reply that are looked at
MENTION = re.compile(r"\[([^\[\]]{1,200})\]\s?\(\s*#?(\d{1,6})\s*\)")
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_QUOTES = str.maketrans({"“": '"', "”": '"'})


class ParseError(ValueError):
    """A reply that holds no pair of question and answer."""


def parse_pairs(reply: str, kind: str = "model") -> list[Pair]:
    """All pairs of a reply: whatever surrounds them, inside Markdown fences, and before the place where it was cut.

    Raises:
      ParseError: there are none.
    """
    text = _FENCE.sub("", reply[:LONGEST])
    for candidate in (text, _TRAILING_COMMA.sub(r"\1", text), _TRAILING_COMMA.sub(r"\1", text.translate(_QUOTES))):
        if found := list(_pairs_in(list(_json_values(candidate)))):
            break
    else:
        found = list(_pairs_in(_python_literal(text)))
    if not found:
        raise ParseError("no pair of question and answer")
    return [Pair(" ".join(question.split()), parse_answer(answer), kind) for question, answer in found]


def parse_answer(answer: str) -> tuple[str | Mention, ...]:
    """ "Take [the cup](2)." -> ("Take ", Mention("the cup", 1), "."): lists count from 1, instances from 0."""
    parts: list[str | Mention] = []
    text = " ".join(answer.split())
    place = 0
    for match in MENTION.finditer(text):
        if match.start() > place:
            parts.append(text[place : match.start()])
        parts.append(Mention(match[1].strip(), int(match[2]) - 1))
        place = match.end()
    return (*parts, text[place:]) if place < len(text) else tuple(parts)


def _pairs_in(value: Any) -> Iterator[tuple[str, str]]:
    """Objects with a text `question` and a text `answer`, however deep in lists and objects."""
    if isinstance(value, Mapping):
        fields = {str(name).lower(): content for name, content in value.items()}
        question, answer = fields.get("question"), fields.get("answer")
        if isinstance(question, str) and isinstance(answer, str):
            yield question, answer
        else:
            for content in value.values():
                yield from _pairs_in(content)
    elif isinstance(value, list):
        for content in value:
            yield from _pairs_in(content)


def _json_values(text: str) -> Iterator[Any]:
    """The objects of a text, outermost first; where the outer one is broken or cut, the inner ones."""
    decoder = json.JSONDecoder(strict=False)  # line ends inside of texts are forgiven
    place = attempts = 0
    while attempts < 500 and (place := text.find("{", place)) >= 0:
        attempts += 1
        try:
            value, place = decoder.raw_decode(text, place)
            yield value
        except (ValueError, RecursionError):
            place += 1


def _python_literal(text: str) -> Any:
    """What stands between the outermost brackets, read as Python writes it (single quotes); None if it is not that."""
    start = min((place for mark in "{[" if (place := text.find(mark)) >= 0), default=0)
    end = max(text.rfind("}"), text.rfind("]")) + 1
    try:
        return ast.literal_eval(text[start:end])
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
