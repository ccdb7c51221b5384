"""Pictures for the autoencoder: panels of stories and, to see more than one style, windows of composed scenes."""

from __future__ import annotations

import numpy as np

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.builtin.scenes import compose, scene_rng
from pixelstory_jax.data.builtin.stories import StorySource

SCENE_SCALE = 1.45  # long side of a scene as a multiple of the picture's side; its short side is at least 0.7 of that


def _no_tokens(caption: str) -> np.ndarray:
    return np.zeros(0, np.int32)


class Pictures:
    """Square pictures, half of them mirrored. An example is {"image": uint8 [size, size, 3]}, fixed by its number.

    Args:
      seed: of the whole set, non-negative.
      split: "train" or "test".
      size: side in pixels.
      scenes: share of windows of scenes; the others are panels.
      length: number of examples.

    Raises:
      ValueError: a share that is none, an unknown split or a negative seed.
    """

    def __init__(self, *, seed: int, split: str, size: int, scenes: float, length: int = 10_000_000):
        if not 0 <= scenes <= 1:
            raise ValueError(f"the share of scenes must lie in 0..1, got {scenes}")
        self.seed, self.split, self.size, self.scenes, self.length = seed, split, size, scenes, length
        self._stories = StorySource(builtin_cast(), _no_tokens, seed, split, size, panels=1, length=length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of a source of {self.length}")
        rng = scene_rng(self.seed, index, self.split, "picture")
        is_scene = rng.random() < self.scenes
        image = self._scene_window(rng, index) if is_scene else self._stories[index]["images"][0]
        return {"image": np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)}

    def _scene_window(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """A random square of a scene."""
        image = compose(self.seed, index, self.split, size=round(SCENE_SCALE * self.size)).image
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size]
