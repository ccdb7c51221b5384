"""Who writes the pairs of a picture: rules, or a language model."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pixelstory_jax.data.muse import rules
from pixelstory_jax.data.muse.pair import Pair
from pixelstory_jax.data.muse.parsing import ParseError, parse_pairs
from pixelstory_jax.data.muse.pictures import Picture
from pixelstory_jax.data.muse.prompts import messages_for
from pixelstory_jax.inference.language_client import AnswerError, LanguageClient


class UnreadableReply(AnswerError):
    """The model has answered, but not with pairs; to ask again would bring the same."""


class Writer(Protocol):
    def write(self, picture: Picture, file: Path) -> list[Pair]:
        """The pairs of a picture, unchecked; `file`: where it is.

        Raises:
          AnswerError: there are none to be had. LanguageModelError: nor for any other picture.
        """
        ...


@dataclass(frozen=True)
class RuleWriter:
    """`count` pairs a picture at most."""

    count: int
    seed: int

    def write(self, picture: Picture, file: Path) -> list[Pair]:
        return rules.write_pairs(picture, self.count, self.seed)


@dataclass(frozen=True)
class ModelWriter:
    """Asks `client` once a picture.

    Attributes:
      targets: fewest and most instances that an answer should have. is_seen: whether the picture is sent along.
    """

    client: LanguageClient
    count: int
    seed: int
    targets: tuple[int, int]
    is_seen: bool

    def write(self, picture: Picture, file: Path) -> list[Pair]:
        shown = None
        if self.is_seen:
            try:
                shown = file.read_bytes()
            except OSError as error:
                raise AnswerError(f"{file} cannot be read: {error.strerror or error}.") from error
        reply = self.client.ask(messages_for(picture, self._counts(picture), self.is_seen), shown)
        try:
            return parse_pairs(reply.text)
        except ParseError as error:
            raise UnreadableReply(f"The reply for {picture.file_name} holds {error}: {reply.text[:80]!r}") from error

    def _counts(self, picture: Picture) -> list[int]:
        """How many targets each pair should have: from the fewest to what there is, small numbers more often."""
        fewest, most = self.targets
        most = max(fewest, min(most, len(picture.instances)))
        numbers = np.arange(fewest, most + 1)
        digest = zlib.crc32(f"{picture.coco_url} {picture.file_name}".encode())
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, digest, 1)))
        return [int(count) for count in rng.choice(numbers, self.count, p=(1 / numbers) / (1 / numbers).sum())]
