"""Composes stories: panels of one character in different poses and places, with captions; story i of a seed is fixed.

P  panels of a story
S  side of a panel in pixels
T  tokens of a caption
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin import story_wording
from pixelstory_jax.data.builtin.characters import Cast
from pixelstory_jax.data.builtin.places import PLACES, draw_place
from pixelstory_jax.data.builtin.scenes import scene_rng

STORY_SPLITS = ("train", "test")
Box = tuple[float, float, float, float]

# Figures have one size and stand in the middle of their room, on a grid of a twelfth of the panel's side, a multiple of
# the tiny autoencoder's step: the latents of a figure repeat from panel to panel, which a small network learns in
# minutes rather than hours.
CELL = 1 / 12
_HEIGHT, _PAIR_HEIGHT = 0.67, 0.55  # of a typical standing character, as shares of the side
_GROUND = 11 * CELL  # where its feet are
_EDGE = 0.015  # left free between a character and the edge
_RAISED = {"jumping": 2, "falling": 1, "climbing": 1, "flying": 2}  # cells above the ground
_SHADOW = 0.34  # darkening in the middle of the shadow under the feet


@dataclasses.dataclass(frozen=True)
class Panel:
    """What a panel shows, without its picture.

    characters: numbers in the cast, none to two, in the order of the caption.
    pose: pose word that all of them share; "" where nobody is.
    frames: frame of each character. flips: whether each is mirrored.
    boxes: x0, y0, x1, y1 of the opaque part of each, in shares of the side.
    place: one of ``PLACES``. caption: the words.
    """

    characters: tuple[int, ...]
    pose: str
    frames: tuple[str, ...]
    flips: tuple[bool, ...]
    boxes: tuple[Box, ...]
    place: str
    caption: str

    def __post_init__(self) -> None:
        if not len(self.characters) == len(self.frames) == len(self.flips) == len(self.boxes) <= 2:
            raise ValueError("a panel needs a frame, a flip and a box for each of its characters, two at most")


def compose_panel(cast: Cast, panel: Panel, rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws a panel, uint8 [size, size, 3].

    Args:
      cast: whose characters the panel names.
      panel: what to show.
      rng: varies the drawing of the place; the characters are drawn as the panel says.
      size: side in pixels.

    Raises:
      ValueError: unknown place, or a size out of range.
    """
    picture = draw_place(panel.place, rng, size).copy()
    if panel.pose not in _RAISED:
        for box in panel.boxes:
            _cast_shadow(picture, box)
    for character, frame, flip, box in zip(panel.characters, panel.frames, panel.flips, panel.boxes, strict=True):
        _paste(picture, _cut_out(cast, character, frame), flip, box)
    return picture


@functools.lru_cache(maxsize=2048)
def _cut_out(cast: Cast, character: int, frame: str) -> Image.Image:
    """A frame cut to its opaque box, its colours multiplied by alpha, which is what resampling needs."""
    sprite = cast.sprite(character, frame)
    box = Image.fromarray(sprite[..., 3]).getbbox()
    assert box is not None  # a cast has no empty frames
    return Image.fromarray(sprite).crop(box).convert("RGBa")


def _paste(picture: np.ndarray, cut_out: Image.Image, flip: bool, box: Box) -> None:
    """Lays a premultiplied cut-out over the picture, in place."""
    size = len(picture)
    left, top, right, bottom = (round(edge * size) for edge in box)
    scaled = cut_out.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
    pixels = np.asarray(scaled)[:, ::-1] if flip else np.asarray(scaled)
    window = picture[top:bottom, left:right]
    alpha = pixels[..., 3:].astype(np.uint16)
    colour = np.minimum(pixels[..., :3], alpha)  # the filter may overshoot
    window[:] = colour + (window * (255 - alpha) + 127) // 255


def _cast_shadow(picture: np.ndarray, box: Box) -> None:
    """Darkens a soft flat oval under the feet, in place."""
    size = len(picture)
    x0, _, x1, bottom = box
    across, down = 0.46 * (x1 - x0) * size, 0.032 * size
    centre_x, centre_y = (x0 + x1) / 2 * size, (bottom - 0.008) * size
    top, low = max(0, int(centre_y - down)), min(size, int(centre_y + down) + 1)
    left, right = max(0, int(centre_x - across)), min(size, int(centre_x + across) + 1)
    y = (np.arange(top, low, dtype=np.float32)[:, None, None] + 0.5 - centre_y) / down
    x = (np.arange(left, right, dtype=np.float32)[None, :, None] + 0.5 - centre_x) / across
    dark = _SHADOW * np.clip(1 - y * y - x * x, 0, 1)
    window = picture[top:low, left:right]
    window[:] = (window * (1 - dark) + 0.5).astype(np.uint8)


class StorySource:
    """Random access to stories: panels of one character in different poses and places.

    An example has ``images`` uint8 [P, S, S, 3] and ``tokens`` int32 [P, T]. It is a function of (seed, split, index).

    Args:
      cast: the characters.
      encode: from a caption to its token ids, int [T].
      seed: of the whole data set, non-negative.
      split: "train" or "test".
      size: side S of a panel in pixels.
      panels: number P of panels.
      named: share of stories whose captions name the character; the captions of the others do not tell who it is.
      empty: share of panels with nobody in them.
      pairs: share of panels with a second character, which the caption always names.
      length: number of stories.

    Raises:
      ValueError: an argument is out of range.
    """

    def __init__(
        self,
        cast: Cast,
        encode: Callable[[str], np.ndarray],
        seed: int,
        split: str,
        size: int = 96,
        panels: int = 4,
        named: float = 0.5,
        empty: float = 0.06,
        pairs: float = 0.1,
        length: int = 1 << 20,
    ) -> None:
        if split not in STORY_SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(STORY_SPLITS)}")
        if min(seed, panels - 1, length - 1) < 0:
            raise ValueError(
                f"a story source needs a seed of at least 0, and one panel and one story or more, "
                f"got seed {seed}, panels {panels}, length {length}"
            )
        if not 0 <= named <= 1 or min(empty, pairs) < 0 or empty + pairs > 1:
            raise ValueError(
                f"named, empty and pairs are shares, the last two of the same panels, got named {named}, "
                f"empty {empty}, pairs {pairs}"
            )
        self.cast, self.size = cast, size
        self._encode = encode
        self._seed, self._split = seed, split
        self._panels, self._length = panels, length
        self._named, self._empty, self._pairs = named, empty, pairs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        panels = self.panels(index)
        rng = scene_rng(self._seed, index, self._split, "places of a story")
        return {
            "images": np.stack([compose_panel(self.cast, panel, rng, self.size) for panel in panels]),
            "tokens": np.stack([np.asarray(self._encode(panel.caption), np.int32) for panel in panels]),
        }

    def panels(self, index: int) -> tuple[Panel, ...]:
        """What the panels of a story show, without drawing them."""
        if not 0 <= index < self._length:
            raise IndexError(f"story {index} does not exist, there are {self._length}")
        rng = scene_rng(self._seed, index, self._split, "story")
        character = int(rng.integers(len(self.cast)))
        is_named = bool(rng.random() < self._named)
        poses = _dealt(rng, tuple(self.cast.poses[character]), self._panels)
        places = _dealt(rng, PLACES, self._panels)
        return tuple(
            self._panel(rng, character, pose, place, is_named) for pose, place in zip(poses, places, strict=True)
        )

    def _panel(self, rng: np.random.Generator, character: int, pose: str, place: str, is_named: bool) -> Panel:
        kind = rng.random()
        if kind < self._empty:
            return Panel((), "", (), (), (), place, story_wording.empty_caption(rng, place))
        who = self.cast.names[character] if is_named else None
        others = [number for number, poses in enumerate(self.cast.poses) if pose in poses and number != character]
        if kind < self._empty + self._pairs and others:
            other = others[int(rng.integers(len(others)))]
            caption = story_wording.pair_caption(rng, who, self.cast.names[other], pose, place)
            return plan_panel(rng, self.cast, (character, other), pose, place, caption)
        caption = story_wording.caption(rng, who, pose, place)
        return plan_panel(rng, self.cast, (character,), pose, place, caption)


def plan_panel(
    rng: np.random.Generator, cast: Cast, characters: Sequence[int], pose: str, place: str, caption: str
) -> Panel:
    """Chooses frames, sizes and positions of one or two characters that share a pose.

    Raises:
      ValueError: not one or two characters, or one that does not have the pose.
    """
    if len(characters) not in (1, 2):
        raise ValueError(f"a panel is planned for one or two characters, got {len(characters)}")
    lacking = [cast.names[number] for number in characters if pose not in cast.poses[number]]
    if lacking:
        raise ValueError(f"{lacking[0]!r} has no frame of the pose {pose!r}")
    height = _HEIGHT if len(characters) == 1 else _PAIR_HEIGHT
    raised = CELL * _RAISED.get(pose, 0)
    # A pair shares the width; either one may be on the left.
    places = ((0.0, 1.0),) if len(characters) == 1 else ((0.0, 0.52), (0.48, 1.0))[:: rng.choice((-1, 1))]
    frames, flips, boxes = [], [], []
    for character, (left, right) in zip(characters, places, strict=True):
        choice = cast.poses[character][pose]
        frames.append(choice[int(rng.integers(len(choice)))])
        flips.append(bool(rng.random() < 0.5))
        cut_out = _cut_out(cast, character, frames[-1])
        boxes.append(_box(cut_out, height / cast.height, left, right, _GROUND - raised))
    return Panel(tuple(characters), pose, tuple(frames), tuple(flips), tuple(boxes), place, caption)


def _box(cut_out: Image.Image, scale: float, left: float, right: float, feet: float) -> Box:
    """Where a cut-out goes between two vertical lines, its feet at a height; made smaller where it would not fit."""
    left, right = left + _EDGE, right - _EDGE
    scale = min(scale, (right - left) / cut_out.width, (1 - 2 * _EDGE) / cut_out.height)
    width, height = scale * cut_out.width, scale * cut_out.height
    feet = max(feet, height + _EDGE)  # a tall one that jumps stays inside the panel
    middle = (left + right) / 2
    centre = CELL * round(middle / CELL)
    if not left + width / 2 <= centre <= right - width / 2:
        centre = middle
    return centre - width / 2, feet - height, centre + width / 2, feet


def _dealt(rng: np.random.Generator, choices: Sequence[str], count: int) -> list[str]:
    """Random choices, none of which comes again before all have come."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += [choices[number] for number in rng.permutation(len(choices))]
    return dealt[:count]


def labelled_panels(
    cast: Cast, count: int, seed: int, split: str, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Panels of one character each, to fit and to check classifiers on: every character, pose and place alike often.

    Args:
      cast: the characters.
      count: number of panels N.
      seed, split: the panels are a function of them; those of "train" and "test" are different.
      size: side S in pixels.

    Returns:
      images uint8 [N, S, S, 3], and int32 [N] each: characters (numbers in the cast), poses (numbers in
      ``cast.pose_words``), places (numbers in ``PLACES``).

    Raises:
      ValueError: unknown split, or a size, a seed or a count out of range.
    """
    if split not in STORY_SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(STORY_SPLITS)}")
    if count < 1:
        raise ValueError(f"at least one panel must be asked for, got {count}")
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty((3, count), np.int32)
    for index in range(count):
        rng = scene_rng(seed, index, split, "labelled panel")
        character, place = int(rng.integers(len(cast))), int(rng.integers(len(PLACES)))
        words = tuple(cast.poses[character])
        pose = words[int(rng.integers(len(words)))]
        caption = story_wording.plain_caption(cast.names[character], pose, PLACES[place])
        panel = plan_panel(rng, cast, (character,), pose, PLACES[place], caption)
        images[index] = compose_panel(cast, panel, rng, size)
        labels[:, index] = character, cast.pose_words.index(pose), place
    return images, labels[0], labels[1], labels[2]
