"""Places of the stories, drawn anew for every panel in a flat, friendly style: NumPy and Pillow only.

All coordinates are shares of the picture's side, x to the right and y down. Pictures are drawn larger than wanted and
averaged down, so that edges are smooth. Colours are given as in style sheets and vary a little from picture to picture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

MIN_SIZE, MAX_SIZE = 32, 1024
Point = tuple[float, float]
Colour = tuple[int, ...]


def draw_place(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """A picture of a place without anybody, uint8 [size, size, 3].

    Args:
      name: one of ``PLACES``.
      rng: decides colours, positions and counts.
      size: side in pixels.

    Raises:
      ValueError: unknown place, or a size out of range.
    """
    if name not in _PAINTERS:
        raise ValueError(f"unknown place {name!r}, expected one of {', '.join(PLACES)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"the side of a place must be {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    factor = 3 if size <= 160 else 2
    brush = _Brush(rng, size * factor)
    _PAINTERS[name](brush)
    return np.asarray(brush.image.reduce(factor))


@functools.cache
def _channels(colour: str) -> Colour:
    return ImageColor.getrgb(colour)


class _Brush:
    """Draws in shares of the side, with the colours of one picture shifted by a common tint."""

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self.rng, self.side = rng, side
        self.image = Image.new("RGB", (side, side))
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        self._tint = rng.uniform(-10, 10, 3)

    def among(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def colour(self, name: str, opacity: float = 1.0) -> Colour:
        """The colour, tinted and a little lighter or darker; drawn over what is there where not opaque."""
        light = self.among(-5, 5)
        channels = (
            max(0, min(255, round(base + shift + light)))
            for base, shift in zip(_channels(name), self._tint, strict=True)
        )
        return (*channels, round(255 * opacity))

    def gradient(self, top: str, bottom: str, y0: float = 0.0, y1: float = 1.0) -> None:
        """A band over the whole width that passes from one colour to another."""
        start, end = round(y0 * self.side), round(y1 * self.side)
        ends = np.array([self.colour(top)[:3], self.colour(bottom)[:3]], np.float32)
        share = np.linspace(0, 1, end - start, dtype=np.float32)[:, None]
        column = (ends[0] * (1 - share) + ends[1] * share).astype(np.uint8)[:, None]
        band = Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (end - start, self.side, 3))))
        self.image.paste(band, (0, start))

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        side = self.side
        self._draw.polygon([(x * side, y * side) for x, y in points], fill=colour)

    def oval(self, x: float, y: float, across: float, down: float, colour: Colour) -> None:
        """An ellipse by its centre and its two radii."""
        side = self.side
        self._draw.ellipse(((x - across) * side, (y - down) * side, (x + across) * side, (y + down) * side), colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        self.oval(x, y, radius, radius, colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, round_by: float = 0.0) -> None:
        side = self.side
        left, top = x0 * side, y0 * side
        corners = (left, top, max(left, x1 * side - 1), max(top, y1 * side - 1))  # Pillow draws the end as well
        if round_by:
            self._draw.rounded_rectangle(corners, round_by * side, colour)
        else:
            self._draw.rectangle(corners, colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        side = self.side
        self._draw.line([(x * side, y * side) for x, y in points], colour, max(1, round(width * side)), joint="curve")

    def half_disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """The upper half of a disc."""
        side = self.side
        corners = ((x - radius) * side, (y - radius) * side, (x + radius) * side, (y + radius) * side)
        self._draw.pieslice(corners, 180, 360, colour)

    def curve(self, level: float, swing: float, bends: int) -> list[Point]:
        """A rolling line around height ``level`` from the left to the right edge."""
        heights = level + swing * self.rng.uniform(-1, 1, bends + 2)
        position = np.linspace(0, bends, 8 * bends + 1)
        first = position.astype(int)
        share = position - first
        share = share * share * (3 - 2 * share)
        line = heights[first] * (1 - share) + heights[first + 1] * share
        return list(zip((position / bends).tolist(), line.tolist(), strict=True))

    def below(self, line: Sequence[Point], colour: Colour) -> None:
        """Fills everything below a line over the whole width."""
        self.polygon([(0, 1), *line, (1, 1)], colour)

    def ridge(self, level: float, swing: float, colour: Colour, bends: int = 3) -> None:
        """Fills everything below a new rolling line around height ``level``."""
        self.below(self.curve(level, swing, bends), colour)

    def jagged(self, level: float, swing: float, colour: Colour, teeth: int, below: bool = True) -> None:
        """Fills everything below (or above) a line of sharp teeth."""
        edge = 1.0 if below else 0.0
        points: list[Point] = [(0, edge)]
        for number in range(2 * teeth + 1):
            tip = swing * self.among(0.5, 1.0) if number % 2 else swing * self.among(0.0, 0.3)
            x = number / (2 * teeth) + (self.among(-0.2, 0.2) / teeth if 0 < number < 2 * teeth else 0)
            points.append((x, level - tip if below else level + tip))
        self.polygon([*points, (1, edge)], colour)


def _glow(brush: _Brush, x: float, y: float, radius: float, colour: str) -> None:
    """A disc with two soft rings around it."""
    brush.disc(x, y, radius * 1.9, brush.colour(colour, 0.14))
    brush.disc(x, y, radius * 1.4, brush.colour(colour, 0.26))
    brush.disc(x, y, radius, brush.colour(colour))


def _cloud(brush: _Brush, x: float, y: float, width: float, colour: Colour) -> None:
    height = width * 0.3
    brush.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, colour, height / 2)
    brush.disc(x - width * 0.14, y - height * 0.5, width * 0.19, colour)
    brush.disc(x + width * 0.16, y - height * 0.3, width * 0.14, colour)


def _clouds(brush: _Brush, low: int, high: int, colour: str = "#ffffff") -> None:
    for _ in range(brush.count(low, high)):
        _cloud(brush, brush.among(0, 1), brush.among(0.07, 0.3), brush.among(0.16, 0.3), brush.colour(colour))


def _either_side(brush: _Brush, margin: float = 0.2) -> float:
    """A position near the left or the right edge, where the characters leave room."""
    x = brush.among(0.02, margin)
    return x if brush.chance(0.5) else 1 - x


def _tufts(brush: _Brush, low: int, high: int, colour: str) -> None:
    for _ in range(brush.count(low, high)):
        x, y = brush.among(0, 1), brush.among(0.84, 0.98)
        shade = brush.colour(colour)
        for lean in (-0.018, 0.0, 0.018):
            brush.polygon([(x - 0.008, y), (x + 0.008, y), (x + lean, y - 0.035)], shade)


def _fir(brush: _Brush, x: float, y: float, height: float, colour: str, snow: bool = False) -> None:
    """A conifer that stands at (x, y)."""
    brush.box(x - height * 0.05, y - height * 0.2, x + height * 0.05, y, brush.colour("#7a5238"))
    light, dark = brush.colour(colour), brush.colour("#16303a", 0.16)
    for tier in range(3):
        bottom = y - height * (0.12 + 0.25 * tier)
        top, half = bottom - height * 0.42, height * (0.27 - 0.055 * tier)
        brush.polygon([(x - half, bottom), (x, top), (x + half, bottom)], light)
        brush.polygon([(x, bottom), (x, top), (x + half, bottom)], dark)
        if snow:
            edge = top + (bottom - top) * 0.45
            brush.polygon([(x - half * 0.45, edge), (x, top), (x + half * 0.45, edge)], brush.colour("#f4faff"))


def _tree(brush: _Brush, x: float, y: float, height: float, colour: str) -> None:
    """A tree with a round crown that stands at (x, y)."""
    brush.box(x - height * 0.06, y - height * 0.5, x + height * 0.06, y, brush.colour("#8a5a3b"))
    crown = brush.colour(colour)
    brush.disc(x - height * 0.17, y - height * 0.55, height * 0.19, crown)
    brush.disc(x + height * 0.17, y - height * 0.55, height * 0.19, crown)
    brush.disc(x, y - height * 0.72, height * 0.26, crown)
    brush.disc(x - height * 0.07, y - height * 0.78, height * 0.12, brush.colour("#ffffff", 0.14))


def _peak(brush: _Brush, x: float, top: float, half: float, base: float, colour: str, cap: str) -> None:
    """A mountain lit from the left, with a zigzag cap."""
    brush.polygon([(x - half, base), (x, top), (x + half, base)], brush.colour(colour))
    brush.polygon([(x, top), (x + half, base), (x + half * 0.1, base)], brush.colour("#223355", 0.15))
    height = (base - top) * brush.among(0.36, 0.48)
    width = half * height / (base - top)
    low = top + height
    zigzag = [(x + width, low), (x + width * 0.45, low - height * 0.3), (x + width * 0.1, low + height * 0.1)]
    zigzag += [(x - width * 0.35, low - height * 0.28), (x - width, low)]
    brush.polygon([(x, top), *zigzag], brush.colour(cap))


def _star(brush: _Brush, x: float, y: float, radius: float, colour: Colour) -> None:
    brush.polygon([(x - radius, y), (x, y - radius * 0.25), (x + radius, y), (x, y + radius * 0.25)], colour)
    brush.polygon([(x, y - radius), (x - radius * 0.25, y), (x, y + radius), (x + radius * 0.25, y)], colour)


def _stars(brush: _Brush, count: int, until: float) -> None:
    for _ in range(count):
        shade = brush.colour("#fff7d6")
        x, y = brush.among(0, 1), brush.among(0, until)
        if brush.chance(0.25):
            _star(brush, x, y, brush.among(0.018, 0.028), shade)
        else:
            brush.disc(x, y, brush.among(0.004, 0.008), shade)


def _palm(brush: _Brush, x: float, y: float, height: float) -> None:
    lean = height * (0.16 if x < 0.5 else -0.16)
    top_x, top_y = x + lean, y - height
    for part in range(7):
        low, high = part / 7, (part + 1) / 7
        x0, x1 = x + lean * low * low, x + lean * high * high
        y0, y1 = y - height * low, y - height * high
        shade = brush.colour("#a9713f" if part % 2 else "#96613a")
        brush.polygon([(x0 - 0.022, y0), (x1 - 0.018, y1), (x1 + 0.018, y1), (x0 + 0.022, y0)], shade)
    for number, angle in enumerate((-2.9, -2.3, -0.85, -0.25, 0.35, 2.8)):
        reach = height * brush.among(0.38, 0.46)
        tip = (top_x + reach * math.cos(angle), top_y + reach * (0.75 * math.sin(angle) + 0.22))
        middle = (top_x + reach * 0.55 * math.cos(angle), top_y + reach * (0.6 * math.sin(angle) - 0.16))
        inner = (middle[0], middle[1] + 0.055)
        brush.polygon([(top_x, top_y), middle, tip, inner], brush.colour("#3f9f5b" if number % 2 else "#57b368"))
    brush.disc(top_x + 0.015, top_y + 0.02, 0.017, brush.colour("#7a4a2c"))


def _beach(brush: _Brush) -> None:
    brush.gradient("#7fcdf2", "#d5f1fa", 0, 0.56)
    _glow(brush, brush.among(0.1, 0.9), brush.among(0.12, 0.2), 0.075, "#ffe27a")
    _clouds(brush, 1, 2)
    sea = brush.among(0.5, 0.55)
    brush.gradient("#1f97c4", "#58cbd6", sea, 0.8)
    if brush.chance(0.5):
        x, y = brush.among(0.1, 0.9), sea + 0.01
        brush.polygon(
            [(x - 0.07, y), (x + 0.07, y), (x + 0.045, y + 0.035), (x - 0.045, y + 0.035)], brush.colour("#c9543f")
        )
        brush.polygon([(x - 0.005, y - 0.01), (x - 0.005, y - 0.15), (x - 0.065, y - 0.01)], brush.colour("#fdf6e6"))
        brush.polygon([(x + 0.01, y - 0.01), (x + 0.01, y - 0.12), (x + 0.055, y - 0.01)], brush.colour("#f2d9b0"))
    for _ in range(brush.count(4, 7)):
        x, y = brush.among(0, 1), brush.among(sea + 0.04, 0.7)
        brush.line([(x - 0.04, y), (x + 0.04, y)], 0.011, brush.colour("#e9fbff", 0.7))
    shore = brush.curve(brush.among(0.72, 0.77), 0.02, 3)
    for offset, shade in ((-0.025, "#ffffff"), (0.0, "#e2c184"), (0.03, "#f7e2a8")):  # foam, wet sand, dry sand
        brush.below([(x, y + offset) for x, y in shore], brush.colour(shade))
    if brush.chance(0.75):
        _palm(brush, _either_side(brush, 0.1), brush.among(0.84, 0.9), brush.among(0.5, 0.62))
    else:
        x, y = _either_side(brush, 0.2), 0.86
        brush.line([(x, y), (x, y - 0.4)], 0.016, brush.colour("#f5f0e6"))
        brush.half_disc(x, y - 0.33, 0.2, brush.colour("#e8604c"))
        brush.half_disc(x, y - 0.33, 0.075, brush.colour("#fdf3e3"))
    for _ in range(brush.count(3, 7)):
        brush.oval(brush.among(0, 1), brush.among(0.85, 0.98), 0.014, 0.008, brush.colour("#dcbd7c"))
    if brush.chance(0.6):
        x, y = brush.among(0.1, 0.9), brush.among(0.93, 0.97)
        _star(brush, x, y, 0.035, brush.colour("#ef8354"))
        brush.disc(x, y, 0.013, brush.colour("#ef8354"))


def _forest(brush: _Brush) -> None:
    brush.gradient("#d3efb0", "#8fcf8a")
    for _ in range(brush.count(6, 9)):
        x, width = brush.among(0, 1), brush.among(0.02, 0.035)
        brush.box(x - width, 0, x + width, 0.8, brush.colour("#86bd80"))
    brush.ridge(0.68, 0.03, brush.colour("#6db56c"), 5)
    for slot in (0.02, 0.2, 0.42, 0.62, 0.82, 0.98):
        if not brush.chance(0.8):
            continue
        x, y, width = slot + brush.among(-0.06, 0.06), brush.among(0.76, 0.84), brush.among(0.032, 0.055)
        bark = brush.colour("#80543a")
        roots = [(x + width * 1.7, y), (x - width * 1.7, y)]
        brush.polygon([*roots, (x - width, y - 0.12), (x - width, 0), (x + width, 0), (x + width, y - 0.12)], bark)
        brush.box(x + width * 0.25, 0, x + width, y - 0.03, brush.colour("#3c2417", 0.22))
    for shade, level, radius in (("#2f7d4b", 0.1, 0.13), ("#3d9557", 0.03, 0.12)):
        for number in range(7):
            x = number / 6 + brush.among(-0.05, 0.05)
            brush.disc(x, level + brush.among(-0.03, 0.05), radius * brush.among(0.8, 1.15), brush.colour(shade))
    brush.ridge(0.82, 0.02, brush.colour("#4f9f55"), 4)
    for _ in range(brush.count(1, 3)):
        x, leaves = _either_side(brush, 0.3), brush.colour("#37864d")
        for lean in (-0.06, 0.0, 0.06):
            brush.disc(x + lean, 0.84 - (0.03 if lean == 0 else 0), 0.06, leaves)
    _tufts(brush, 4, 8, "#3b8a4a")
    for _ in range(brush.count(0, 3)):
        x, y = brush.among(0.05, 0.95), brush.among(0.9, 0.98)
        brush.box(x - 0.009, y - 0.03, x + 0.009, y, brush.colour("#f6ead2"))
        cap = [(x - 0.032, y - 0.025), (x - 0.018, y - 0.05), (x + 0.018, y - 0.05), (x + 0.032, y - 0.025)]
        brush.polygon(cap, brush.colour("#d9483b"))


def _cactus(brush: _Brush, x: float, y: float, height: float) -> None:
    green, width = brush.colour("#4f9d5d"), height * 0.13
    brush.box(x - width, y - height, x + width, y, green, width)
    for side, level in ((-1, 0.45), (1, 0.6)):
        elbow, arm = x + side * height * 0.33, width * 0.75
        low = y - height * level
        brush.box(min(x, elbow) - arm, low - arm, max(x, elbow) + arm, low + arm, green, arm)
        brush.box(elbow - arm, low - height * 0.32, elbow + arm, low + arm, green, arm)
    brush.box(
        x + width * 0.2, y - height * 0.93, x + width * 0.55, y - 0.02, brush.colour("#2f7446", 0.5), width * 0.15
    )


def _desert(brush: _Brush) -> None:
    brush.gradient("#f8b15c", "#fde6ae", 0, 0.7)
    _glow(brush, brush.among(0.15, 0.85), brush.among(0.16, 0.3), brush.among(0.09, 0.12), "#fff3c4")
    for _ in range(brush.count(1, 2)):
        x, top, half = _either_side(brush, 0.32), brush.among(0.36, 0.46), brush.among(0.1, 0.17)
        rock = [(x - half * 1.25, 0.7), (x - half, top), (x + half, top), (x + half * 1.25, 0.7)]
        brush.polygon(rock, brush.colour("#cf6f45"))
        brush.polygon([(x + half * 0.3, 0.7), (x + half * 0.4, top), *rock[2:]], brush.colour("#7a2f22", 0.22))
        brush.box(x - half * 1.05, top + 0.06, x + half * 1.05, top + 0.085, brush.colour("#e69462", 0.8))
    brush.ridge(0.62, 0.035, brush.colour("#eab667"), 3)
    brush.ridge(0.71, 0.04, brush.colour("#e0a152"), 2)
    for _ in range(brush.count(1, 3)):
        _cactus(brush, _either_side(brush, 0.26), brush.among(0.74, 0.86), brush.among(0.2, 0.42))
    brush.ridge(0.84, 0.025, brush.colour("#efc174"), 2)
    for _ in range(brush.count(2, 4)):
        x, y = brush.among(0.1, 0.9), brush.among(0.88, 0.97)
        brush.line([(x - 0.07, y), (x, y - 0.012), (x + 0.07, y)], 0.009, brush.colour("#d39a4d"))


def _mountains(brush: _Brush) -> None:
    brush.gradient("#a9d4f5", "#eef7fd", 0, 0.75)
    _clouds(brush, 0, 2)
    for x in (0.1, 0.85):
        x += brush.among(-0.15, 0.15)
        _peak(brush, x, brush.among(0.2, 0.34), brush.among(0.3, 0.4), 0.78, "#a9bbd6", "#f4f9ff")
    x = brush.among(0.25, 0.75)
    _peak(brush, x, brush.among(0.07, 0.18), brush.among(0.36, 0.46), 0.8, "#7f93b8", "#ffffff")
    brush.ridge(0.72, 0.03, brush.colour("#dbe9f6"), 3)
    for _ in range(brush.count(2, 5)):
        _fir(brush, _either_side(brush, 0.34), brush.among(0.76, 0.86), brush.among(0.2, 0.36), "#3f7f78", snow=True)
    brush.ridge(0.84, 0.02, brush.colour("#f7fbff"), 3)
    for _ in range(brush.count(2, 4)):
        brush.oval(brush.among(0, 1), brush.among(0.9, 0.98), 0.06, 0.01, brush.colour("#cfe0f1", 0.8))
    if brush.chance(0.4):
        for _ in range(brush.count(12, 24)):
            brush.disc(brush.among(0, 1), brush.among(0, 0.8), brush.among(0.006, 0.011), brush.colour("#ffffff"))


def _city(brush: _Brush) -> None:
    brush.gradient("#f6c8c3", "#fdeedd", 0, 0.8)
    _clouds(brush, 0, 1, "#fff8f3")
    for number in range(7):
        x, top = number / 6 + brush.among(-0.04, 0.04), brush.among(0.2, 0.5)
        brush.box(x - 0.09, top, x + 0.09, 0.8, brush.colour("#e2b4b8"))
    x = brush.among(-0.12, 0.0)
    walls = brush.rng.permutation(["#b5655a", "#7d89a8", "#c98f5d", "#8c6f8e", "#6f9092", "#a0606d"])
    for wall in walls.tolist():
        width = brush.among(0.18, 0.26)
        _building(brush, x, brush.among(0.1, 0.46), width, wall)
        x += width + brush.among(0.0, 0.03)
    brush.box(0, 0.78, 1, 0.86, brush.colour("#c9c3c4"))
    brush.box(0, 0.845, 1, 0.86, brush.colour("#a39da3"))
    brush.box(0, 0.86, 1, 1, brush.colour("#6c6a78"))
    start = brush.among(-0.2, 0)
    for number in range(5):
        left = start + 0.27 * number
        brush.box(left, 0.935, left + 0.14, 0.953, brush.colour("#f4e7b5"))
    x = _either_side(brush, 0.16)
    if brush.chance(0.5):
        _tree(brush, x, 0.83, brush.among(0.34, 0.42), "#6aa66a")
    else:
        post = brush.colour("#44445a")
        brush.line([(x, 0.84), (x, 0.4), (x + (0.09 if x < 0.5 else -0.09), 0.4)], 0.017, post)
        _glow(brush, x + (0.09 if x < 0.5 else -0.09), 0.42, 0.024, "#ffeaa0")


def _building(brush: _Brush, x: float, top: float, width: float, wall: str) -> None:
    """A house front from its left edge, with rows of windows."""
    brush.box(x, top, x + width, 0.8, brush.colour(wall))
    brush.box(x - 0.008, top, x + width + 0.008, top + 0.025, brush.colour("#3a3048", 0.3))
    columns = 2 if width < 0.22 else 3
    lit, dark = brush.colour("#ffe9a8"), brush.colour("#4b5670")
    pitch = width / columns
    y = top + 0.06
    while y < 0.68:
        for column in range(columns):
            left = x + pitch * (column + 0.25)
            brush.box(left, y, left + pitch * 0.5, y + 0.055, lit if brush.chance(0.4) else dark)
        y += 0.1


def _hill(brush: _Brush) -> None:
    brush.gradient("#141b4d", "#4a4f9c", 0, 0.8)
    _stars(brush, brush.count(22, 36), 0.6)
    x, y, radius = brush.among(0.12, 0.88), brush.among(0.14, 0.24), brush.among(0.08, 0.105)
    _glow(brush, x, y, radius, "#fdf3c0")
    for _ in range(3):
        dx, dy = brush.among(-0.5, 0.5), brush.among(-0.5, 0.5)
        brush.disc(x + dx * radius, y + dy * radius, radius * 0.17, brush.colour("#d9cf97", 0.7))
    brush.ridge(0.62, 0.05, brush.colour("#333a80"), 3)
    for _ in range(brush.count(3, 6)):
        _fir(brush, brush.among(0, 1), brush.among(0.7, 0.76), brush.among(0.14, 0.24), "#27406b")
    brush.ridge(0.74, 0.03, brush.colour("#2a4a72"), 2)
    if brush.chance(0.6):
        _cottage(brush, _either_side(brush, 0.22), brush.among(0.78, 0.82))
    brush.ridge(0.84, 0.02, brush.colour("#2f6270"), 2)
    _tufts(brush, 5, 9, "#244f60")


def _cottage(brush: _Brush, x: float, y: float) -> None:
    brush.box(x - 0.085, y - 0.11, x + 0.085, y, brush.colour("#6b5a86"))
    brush.polygon([(x - 0.11, y - 0.105), (x, y - 0.2), (x + 0.11, y - 0.105)], brush.colour("#47396a"))
    brush.box(x - 0.055, y - 0.085, x - 0.01, y - 0.04, brush.colour("#ffdf86"))
    brush.box(x + 0.02, y - 0.08, x + 0.058, y, brush.colour("#3b2f57"))


def _cave(brush: _Brush) -> None:
    brush.gradient("#3a2a30", "#5b4238")
    x, y = brush.among(0.3, 0.7), brush.among(0.46, 0.54)
    for scale, shade in ((1.0, "#6f5145"), (0.78, "#8a6650")):
        brush.oval(x, y, 0.42 * scale, 0.34 * scale, brush.colour(shade))
    if brush.chance(0.65):  # the way out
        brush.oval(x, y + 0.04, 0.15, 0.19, brush.colour("#f5d99a"))
        brush.oval(x, y + 0.06, 0.12, 0.16, brush.colour("#fdf0c8"))
    brush.jagged(0.08, 0.26, brush.colour("#4a352f"), brush.count(5, 7), below=False)
    brush.jagged(0.04, 0.2, brush.colour("#33242a"), brush.count(4, 6), below=False)
    brush.polygon([(0, 0), (0.1, 0), (0.05, 0.3), (0.12, 0.6), (0.05, 1), (0, 1)], brush.colour("#33242a"))
    brush.polygon([(1, 0), (0.9, 0), (0.96, 0.35), (0.88, 0.6), (0.95, 1), (1, 1)], brush.colour("#33242a"))
    brush.jagged(0.84, 0.1, brush.colour("#4d3730"), brush.count(4, 6))
    for _ in range(brush.count(1, 3)):
        _crystals(brush, _either_side(brush, 0.24), brush.among(0.83, 0.9))
    brush.ridge(0.86, 0.015, brush.colour("#77574a"), 4)
    for _ in range(brush.count(3, 6)):
        brush.oval(brush.among(0, 1), brush.among(0.9, 0.98), brush.among(0.02, 0.045), 0.012, brush.colour("#64473d"))


def _crystals(brush: _Brush, x: float, y: float) -> None:
    shade = ("#5fd3e6", "#b48bf0", "#7fe0a8")[brush.count(0, 2)]
    for lean, height in ((-0.07, 0.13), (0.07, 0.11), (0.0, brush.among(0.17, 0.24))):
        foot, tip, shoulder = x + lean * 0.3, (x + lean, y - height), y - height + 0.04
        right = [tip, (tip[0] + 0.018, shoulder), (foot + 0.03, y)]
        brush.polygon([(foot - 0.03, y), (tip[0] - 0.018, shoulder), *right], brush.colour(shade))
        brush.polygon([(foot, y), *right], brush.colour("#1f2a5a", 0.22))


def _farm(brush: _Brush) -> None:
    brush.gradient("#6fc3f0", "#dff4fb", 0, 0.7)
    _clouds(brush, 1, 3)
    brush.ridge(0.58, 0.04, brush.colour("#a9d468"), 3)
    field = brush.among(0.63, 0.66)
    brush.ridge(field, 0.02, brush.colour("#8cc653"), 3)
    x = brush.among(0.14, 0.26)
    _barn(brush, x if brush.chance(0.5) else 1 - x, 0.77, brush.among(0.26, 0.32))
    if brush.chance(0.6):
        _tree(brush, brush.among(0.4, 0.6), 0.74, brush.among(0.24, 0.34), "#5ba653")
    brush.ridge(0.76, 0.012, brush.colour("#75b946"), 3)
    fence = brush.colour("#fbf5e8")
    for rail in (0.735, 0.775):
        brush.box(0, rail, 1, rail + 0.014, fence)
    start = brush.among(0.0, 0.12)
    for number in range(8):
        post = start + number * 0.13
        brush.polygon(
            [(post, 0.82), (post, 0.715), (post + 0.014, 0.7), (post + 0.028, 0.715), (post + 0.028, 0.82)], fence
        )
    brush.ridge(0.845, 0.012, brush.colour("#63ab3f"), 3)
    for _ in range(brush.count(3, 7)):
        x, y = brush.among(0.03, 0.97), brush.among(0.88, 0.98)
        petal = ("#ffd94d", "#ff8a80", "#ffffff", "#c58cf0")[brush.count(0, 3)]
        shade = brush.colour(petal)
        for dx, dy in ((-0.014, 0.0), (0.014, 0.0), (0.0, -0.014), (0.0, 0.014)):
            brush.disc(x + dx, y + dy, 0.011, shade)
        brush.disc(x, y, 0.01, brush.colour("#f0a33c"))


def _barn(brush: _Brush, x: float, y: float, width: float) -> None:
    half, wall, roof = width / 2, y - width * 0.72, y - width * 1.2
    brush.polygon(
        [
            (x - half, y),
            (x - half, wall),
            (x - half * 0.6, roof + 0.04),
            (x, roof),
            (x + half * 0.6, roof + 0.04),
            (x + half, wall),
            (x + half, y),
        ],
        brush.colour("#c8443c"),
    )
    edge = [(x - half - 0.015, wall + 0.01), (x - half * 0.62, roof + 0.035), (x, roof - 0.005)]
    edge += [(x + half * 0.62, roof + 0.035), (x + half + 0.015, wall + 0.01)]
    brush.line(edge, 0.022, brush.colour("#75484a"))
    white = brush.colour("#fff4ea")
    brush.box(x - half * 0.45, y - width * 0.5, x + half * 0.45, y, white)
    brush.box(x - half * 0.37, y - width * 0.45, x + half * 0.37, y, brush.colour("#a5332f"))
    brush.line([(x - half * 0.4, y), (x + half * 0.4, y - width * 0.47)], 0.011, white)
    brush.line([(x + half * 0.4, y), (x - half * 0.4, y - width * 0.47)], 0.011, white)
    brush.disc(x, roof + width * 0.3, width * 0.1, white)


def _room(brush: _Brush) -> None:
    wall = ("#f3cfa0", "#eec3a9", "#f0d6b4", "#e9c998")[brush.count(0, 3)]
    brush.gradient(wall, wall, 0, 0.8)
    stripes = brush.colour("#ffffff", 0.22)
    for number in range(0, 14, 2):
        brush.box(number / 13, 0, number / 13 + 0.04, 0.74, stripes)
    brush.box(0, 0.72, 1, 0.76, brush.colour("#fbf3e6"))
    brush.box(0, 0.76, 1, 1, brush.colour("#b57a4b"))
    for row in range(4):
        y = 0.76 + row * 0.06
        brush.box(0, y, 1, y + 0.007, brush.colour("#8f5a36"))
        for _ in range(2):
            seam = brush.among(0, 1)
            brush.box(seam, y, seam + 0.007, y + 0.06, brush.colour("#8f5a36"))
    left = brush.chance(0.5)
    x = brush.among(0.2, 0.3)
    _window(brush, x if left else 1 - x, brush.among(0.28, 0.34))
    x = brush.among(0.14, 0.2)
    _lamp(brush, 1 - x if left else x) if brush.chance(0.5) else _shelf(brush, 1 - x if left else x)
    if brush.chance(0.7):
        brush.oval(brush.among(0.4, 0.6), 0.91, 0.36, 0.055, brush.colour("#b4506a"))
        brush.oval(brush.among(0.45, 0.55), 0.91, 0.28, 0.038, brush.colour("#d98a96"))


def _window(brush: _Brush, x: float, y: float) -> None:
    brush.box(x - 0.15, y - 0.18, x + 0.15, y + 0.18, brush.colour("#fffaf0"))
    brush.box(x - 0.125, y - 0.155, x + 0.125, y + 0.155, brush.colour("#9fdcf5"))
    brush.oval(x, y + 0.155, 0.125, 0.08, brush.colour("#86c576"))
    brush.box(x - 0.125, y + 0.155, x + 0.125, y + 0.24, brush.colour("#fffaf0"))
    brush.box(x - 0.01, y - 0.155, x + 0.01, y + 0.155, brush.colour("#fffaf0"))
    brush.box(x - 0.125, y - 0.01, x + 0.125, y + 0.01, brush.colour("#fffaf0"))
    cloth = brush.colour(("#d0605e", "#5f9ea0", "#7c6bb0")[brush.count(0, 2)])
    for side in (-1, 1):
        edge = x + side * 0.19
        fold = [(x + side * 0.04, y - 0.2), (x + side * 0.12, y + 0.08), (x + side * 0.13, y + 0.24)]
        brush.polygon([(edge, y - 0.2), *fold, (edge, y + 0.24)], cloth)
    brush.box(x - 0.22, y - 0.225, x + 0.22, y - 0.195, brush.colour("#7a5238"), 0.012)


def _lamp(brush: _Brush, x: float) -> None:
    brush.box(x - 0.07, 0.8, x + 0.07, 0.825, brush.colour("#5a4038"), 0.01)
    brush.box(x - 0.01, 0.4, x + 0.01, 0.81, brush.colour("#5a4038"))
    brush.disc(x, 0.38, 0.2, brush.colour("#fff3b8", 0.25))
    brush.polygon([(x - 0.07, 0.28), (x + 0.07, 0.28), (x + 0.11, 0.43), (x - 0.11, 0.43)], brush.colour("#f4b64e"))


def _shelf(brush: _Brush, x: float) -> None:
    """A bookcase with three rows of books."""
    brush.box(x - 0.13, 0.24, x + 0.13, 0.81, brush.colour("#7d5236"))
    spines = ("#c8554b", "#4f8fb0", "#e2b04a", "#6a9b5b", "#8a6bb0")
    for row in range(3):
        y = 0.42 + 0.18 * row
        brush.box(x - 0.112, y - 0.155, x + 0.112, y, brush.colour("#54341f"))
        left = x - 0.105
        while left < x + 0.08:
            width = brush.among(0.022, 0.036)
            brush.box(left, y - brush.among(0.09, 0.14), left + width, y, brush.colour(spines[brush.count(0, 4)]))
            left += width + 0.003


def _moon(brush: _Brush) -> None:
    brush.gradient("#05060f", "#1d1b36", 0, 0.8)
    _stars(brush, brush.count(30, 46), 0.7)
    x, y, radius = brush.among(0.14, 0.86), brush.among(0.16, 0.26), brush.among(0.1, 0.135)
    brush.disc(x, y, radius * 1.12, brush.colour("#7fb8ff", 0.25))
    brush.disc(x, y, radius, brush.colour("#2f74c8"))
    for _ in range(4):
        dx, dy = brush.among(-0.5, 0.5), brush.among(-0.5, 0.5)
        brush.oval(x + dx * radius, y + dy * radius, radius * 0.34, radius * 0.2, brush.colour("#57b364"))
    brush.oval(x - radius * 0.2, y + radius * 0.35, radius * 0.5, radius * 0.09, brush.colour("#ffffff", 0.85))
    brush.oval(x + radius * 0.2, y - radius * 0.55, radius * 0.45, radius * 0.08, brush.colour("#ffffff", 0.85))
    brush.ridge(0.68, 0.035, brush.colour("#85858f"), 4)
    if brush.chance(0.45):
        _rocket(brush, _either_side(brush, 0.16), 0.8)
    brush.ridge(0.76, 0.025, brush.colour("#b9b9c1"), 3)
    for y in (0.81, 0.85, 0.89, 0.93, 0.97):
        x, across = brush.among(0, 1), brush.among(0.04, 0.1)
        brush.oval(x, y, across, across * 0.28, brush.colour("#8c8c98"))
        brush.oval(x, y + across * 0.07, across * 0.86, across * 0.2, brush.colour("#a3a3ad"))


def _rocket(brush: _Brush, x: float, y: float) -> None:
    red = brush.colour("#d8483e")
    for side in (-1, 1):
        brush.polygon([(x + side * 0.05, y - 0.16), (x + side * 0.11, y), (x + side * 0.04, y - 0.04)], red)
    brush.oval(x, y - 0.2, 0.065, 0.19, brush.colour("#f1f1f5"))
    brush.polygon([(x - 0.052, y - 0.31), (x, y - 0.42), (x + 0.052, y - 0.31)], red)
    brush.disc(x, y - 0.24, 0.03, brush.colour("#54a8d8"))


def _seabed(brush: _Brush) -> None:
    brush.gradient("#4fd0d8", "#0f5f8f")
    for _ in range(brush.count(2, 4)):
        x, width = brush.among(0, 1), brush.among(0.05, 0.1)
        ray = [(x, 0), (x + width, 0), (x + width * 0.5 - 0.2, 0.85), (x - width - 0.2, 0.85)]
        brush.polygon(ray, brush.colour("#e6ffff", 0.12))
    brush.ridge(0.7, 0.05, brush.colour("#1a7a93"), 3)
    for _ in range(brush.count(4, 7)):
        _weed(brush, _either_side(brush, 0.36), brush.among(0.84, 0.9), brush.among(0.2, 0.42))
    for _ in range(brush.count(1, 2)):
        x, shade = _either_side(brush, 0.28), brush.colour(("#f27d8b", "#f59a5d", "#c678d8")[brush.count(0, 2)])
        for lean in (-0.09, -0.035, 0.03, 0.085):
            brush.line([(x, 0.88), (x + lean * 0.6, 0.8), (x + lean, brush.among(0.69, 0.75))], 0.028, shade)
    brush.ridge(0.85, 0.02, brush.colour("#d9cf9f"), 3)
    for _ in range(brush.count(2, 4)):
        _fish(brush, brush.among(0.08, 0.92), brush.among(0.1, 0.55), brush.among(0.045, 0.07))
    for _ in range(brush.count(6, 12)):
        x, y, radius = brush.among(0, 1), brush.among(0.05, 0.75), brush.among(0.008, 0.02)
        brush.disc(x, y, radius, brush.colour("#dffcff", 0.6))
    for _ in range(brush.count(2, 5)):
        brush.oval(brush.among(0, 1), brush.among(0.9, 0.98), brush.among(0.015, 0.03), 0.012, brush.colour("#b6aa80"))


def _weed(brush: _Brush, x: float, y: float, height: float) -> None:
    shade, sway = brush.colour("#2f9e6e" if brush.chance(0.5) else "#56b85a"), 0.022
    points = [(x + sway * math.sin(step * 1.3), y - height * step / 8) for step in range(9)]
    brush.line(points, 0.026, shade)


def _fish(brush: _Brush, x: float, y: float, length: float) -> None:
    shade = brush.colour(("#ff9f43", "#ffd54a", "#ff7675")[brush.count(0, 2)])
    way = 1 if brush.chance(0.5) else -1
    brush.oval(x, y, length, length * 0.6, shade)
    brush.polygon(
        [
            (x - way * length * 0.8, y),
            (x - way * length * 1.6, y - length * 0.55),
            (x - way * length * 1.6, y + length * 0.55),
        ],
        shade,
    )
    brush.disc(x + way * length * 0.5, y - length * 0.12, length * 0.14, brush.colour("#2a2a3a"))


def _volcano(brush: _Brush) -> None:
    brush.gradient("#43152c", "#e0602f", 0, 0.8)
    x, top = brush.among(0.25, 0.75), brush.among(0.28, 0.36)
    for _ in range(brush.count(4, 6)):
        brush.disc(
            x + brush.among(-0.16, 0.16),
            top - brush.among(0.06, 0.24),
            brush.among(0.06, 0.11),
            brush.colour("#6f5560", 0.85),
        )
    _glow(brush, x, top, 0.07, "#ffb347")
    brush.polygon([(x - 0.5, 0.85), (x - 0.1, top), (x + 0.1, top), (x + 0.5, 0.85)], brush.colour("#5b2f33"))
    brush.polygon([(x + 0.02, top), (x + 0.1, top), (x + 0.5, 0.85), (x + 0.1, 0.85)], brush.colour("#2a1118", 0.3))
    brush.oval(x, top, 0.1, 0.022, brush.colour("#ffcf5a"))
    for lean in (brush.among(-0.24, -0.13), brush.among(-0.05, 0.05), brush.among(0.13, 0.24)):
        bend, end = (x + lean * 0.45, top + 0.15), (x + lean, top + brush.among(0.28, 0.42))
        flow = [(x + lean * 0.3 - 0.03, top), (bend[0] - 0.022, bend[1]), end, (bend[0] + 0.022, bend[1])]
        brush.polygon([*flow, (x + lean * 0.3 + 0.03, top)], brush.colour("#ff8a2b"))
    brush.jagged(0.77, 0.08, brush.colour("#43232b"), brush.count(6, 9))
    brush.ridge(0.83, 0.015, brush.colour("#6a3a38"), 4)
    for _ in range(brush.count(3, 5)):
        px, py = brush.among(0, 1), brush.among(0.86, 0.98)
        across = brush.among(0.05, 0.11)
        brush.oval(px, py, across, across * 0.2, brush.colour("#ff9d3c"))
        brush.oval(px, py, across * 0.7, across * 0.11, brush.colour("#ffd76a"))
    for _ in range(brush.count(5, 12)):
        brush.disc(brush.among(0, 1), brush.among(0.1, 0.75), brush.among(0.005, 0.01), brush.colour("#ffc24d"))


_PAINTERS: dict[str, Callable[[_Brush], None]] = {
    "beach": _beach,
    "forest": _forest,
    "desert": _desert,
    "mountains": _mountains,
    "city": _city,
    "hill": _hill,
    "cave": _cave,
    "farm": _farm,
    "room": _room,
    "moon": _moon,
    "seabed": _seabed,
    "volcano": _volcano,
}
PLACES: tuple[str, ...] = tuple(_PAINTERS)
"""Names of the places, in a fixed order: the classes of a place classifier."""
