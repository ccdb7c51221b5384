"""Composes scenes of 2 to 6 named objects with visible-instance masks; scene i of a seed is always the same picture."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Literal, get_args

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.backgrounds import draw_background
from pixelstory_jax.data.builtin.things import Thing, ThingLibrary, builtin_library

Split = Literal["train", "test", "unseen"]
SPLITS: tuple[str, ...] = get_args(Split)

MIN_VISIBLE_SHARE = 0.6
MIN_VISIBLE_PIXELS = 60  # at a canvas of 128 pixels; grows with the area of the canvas
_COUNT_WEIGHTS = (0.2, 0.26, 0.24, 0.18, 0.12)  # 2, 3, 4, 5, 6 objects
# Long side of an object as a share of the canvas, for 2, 3, 4, 5, 6 objects.
_SIZE_RANGES = ((0.34, 0.60), (0.30, 0.56), (0.27, 0.48), (0.25, 0.42), (0.25, 0.38))
_PLACEMENTS = 24


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture with the true visible masks of its objects.

    image uint8 [H, W, 3]; masks bool [M, H, W], disjoint; boxes float32 [M, 4] as x0, y0, x1, y1 of the visible part
    with the end excluded; things: one row of the table an object, in drawing order (later ones lie on top).
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    things: tuple[Thing, ...]

    @property
    def areas(self) -> np.ndarray:
        """Visible pixels of each object, int64 [M]."""
        return self.masks.sum((1, 2))

    @property
    def centres(self) -> np.ndarray:
        """Box centres x, y in pixels, float32 [M, 2]."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)


@dataclasses.dataclass(frozen=True)
class _Placed:
    thing: Thing
    colour: np.ndarray  # uint8 [h, w, 3], premultiplied
    alpha: np.ndarray  # uint8 [h, w]
    left: int
    top: int

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.alpha.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def scene_rng(seed: int, index: int, split: str, stream: str = "scene") -> np.random.Generator:
    """The random stream of example ``index``: other streams and splits are independent of it.

    Raises:
      ValueError: unknown split, or a negative seed or index.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got seed {seed}, index {index}")
    return np.random.default_rng(
        np.random.SeedSequence((seed, SPLITS.index(split), index, zlib.crc32(stream.encode())))
    )


def compose(seed: int, index: int, split: str, *, size: int = 128, library: ThingLibrary | None = None) -> Scene:
    """Makes scene number ``index``.

    Args:
      seed: of the whole data set, non-negative.
      index: of the scene, non-negative.
      split: "train" and "test" show trained names, over other backgrounds in half of the test scenes; every "unseen"
        scene has at least one never-trained name.
      size: long side of the picture in pixels, at least 32.
      library: the things to draw from; the embedded ones by default.

    Raises:
      ValueError: an argument is out of range.
    """
    if size < 32:
        raise ValueError(f"a scene needs a long side of at least 32 pixels, got {size}")
    library = library or builtin_library()
    rng = scene_rng(seed, index, split)
    height, width = _canvas(rng, size)
    background = draw_background(rng, height, width, held_out=split != "train" and rng.random() < 0.5)
    wanted = _choose(rng, library, split)
    placed = _place(rng, library, wanted, height, width, size)
    image = np.array(background)
    for item in placed:
        _paste(image, item)
    masks = _visible(placed, height, width)
    if rng.random() < 0.3:
        noise = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(image, masks, boxes_of(masks), tuple(item.thing for item in placed))


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Boxes x0, y0, x1, y1 (end excluded) of non-empty masks bool [M, H, W], float32 [M, 4]."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for number, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[number] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _canvas(rng: np.random.Generator, size: int) -> tuple[int, int]:
    if rng.random() >= 0.3:
        return size, size
    short = int(round(size * rng.uniform(0.7, 1.0)))
    return (short, size) if rng.random() < 0.5 else (size, short)


def _choose(rng: np.random.Generator, library: ThingLibrary, split: str) -> list[int]:
    """Library indices of the objects; no two names of one family, sometimes two instances of one name."""
    trained, unseen = library.pool("train"), library.pool("unseen")
    count = 2 + int(rng.choice(5, p=_COUNT_WEIGHTS))
    chosen: list[int] = []
    needed = 1 + int(rng.integers(0, 2)) if split == "unseen" else 0
    group = _shared_group(rng, library, trained)
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        pool = unseen if len(chosen) < needed else trained
        if not chosen and split != "unseen" or len(chosen) == 1:
            pool = tuple(number for number in pool if number in group) or pool
        candidate = int(pool[rng.integers(len(pool))])
        if not any(library.things[candidate].confusable(library.things[other]) for other in chosen):
            chosen.append(candidate)
    single = [place for place, number in enumerate(chosen) if library.things[number].number == "count"]
    if single and len(chosen) > 2 and rng.random() < 0.15:
        source = single[rng.integers(len(single))]
        # Overwrites another object, so that an unseen scene keeps its never-trained name.
        places = [place for place in range(len(chosen)) if place >= max(needed, 1) and place != source]
        chosen[places[rng.integers(len(places))] if places else -1] = chosen[source]
    order = rng.permutation(len(chosen))
    return [chosen[place] for place in order]


def _shared_group(rng: np.random.Generator, library: ThingLibrary, pool: tuple[int, ...]) -> frozenset[int]:
    """In half of the scenes the first two objects share a category, so that category questions have rich answers."""
    if rng.random() < 0.5:
        return frozenset()
    category = library.things[pool[rng.integers(len(pool))]].category
    return frozenset(number for number, thing in enumerate(library.things) if thing.category == category)


def _place(
    rng: np.random.Generator, library: ThingLibrary, wanted: list[int], height: int, width: int, size: int
) -> list[_Placed]:
    """Puts the objects down one after the other where every one stays visible enough."""
    low, high = _SIZE_RANGES[min(len(wanted), 6) - 2]
    floor = max(20, MIN_VISIBLE_PIXELS * size * size // 128**2)
    placed: list[_Placed] = []
    owner = np.full((height, width), -1, np.int8)
    totals: list[int] = []
    for number in wanted:
        for attempt in range(_PLACEMENTS):
            if attempt % 6 == 0:  # A new size and pose once in a while; later ones are smaller.
                shrink = 1 - 0.1 * (attempt // 6)
                colour, alpha = _pose(rng, library, number, rng.uniform(low, high) * shrink * size, height, width)
            top = int(rng.integers(0, height - alpha.shape[0] + 1))
            left = int(rng.integers(0, width - alpha.shape[1] + 1))
            item = _Placed(library.things[number], colour, alpha, left, top)
            opaque = alpha > 127
            under = owner[item.window][opaque]
            hidden = np.bincount(under[under >= 0], minlength=len(placed))
            total = int(np.count_nonzero(opaque))
            enough = all(
                left_over >= floor and left_over >= MIN_VISIBLE_SHARE * whole
                for left_over, whole in zip(_remaining(owner, len(placed)) - hidden, totals, strict=True)
            )
            # Most placements that hide much of another object are turned down, but not all: overlap is wanted.
            if enough and total >= floor and (under.max(initial=-1) < 0 or rng.random() < 0.25):
                owner[item.window][opaque] = len(placed)
                placed.append(item)
                totals.append(total)
                break
    return placed


def _remaining(owner: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owner.ravel() + 1, minlength=count + 1)[1:]


def _pose(
    rng: np.random.Generator, library: ThingLibrary, number: int, long_side: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scales, flips, rotates and lights a sprite; premultiplied colour [h, w, 3] and alpha [h, w], uint8."""
    sprite = library.sprite(number)
    flipped = -1.0 if rng.random() < 0.5 else 1.0
    angle = math.radians(rng.uniform(-30, 30) if rng.random() < 0.85 else rng.uniform(-180, 180))
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    scale = long_side / max(sprite.size)
    w, h = sprite.width * scale, sprite.height * scale
    # The rotated box must fit the canvas.
    fit = min(1.0, (width - 1) / (w * cosine + h * sine), (height - 1) / (w * sine + h * cosine))
    scale, w, h = scale * fit, w * fit, h * fit
    out_w, out_h = max(4, math.ceil(w * cosine + h * sine)), max(4, math.ceil(w * sine + h * cosine))
    # Shrinking by more than a half first is done by a box filter: the affine step samples only 4 pixels.
    if scale < 0.6:
        sprite = sprite.reduce(2)
        scale *= 2
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y = sprite.width / 2, sprite.height / 2
    matrix = (
        flipped * c,
        flipped * s,
        centre_x - flipped * (c * out_w / 2 + s * out_h / 2),
        -s,
        c,
        centre_y + s * out_w / 2 - c * out_h / 2,
    )
    drawn = np.asarray(sprite.transform((out_w, out_h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    colour, alpha = _light(rng, drawn[..., :3], drawn[..., 3]), drawn[..., 3]
    rows, columns = np.flatnonzero((alpha > 8).any(1)), np.flatnonzero((alpha > 8).any(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return colour[window], alpha[window]


def _light(rng: np.random.Generator, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Brightness and contrast that keep the hue; colour stays at or below alpha, as premultiplied colour must."""
    gain = int(256 * rng.uniform(0.78, 1.18))
    lift = int(256 * rng.uniform(-0.06, 0.10))
    changed = (colour.astype(np.int32) * gain + alpha[..., None].astype(np.int32) * lift) >> 8
    return np.clip(changed, 0, alpha[..., None]).astype(np.uint8)


def _paste(image: np.ndarray, item: _Placed) -> None:
    window = image[item.window]
    kept = window.astype(np.uint16) * (255 - item.alpha[..., None].astype(np.uint16))
    window[...] = np.minimum(255, item.colour.astype(np.uint16) + (kept + 127) // 255)


def _visible(placed: list[_Placed], height: int, width: int) -> np.ndarray:
    masks = np.zeros((len(placed), height, width), bool)
    for number, item in enumerate(placed):
        opaque = item.alpha > 127
        masks[:number, item.window[0], item.window[1]] &= ~opaque
        masks[number][item.window] = opaque
    return masks
