"""Panels with the numbers of what they show, for the classifier that measures generated stories."""

from __future__ import annotations

import dataclasses

import numpy as np

from pixelstory_jax.data.builtin.characters import Cast, builtin_cast
from pixelstory_jax.data.builtin.places import PLACES
from pixelstory_jax.data.builtin.scenes import scene_rng
from pixelstory_jax.data.builtin.stories import Box, compose_panel, labelled_panels, plan_panel

HEADS = ("character", "pose", "place")
_SCALE = (0.94, 1.16)  # of figures in training, as a multiple of their size in stories
_RISE = 0.1  # how far they are moved up or down at most, as a share of the side


def class_names(cast: Cast) -> dict[str, tuple[str, ...]]:
    """The words that the numbers of each head stand for."""
    return dict(zip(HEADS, (cast.names, cast.pose_words, PLACES), strict=True))


def held_out_panels(count: int, seed: int, size: int) -> dict[str, np.ndarray]:
    """Panels of the embedded characters that no training sees: image uint8 [N, S, S, 3] and int32 [N] for each head.

    Raises:
      ValueError: a count, a seed or a size out of range.
    """
    panels = labelled_panels(builtin_cast(), count, seed, "test", size)
    return dict(zip(("image", *HEADS), panels, strict=True))


class LabelledPanels:
    """Random access to training panels of one embedded character each, fixed by seed and number.

    In stories figures have one size, and each pose has its height above the ground. Here sizes and heights vary, so
    that a pose has to be read from the figure.

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
        self.cast = builtin_cast()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of a source of {self.length}")
        rng = scene_rng(self.seed, index, "train", "panel of a classifier")
        classes = class_names(self.cast)
        numbers = {head: int(rng.integers(len(words))) for head, words in classes.items()}
        pose, place = (classes[head][numbers[head]] for head in ("pose", "place"))
        panel = plan_panel(rng, self.cast, (numbers["character"],), pose, place, caption="")
        panel = dataclasses.replace(panel, boxes=tuple(moved(rng, box) for box in panel.boxes))
        image = compose_panel(self.cast, panel, rng, self.size)
        return {"image": image, **{head: np.asarray(number, np.int32) for head, number in numbers.items()}}


def moved(rng: np.random.Generator, box: Box) -> Box:
    """A box of about the same size, anywhere between left and right, a little higher or lower, within the panel."""
    x0, y0, x1, y1 = box
    scale = min(rng.uniform(*_SCALE), 1 / (x1 - x0), 1 / (y1 - y0))
    width, height = scale * (x1 - x0), scale * (y1 - y0)
    left = (1 - width) * rng.random()
    bottom = min(max(y1 + rng.uniform(-_RISE, _RISE), height), 1.0)
    return left, bottom - height, left + width, bottom
