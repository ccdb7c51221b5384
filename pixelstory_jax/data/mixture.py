"""Several data sets as one endless, random-access source of examples.

Example i is a function of the seed and i alone: which set and which picture come from an interleaving by weight, in
which every set is gone through in a new order each time, and what is asked is drawn anew each time. Any process or
host can therefore make any part of a batch, and a run goes on in the middle of a pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grain
from absl import logging

from pixelstory_jax.data.annotations import AnnotationError, Example
from pixelstory_jax.data.asking import Asking, ask_about
from pixelstory_jax.data.builtin.questions import Conversation
from pixelstory_jax.data.builtin.scenes import scene_rng
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers.reader import Reader, open_picture

TRIES = 50  # unusable pictures in a row after which the data set is given up
WARNINGS = 10  # unusable pictures that are named in the log of a process


@dataclass(frozen=True)
class Group:
    """Data sets that share a weight: each of them is drawn equally often, whatever its size (as PixelLM does)."""

    name: str
    weight: float
    readers: tuple[Reader, ...]


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ValueError where the weights of groups, by name, are negative or all zero."""
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"The weights of the mixture must be non-negative with a positive sum, got {dict(weights)}.")


class Mixture:
    """A source of (example, its conversations) over groups of data sets.

    Args:
      groups: at least one with a positive weight; all others hold readers, too.
      asking: how questions are drawn.
      seed: of order and questions.

    Attributes:
      readers: data sets of groups with a weight. shares: of the examples, for each of them.
      skipped: pictures that could not be used so far, in this process.

    Raises:
      ValueError: no group, no reader, an empty reader, or weights that are negative or all zero.
    """

    shuffled = True  # the order is random as it stands
    length = 1 << 40

    def __init__(self, groups: Sequence[Group], asking: Asking, seed: int) -> None:
        weights = {group.name: group.weight for group in groups}
        check_weights(weights)
        self.asking, self.seed = asking, seed
        self.readers: list[Reader] = []
        self.shares: list[float] = []
        for group in groups:
            if not group.readers:
                raise ValueError(f"The group {group.name} of the mixture has no data set.")
            for reader in group.readers if group.weight else ():
                if not len(reader):
                    raise ValueError(f"The data set {reader.name} ({reader.split}) has no pictures.")
                self.readers.append(reader)
                self.shares.append(group.weight / len(group.readers) / sum(weights.values()))
        orders = [
            grain.MapDataset.range(len(reader)).seed((seed + number) % 2**32).shuffle().repeat().map(_Numbered(number))
            for number, reader in enumerate(self.readers)
        ]
        self._order = grain.MapDataset.mix(orders, self.shares)
        self.skipped = 0

    def __len__(self) -> int:
        return self.length

    def place(self, index: int) -> tuple[Reader, int]:
        """The data set of example `index`, and the number of its picture in it."""
        number, picture = self._order[index]
        return self.readers[number], int(picture)

    def __getitem__(self, index: int) -> tuple[Example, tuple[Conversation, ...]]:
        """Example `index`; a picture that cannot be used is named in the log, and another of its set taken.

        Raises:
          AnnotationError: none of `TRIES` pictures can be used.
        """
        reader, picture = self.place(index)
        rng = scene_rng(self.seed, index, "train", "mixture")
        for _ in range(TRIES):
            try:
                annotation = reader[picture]
                image = open_picture(reader, picture, annotation.provenance.picture)
                example = ask_about(image, annotation, rng, self.asking)
                return example, example.conversations
            except (AnnotationError, ImageError) as error:
                self._skip(error)
                reason = error
            picture = int(rng.integers(len(reader)))
        raise AnnotationError(f"{TRIES} pictures of {reader.name} in a row cannot be used, the last because: {reason}")

    def _skip(self, error: Exception) -> None:
        self.skipped += 1
        if self.skipped <= WARNINGS:
            last = " (no more such pictures will be named)" if self.skipped == WARNINGS else ""
            logging.warning("Passed over: %s%s", error, last)


class _Numbered:
    """Adds the number of the data set. A class, so that workers can pickle it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, picture: int) -> tuple[int, int]:
        return self.number, picture
