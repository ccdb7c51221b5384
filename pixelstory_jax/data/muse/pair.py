"""A question about several instances of a picture, with an answer that says where each of them is named."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mention:
    """The words of an answer that name one instance; `number`: of the instance in its picture, from 0."""

    phrase: str
    number: int


@dataclass(frozen=True)
class Pair:
    """`answer`: text and mentions in reading order; kind: how the question was made, for the statistics."""

    question: str
    answer: tuple[str | Mention, ...]
    kind: str = ""

    @property
    def mentions(self) -> tuple[Mention, ...]:
        return tuple(part for part in self.answer if isinstance(part, Mention))

    @property
    def targets(self) -> tuple[int, ...]:
        """Numbers of the instances, in the order of the answer."""
        return tuple(mention.number for mention in self.mentions)

    @property
    def plain(self) -> str:
        """The answer in words."""
        return "".join(part if isinstance(part, str) else part.phrase for part in self.answer)

    @property
    def slotted(self) -> str:
        """The answer as MUSE has it in `text_answers`: "{seg}" behind every mention."""
        return "".join(part if isinstance(part, str) else part.phrase + " {seg}" for part in self.answer)
