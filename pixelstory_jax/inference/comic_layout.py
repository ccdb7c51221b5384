"""Where the panels of a comic stand on its pages: pure geometry in pixels, no pictures.

A row is a tuple of columns, read from left to right; a column is a number of panels, one above the other. So (1, 2) is
one large panel beside two small ones. In a row of natural height all panels have the aspect of the pictures exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random

Row = tuple[int, ...]
STYLES = {
    "grid": "rows of different sizes that fill an upright page, up to nine panels a page",
    "four": "two by two",
    "classic": "rows of large panels mixed with pairs of small ones, mixed anew by the seed",
    "strip": "one row of up to four panels a page",
}
PAGE_ASPECT = math.sqrt(2)  # height to width of a printed sheet
MOST_PANELS = {"grid": 9, "four": 4, "strip": 4}
CLASSIC_ROWS = 4
FOUR_ROWS: dict[int, tuple[Row, ...]] = {4: ((1, 1), (1, 1)), 3: ((1, 2),), 2: ((1, 1),), 1: ((1,),)}
STRETCH = (0.88, 1.17)
"""A row may be this much lower or higher than natural so that a page is filled; the pictures are cropped for it."""
LEAN = 0.04  # how much wider one of two equal neighbours is made, so that gutters do not form one long cross


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A box in whole pixels from the upper left corner of the page."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height

    def overlaps(self, other: Rectangle) -> bool:
        """Whether the two share a pixel."""
        across = min(self.right, other.right) > max(self.left, other.left)
        return across and min(self.bottom, other.bottom) > max(self.top, other.top)

    def contains(self, other: Rectangle) -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom

    def inset(self, by: int) -> Rectangle:
        """The box without a border of `by` pixels."""
        return Rectangle(self.left + by, self.top + by, self.width - 2 * by, self.height - 2 * by)


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of `width` x `height` pixels: a box for the title or None, and the panels in reading order."""

    width: int
    height: int
    title: Rectangle | None
    panels: tuple[Rectangle, ...]


@dataclasses.dataclass(frozen=True)
class Spacing:
    """Pixels between panels, and between panels and the edge of the page."""

    gutter: int
    margin: int

    @classmethod
    def of(cls, width: int) -> Spacing:
        return cls(gutter=max(4, round(width / 70)), margin=max(6, round(width / 32)))


def layout(
    count: int, style: str = "grid", width: int = 1400, aspect: float = 1.0, title_height: int = 0, seed: int = 0
) -> tuple[Page, ...]:
    """Divides `count` panels among pages.

    Args:
      count: panels, at least 1.
      style: one of `STYLES`.
      width: of a page, 400 to 8000 pixels.
      aspect: width to height of the pictures, 0.4 to 2.5.
      title_height: pixels of the title on the first page; 0 for none.
      seed: of the style "classic".

    Returns:
      Pages whose panels, page after page, are in the order of the story. Gutters are equal everywhere, and a picture
      loses at most a fifth where it is cropped to its panel.

    Raises:
      ValueError: an argument is out of range.
    """
    if count < 1:
        raise ValueError(f"A comic needs at least one panel, got {count}.")
    if style not in STYLES:
        raise ValueError(f"There is no page layout {style!r}; choose one of {', '.join(STYLES)}.")
    if not 400 <= width <= 8000:
        raise ValueError(f"The width of a page must be 400 to 8000 pixels, got {width}.")
    if not 0.4 <= aspect <= 2.5:
        raise ValueError(f"Pictures for a page must be 0.4 to 2.5 times as wide as high, got {aspect:.3g}.")
    spacing = Spacing.of(width)
    height = round(width * PAGE_ASPECT)
    pages: list[Page] = []
    earlier: tuple[Row, ...] = ()
    shares = _classic_pages(count, random.Random(seed)) if style == "classic" else _shares(count, style)
    for share in shares:
        head = title_height if not pages else 0
        if isinstance(share, tuple):
            rows = share
        elif style == "strip":
            rows = ((1,) * share,)
        elif style == "four":
            rows = FOUR_ROWS[share]
        else:
            room = height - 2 * spacing.margin - (head + spacing.gutter if head else 0)
            rows = _best_rows(share, width - 2 * spacing.margin, room, spacing.gutter, aspect, earlier)
        pages.append(_page(rows, width, height, aspect, head, spacing, lean=style == "grid"))
        earlier = rows
    return tuple(pages)


def _shares(count: int, style: str) -> list[int]:
    """Panels of each page: balanced, except that pages of four are full and the last one takes the rest."""
    most = MOST_PANELS[style]
    pages = -(-count // most)
    if style == "four":
        return [min(most, count - most * number) for number in range(pages)]
    return [count // pages + (number < count % pages) for number in range(pages)]


def _classic_pages(count: int, rng: random.Random) -> list[tuple[Row, ...]]:
    """Rows of four panels, and of six in turn with them from nine panels on, shared among pages."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        full = 6 if count > 8 and len(sizes) % 2 else 4
        sizes.append(min(full, left))
    if len(sizes) > 1 and sizes[-1] == 1:  # a single panel would be larger than all others
        sizes[-2:] = [5] if sizes[-2] == 4 else [4, 3]
    columns = {1: (1,), 2: (1, 1), 3: (1, 2), 4: (1, 1, 2), 5: (1, 2, 2), 6: (1, 1, 2, 2)}
    rows = [tuple(rng.sample(columns[size], len(columns[size]))) for size in sizes]
    pages = -(-len(rows) // CLASSIC_ROWS)
    ends = [len(rows) * number // pages for number in range(pages + 1)]
    return [tuple(rows[start:end]) for start, end in itertools.pairwise(ends)]


def _natural_height(row: Row, inner: int, gutter: int, aspect: float) -> float:
    """Height at which a row of `inner` pixels gives every panel the aspect of the pictures."""
    gutters = gutter * (len(row) - 1)
    lost = sum(aspect * gutter * (stack - 1) / stack for stack in row)
    return (inner - gutters + lost) / (aspect * sum(1 / stack for stack in row))


@functools.cache
def _arrangements(count: int) -> tuple[tuple[Row, ...], ...]:
    """All sequences of rows of up to three panels that hold `count` panels."""
    if count == 0:
        return ((),)
    choices: tuple[Row, ...] = ((1,), (1, 1), (1, 1, 1), (1, 2), (2, 1))
    return tuple((row, *rest) for row in choices if sum(row) <= count for rest in _arrangements(count - sum(row)))


def _best_rows(
    count: int, inner: int, room: int, gutter: int, aspect: float, earlier: tuple[Row, ...]
) -> tuple[Row, ...]:
    """The rows that fill `room` pixels best, with as much variety as there is; not those of the page before."""

    def cost(rows: tuple[Row, ...]) -> float:
        heights = [_natural_height(row, inner, gutter, aspect) for row in rows]
        fill = math.log((sum(heights) + gutter * (len(rows) - 1)) / room)
        alike = sum(first == second for first, second in itertools.pairwise(rows))
        small_first = heights[0] < max(heights) - 1  # a story opens with a large panel
        return (
            (abs(fill) if fill < 0 else 2.5 * fill)
            + 0.12 * alike
            + 0.03 * small_first
            + 0.3 * (rows == earlier)
            + 0.1 * (bool(earlier) and rows[0] == earlier[0])
        )

    return min(_arrangements(count), key=cost)


def _page(
    rows: tuple[Row, ...], width: int, height: int, aspect: float, head: int, spacing: Spacing, lean: bool
) -> Page:
    """Puts rows below each other; they are stretched to fill the page where that costs the pictures little."""
    margin, gutter = spacing.margin, spacing.gutter
    inner = width - 2 * margin
    title = Rectangle(margin, margin, inner, head) if head else None
    top = margin + (head + gutter if head else 0)
    natural = [_natural_height(row, inner, gutter, aspect) for row in rows]
    room = height - top - margin - gutter * (len(rows) - 1)
    stretch = room / sum(natural)
    stretch = 1.0 if stretch > STRETCH[1] else max(stretch, STRETCH[0])
    start, total, panels = top, 0.0, []
    for number, (row, wanted) in enumerate(zip(rows, natural, strict=True)):
        total += wanted * stretch
        end = round(top + total) + gutter * number
        share = LEAN * (1 if number % 2 else -1) if lean and row == (1, 1) else 0.0
        panels += _row_panels(row, Rectangle(margin, start, inner, end - start), wanted, gutter, aspect, share)
        start = end + gutter
    return Page(width, start - gutter + margin, title, tuple(panels))


def _row_panels(row: Row, box: Rectangle, natural: float, gutter: int, aspect: float, lean: float) -> list[Rectangle]:
    """The panels of a row in reading order; `lean` moves the gutter of two equal columns to the right."""
    widths = [aspect * (natural - gutter * (stack - 1)) / stack for stack in row]
    if lean:
        widths = [widths[0] * (1 + lean), widths[1] * (1 - lean)]
    edges = [round(edge) for edge in itertools.accumulate(widths, initial=0.0)]
    edges[-1] = box.width - gutter * (len(row) - 1)
    panels = []
    for column, (stack, (start, end)) in enumerate(zip(row, itertools.pairwise(edges), strict=True)):
        left = box.left + start + gutter * column
        free = box.height - gutter * (stack - 1)
        for place in range(stack):
            above, below = free * place // stack, free * (place + 1) // stack
            panels.append(Rectangle(left, box.top + above + gutter * place, end - start, below - above))
    return panels
