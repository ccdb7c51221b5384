"""Comic pages: panels in black frames on white paper, with captions, speech balloons and a title, as PNG and PDF.

`letter_panel` decides where the words of a panel stand, `draw_pages` draws everything, `save_comic` writes files. The
same arguments, fonts and version of Pillow give the same bytes. Lengths are pixels.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from pixelstory_jax.data.story_script import MOST_BUBBLES
from pixelstory_jax.inference.comic_layout import Rectangle, layout
from pixelstory_jax.inference.fonts import FontError, Fonts
from pixelstory_jax.inference.lettering import Lettering, NoRoomError, TextBlock, prepared
from pixelstory_jax.inference.saving import png_bytes, write_whole

INK, PAPER, CAPTION_PAPER, TITLE_PAPER = "#111111", "#ffffff", "#fff6d0", "#ffd23f"
EDGE = 0.35
"""Share of a panel's height, at the top and at the bottom, that words may cover; the middle stays free."""
SHARED_EDGE = 0.17  # of the bottom, for the caption, where balloons stand there too
ROUNDNESS = 2.7  # exponent of the superellipse of a balloon: 2 is an ellipse
PDF_PAGE_INCHES = 8.27  # width of an A4 sheet
Point = tuple[float, float]


class ComicError(ValueError):
    """The page cannot be drawn from what was given. panel: see `FontError`."""

    panel: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Pixels of everything that is drawn, for a page of a width."""

    frame: int
    stroke: int
    letters: int
    smallest_letters: int
    title: int

    @classmethod
    def of(cls, width: int) -> Sizes:
        return cls(
            frame=max(2, round(width / 300)),
            stroke=max(1, round(width / 480)),
            letters=max(9, round(width / 48)),
            smallest_letters=max(7, round(width / 105)),
            title=round(width / 10),
        )


@dataclasses.dataclass(frozen=True)
class Words:
    """Text in its box on the page: `box` is what is painted, the block begins at (left, top)."""

    block: TextBlock
    box: Rectangle
    left: int
    top: int


@dataclasses.dataclass(frozen=True)
class Balloon:
    """Speech: a superellipse that fills `words.box`, with a tail that ends at `tip`."""

    words: Words
    tip: Point


@dataclasses.dataclass(frozen=True)
class PanelWords:
    """The words of one panel. No two boxes overlap, and none reaches into the middle of the panel."""

    caption: Words | None
    balloons: tuple[Balloon, ...]


def draw_pages(
    panels: Sequence[Image.Image],
    captions: Sequence[str] = (),
    bubbles: Sequence[Sequence[str]] = (),
    title: str = "",
    style: str = "grid",
    width: int = 1400,
    seed: int = 0,
    fonts: Sequence[Path] = (),
) -> list[Image.Image]:
    """Draws the pages of a comic.

    Args:
      panels: pictures in the order of the story, all of one shape; small ones are enlarged smoothly.
      captions: one text per panel, "" for none; empty for no captions at all.
      bubbles: up to four texts per panel; empty for none at all.
      title: above the first page's panels, "" for none.
      style, width, seed: see `comic_layout.layout`; 600 to 8000 pixels wide.
      fonts: font files that are tried before the shipped ones.

    Returns:
      RGB pictures. Words that do not fit at the smallest size end in an ellipsis.

    Raises:
      ComicError: lengths differ, too many bubbles, or a page too narrow.
      FontError: a font file cannot be used, or no font has a character of the text.
    """
    if width < 600:
        raise ComicError(f"A page must be at least 600 pixels wide to be lettered, got {width}.")
    captions, bubbles = list(captions) or [""] * len(panels), list(bubbles) or [()] * len(panels)
    if not len(panels) == len(captions) == len(bubbles):
        raise ComicError(
            f"Each panel needs a caption and a list of bubbles, both may be empty: got {len(panels)} panels, "
            f"{len(captions)} captions, {len(bubbles)} lists of bubbles."
        )
    for number, texts in enumerate(bubbles, start=1):
        if len(texts) > MOST_BUBBLES:
            raise ComicError(f"Panel {number} has {len(texts)} bubbles; {MOST_BUBBLES} are the most that have room.")
    lettering, sizes = Lettering(Fonts.with_shipped(fonts)), Sizes.of(width)
    aspect = panels[0].width / panels[0].height if panels else 1.0
    title = prepared(title)
    plan = layout(len(panels), style, width, aspect, title_height=sizes.title if title else 0, seed=seed)
    pages, first = [], 0
    for place in plan:
        page = Image.new("RGB", (place.width, place.height), PAPER)
        if place.title:
            _draw_title(page, place.title, title, lettering, sizes)
        for number, panel in enumerate(place.panels, start=first):
            picture = fill(panels[number], panel.width, panel.height)
            page.paste(picture, (panel.left, panel.top))
            side = quieter_side(picture)
            try:
                words = letter_panel(panel, captions[number], bubbles[number], lettering, sizes, side)
            except (ComicError, FontError) as error:
                error.panel = number
                raise
            _draw_frame(page, panel, sizes.frame)
            _draw_words(page, words, lettering, sizes)
        pages.append(page)
        first += len(place.panels)
    return pages


def save_comic(pages: Sequence[Image.Image], folder: Path, title: str = "") -> list[Path]:
    """Writes page_1.png, ... and comic.pdf into `folder` and removes further pages of an earlier comic.

    Returns the paths, the PDF last. Raises OSError if the folder cannot be written, ComicError without pages.
    """
    if not pages:
        raise ComicError("A comic without pages cannot be saved.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"page_{number}.png": png_bytes(np.asarray(page)) for number, page in enumerate(pages, start=1)}
    files["comic.pdf"] = pdf_bytes(pages, title)
    for name, content in files.items():
        write_whole(folder / name, content)
    for path in folder.glob("page_*.png"):
        if re.fullmatch(r"page_[1-9]\d*\.png", path.name) and path.name not in files:
            path.unlink(missing_ok=True)
    return [folder / name for name in files]


def pdf_bytes(pages: Sequence[Image.Image], title: str = "") -> bytes:
    """A PDF file with the pages at the width of an A4 sheet. It holds no date, so that it depends on the pages only."""
    buffer = io.BytesIO()
    pages[0].save(
        buffer,
        "PDF",
        save_all=True,
        append_images=pages[1:],
        resolution=pages[0].width / PDF_PAGE_INCHES,
        quality=92,
        subsampling=0,
        title=title or "Comic",
        creationDate=None,
        modDate=None,
    )
    return buffer.getvalue()


def fill(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at width x height, cut at two edges where its shape differs; never stretched."""
    return ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS, centering=(0.5, 0.6))


def quieter_side(picture: Image.Image) -> int:
    """0 or 1: in which upper corner, left or right, a balloon hides less."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)[: round(32 * EDGE)]
    detail = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    left, right = detail[:, :16].sum(), detail[:, 15:].sum()
    return int(right < 0.9 * left)


def letter_panel(
    panel: Rectangle, caption: str, bubbles: Sequence[str], lettering: Lettering, sizes: Sizes, side: int = 0
) -> PanelWords:
    """Decides where the words of a panel stand.

    A caption stands in the upper left corner, or at the bottom where the panel has speech. Balloons stand in the upper
    corners (one alone at `side`, 0 for left), the third and fourth in the lower ones, read from left to right.

    Raises:
      FontError: no font has a character of the text.
    """
    usual = max(sizes.letters, round(0.034 * panel.height))
    largest = max(sizes.smallest_letters, min(usual, round(0.075 * panel.height)))
    caption, bubbles = prepared(caption), [text for bubble in bubbles if (text := prepared(bubble))]
    smallest = sizes.smallest_letters
    if len(bubbles) > 2:  # words in all four corners of a small panel must be smaller still
        smallest = min(smallest, max(4, round(0.045 * panel.height)))
    letters = (largest, smallest)
    words = None
    if caption:
        share = SHARED_EDGE if len(bubbles) > 2 else EDGE
        words = _caption(panel, caption, share, lettering, letters, sizes.frame, at_bottom=bool(bubbles))
    slots = _slots(panel, [len(text) for text in bubbles], words, sizes, side)
    balloons = [
        _balloon(panel, slot, text, lettering, letters, sizes) for slot, text in zip(slots, bubbles, strict=True)
    ]
    return PanelWords(words, tuple(balloons))


def _caption(
    panel: Rectangle,
    text: str,
    share: float,
    lettering: Lettering,
    letters: tuple[int, int],
    frame: int,
    at_bottom: bool,
) -> Words:
    """A box in a corner of the panel whose border continues the frame; over the full width if it nearly is."""
    border = round(0.35 * letters[0]) if share == EDGE else round(0.014 * panel.height)
    pad = frame + max(2, border)
    block = lettering.fit(text, panel.width - 2 * pad, math.floor(share * panel.height) - 2 * pad, *letters)
    wide = block.width + 2 * pad > 0.8 * panel.width
    width = panel.width if wide else block.width + 2 * pad
    height = block.height + 2 * pad
    right = block.backwards and not wide
    left = panel.right - width if right else panel.left
    top = panel.bottom - height if at_bottom else panel.top
    return Words(block, Rectangle(left, top, width, height), left + (width - block.width) // 2, top + pad)


def _slots(panel: Rectangle, lengths: list[int], caption: Words | None, sizes: Sizes, side: int) -> list[Rectangle]:
    """Boxes in which balloons with so many characters must stay, in reading order."""
    gap = sizes.frame + max(4, round(0.02 * panel.width))
    edge = math.floor(EDGE * panel.height)
    top, high = panel.top + gap, edge - gap
    if len(lengths) == 1:
        width = round(0.64 * panel.width)
        return [Rectangle(panel.right - gap - width if side else panel.left + gap, top, width, high)]
    low = panel.bottom - edge
    floor = caption.box.top - max(2, gap - sizes.frame) if caption else panel.bottom - gap
    slots = []
    for pair, y, height in ((lengths[:2], top, high), (lengths[2:], low, floor - low)):
        if len(pair) == 1:  # the third one alone: the answer, at the right
            width = round(0.64 * panel.width)
            slots.append(Rectangle(panel.right - gap - width, y, width, height))
        elif pair:
            first, second = (math.sqrt(length) for length in pair)
            free = panel.width - 3 * gap
            width = round(free * min(0.68, max(0.32, first / (first + second))))
            slots.append(Rectangle(panel.left + gap, y, width, height))
            slots.append(Rectangle(panel.left + 2 * gap + width, y, free - width, height))
    return slots


def _balloon(
    panel: Rectangle, slot: Rectangle, text: str, lettering: Lettering, letters: tuple[int, int], sizes: Sizes
) -> Balloon:
    """The balloon in its slot with the largest letters; of these the one that is most nearly twice as wide as high."""
    choices: list[tuple[bool, int, float, int, TextBlock, tuple[int, int]]] = []
    for share in (0.86, 0.7, 0.56, 0.44):
        width = round(share * slot.width)
        for high in (0.82, 0.7, 0.58):
            try:
                block = lettering.fit(text, width, round(high * slot.height), *letters)
            except NoRoomError:
                continue
            pads = _pads(block, sizes.stroke)
            size = block.width + 2 * pads[0], block.height + 2 * pads[1]
            if size[0] <= slot.width and size[1] <= slot.height:
                shape = abs(math.log(size[0] / size[1] / 2))
                choices.append((block.cut, -block.size, shape, len(choices), block, size))
                break
    if not choices:
        raise ComicError(f"A panel of {panel.width} x {panel.height} pixels is too small for the speech {text!r}.")
    *_, block, (width, height) = min(choices)
    at_right = slot.left - panel.left > panel.right - slot.right
    at_bottom = slot.top - panel.top > panel.bottom - slot.bottom
    left = slot.right - width if at_right else slot.left
    top = slot.bottom - height if at_bottom else slot.top
    box = Rectangle(left, top, width, height)
    words = Words(block, box, left + (width - block.width) // 2, top + (height - block.height) // 2)
    return Balloon(words, _tail_tip(panel, box, block.size))


def _pads(block: TextBlock, stroke: int) -> tuple[int, int]:
    """Room beside and above the text, so that its corners are inside of the superellipse."""
    pad = stroke + max(2, round(0.3 * block.size))
    while True:
        beside = math.ceil(1.5 * pad)
        a, b = block.width / 2 + beside - stroke, block.height / 2 + pad - stroke
        corner = (block.width / 2 / a) ** ROUNDNESS + (block.height / 2 / b) ** ROUNDNESS
        if corner <= 1:
            return beside, pad
        pad += 1


def _tail_tip(panel: Rectangle, box: Rectangle, size: int) -> Point:
    """Where the tail ends: towards the middle of the panel, a little outside of the balloon."""
    x, y = box.left + box.width / 2, box.top + box.height / 2
    lean = 0.3 * (x - panel.left - panel.width / 2)  # speakers stand on the side of their words
    target = panel.left + panel.width / 2 + lean, panel.top + panel.height / 2
    down = 1 if target[1] > y else -1
    length = min(1.5 * size, 0.12 * panel.height)
    edge = box.bottom if down > 0 else box.top
    across = max(-1.0, min(1.0, (target[0] - x) / max(1.0, abs(target[1] - y))))
    return x + across * (box.height / 2 + length), edge + down * length


def _draw_title(page: Image.Image, box: Rectangle, title: str, lettering: Lettering, sizes: Sizes) -> None:
    draw = ImageDraw.Draw(page)
    _paint_box(draw, box, TITLE_PAPER, sizes.frame)
    pad = sizes.frame + round(0.13 * box.height)
    block = lettering.fit(title, box.width - 2 * pad, box.height - 2 * pad, round(0.62 * box.height), sizes.letters)
    left, top = box.left + (box.width - block.width) // 2, box.top + (box.height - block.height) // 2
    lettering.draw(draw, block, left, top, INK, centred=True)


def _draw_frame(page: Image.Image, panel: Rectangle, frame: int) -> None:
    corners = [panel.left, panel.top, panel.right - 1, panel.bottom - 1]
    ImageDraw.Draw(page).rectangle(corners, outline=INK, width=frame)


def _draw_words(page: Image.Image, words: PanelWords, lettering: Lettering, sizes: Sizes) -> None:
    draw = ImageDraw.Draw(page)
    if words.caption:
        _paint_box(draw, words.caption.box, CAPTION_PAPER, sizes.frame)
        lettering.draw(draw, words.caption.block, words.caption.left, words.caption.top, INK)
    for balloon in words.balloons:
        _paint_balloon(page, balloon, sizes.stroke)
        lettering.draw(draw, balloon.words.block, balloon.words.left, balloon.words.top, INK, centred=True)


def _paint_box(draw: ImageDraw.ImageDraw, box: Rectangle, paper: str, frame: int) -> None:
    draw.rectangle([box.left, box.top, box.right - 1, box.bottom - 1], paper, INK, width=frame)


def _paint_balloon(page: Image.Image, balloon: Balloon, stroke: int) -> None:
    """Paints the balloon with its tail: all of it in ink, then a smaller one in the colour of paper."""
    fine = 4  # drawn so much larger and averaged down
    box, margin = balloon.words.box, 2 * balloon.words.block.size
    area = box.inset(-margin)
    tip = (balloon.tip[0] - area.left, balloon.tip[1] - area.top)
    centre = (margin + box.width / 2, margin + box.height / 2)
    edge = 1 / fine  # polygons cover the pixels of their corners
    for thinner, colour in ((edge, INK), (stroke, PAPER)):
        mask = Image.new("L", (area.width * fine, area.height * fine))
        draw = ImageDraw.Draw(mask)
        outline = _superellipse(centre, box.width / 2 - thinner, box.height / 2 - thinner)
        tail = _tail(centre, box, tip, balloon.words.block.size, thinner)
        for shape in (outline, tail):
            draw.polygon([(x * fine, y * fine) for x, y in shape], fill=255)
        page.paste(colour, (area.left, area.top), mask.reduce(fine))


def _superellipse(centre: Point, a: float, b: float, points: int = 160) -> list[Point]:
    shape = []
    for k in range(points):
        cos, sin = math.cos(2 * math.pi * k / points), math.sin(2 * math.pi * k / points)
        power = 2 / ROUNDNESS
        x, y = math.copysign(abs(cos) ** power, cos), math.copysign(abs(sin) ** power, sin)
        shape.append((centre[0] + a * x, centre[1] + b * y))
    return shape


def _tail(centre: Point, box: Rectangle, tip: Point, size: int, thinner: float) -> list[Point]:
    """A curved tail from inside of the balloon to its tip; `thinner` leaves room for the outline."""
    down = 1 if tip[1] > centre[1] else -1
    half = max(3.0, 0.4 * size)
    most = max(0.0, 0.42 * box.width - 1.5 * half)  # so that it leaves the balloon at its edge, not at its end
    shift = max(-most, min(most, 0.45 * (tip[0] - centre[0])))
    root = (centre[0] + shift, centre[1] + down * 0.25 * box.height)
    length = math.dist(root, tip)
    back = 0.6 * thinner * math.hypot(length, half) / half / length  # the curve is narrower than its root
    end = (tip[0] + back * (root[0] - tip[0]), tip[1] + back * (root[1] - tip[1]))
    bend = (root[0] + 0.12 * (tip[0] - root[0]), root[1] + 0.6 * (tip[1] - root[1]))
    sides = []
    for side in (-1, 1):
        start = (root[0] + side * (half - thinner), root[1])
        middle = (bend[0] + side * 0.5 * (half - thinner), bend[1])
        sides.append([_bezier(start, middle, end, k / 12) for k in range(13)])
    return [*sides[0], *reversed(sides[1])]


def _bezier(start: Point, middle: Point, end: Point, t: float) -> Point:
    weights = (1 - t) ** 2, 2 * t * (1 - t), t * t
    x, y = (sum(w * p for w, p in zip(weights, axis, strict=True)) for axis in zip(start, middle, end, strict=True))
    return x, y
