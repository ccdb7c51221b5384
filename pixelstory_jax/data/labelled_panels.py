"""Panels with the numbers of what they show, for the classifier that measures generated stories."""

from __future__ import annotations

import numpy as np

from pixelstory_jax.data.builtin.characters import Cast, builtin_cast
from pixelstory_jax.data.builtin.places import PLACES
from pixelstory_jax.data.builtin.stories import labelled_panels

HEADS = ("character", "pose", "place")


def class_names(cast: Cast) -> dict[str, tuple[str, ...]]:
    """The words that the numbers of each head stand for."""
    return dict(zip(HEADS, (cast.names, cast.pose_words, PLACES), strict=True))


def held_out_panels(count: int, seed: int, size: int) -> dict[str, np.ndarray]:
    """Panels of the embedded characters that no training sees: image uint8 [N, S, S, 3] and int32 [N] for each head.

    Raises:
      ValueError: a count, a seed or a size out of range.
    """
    return _as_batch(labelled_panels(builtin_cast(), count, seed, "test", size))


class LabelledPanels:
    """Random access to training panels of the embedded characters, fixed by seed and number.

    An example is {"image": uint8 [size, size, 3], "character", "pose", "place": int32 []}.

    Args:
      seed: of the whole set, non-negative.
      size: side in pixels.
      length: number of examples.

    Raises:
      ValueError: a negative seed.
    """

    def __init__(self, *, seed: int, size: int, length: int = 10_000_000):
        if seed < 0:
            raise ValueError(f"the seed of the panels must be at least 0, got {seed}")
        self.seed, self.size, self.length = seed, size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of a source of {self.length}")
        # A set of one panel per number: the panels of different seeds are different.
        panels = labelled_panels(builtin_cast(), 1, self.seed * self.length + index, "train", self.size)
        return {name: values[0] for name, values in _as_batch(panels).items()}


def _as_batch(panels: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    return dict(zip(("image", *HEADS), panels, strict=True))
