"""Pictures of answers: masks as translucent colours with outlines, phrases in the colours of their masks.

Colours are those of Okabe and Ito (2008), which people with the common kinds of colour blindness can tell apart;
numbers say the same again. All functions return uint8 RGB [H, W, 3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.inference.answers import Answer, phrase_spans
from pixelstory_jax.inference.fonts import FOLDER, SHIPPED, Fonts, sized

Colour = tuple[int, int, int]
PALETTE: tuple[Colour, ...] = (
    (230, 85, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 90, 160),
    (240, 200, 30),
    (70, 175, 235),
    (120, 70, 20),
    (110, 60, 190),
)
INK, PALE_INK, PAPER, LINE = (28, 30, 34), (112, 117, 125), (255, 255, 255), (222, 225, 230)
OPACITY = 0.45
MARGIN = 16


def colour_of(number: int) -> Colour:
    """The colour of target `number`, counted from 0."""
    return PALETTE[number % len(PALETTE)]


def overlay_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[int] | None = None, label: bool = True
) -> np.ndarray:
    """`image` uint8 [H, W, 3] with bool masks [H, W] on it, numbered from 1; mask i has colour colours[i].

    What lies outside of all masks fades a little, so that they stand out from any picture.
    """
    chosen = [colour_of(i if colours is None else colours[i]) for i in range(len(masks))]
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    if len(masks):
        outside = ~np.any(masks, axis=0)
        grey = pixels[outside].mean(axis=-1, keepdims=True)
        pixels[outside] = 0.6 * pixels[outside] + 0.25 * grey + 0.15 * 255
    thickness = max(2, round(max(height, width) / 220))
    for mask, colour in zip(masks, chosen, strict=True):
        pixels[mask] += OPACITY * (np.array(colour, np.float32) - pixels[mask])
    for mask, colour in zip(masks, chosen, strict=True):
        pixels[mask & ~_eroded(mask, thickness)] = colour
    picture = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    size = int(np.clip(max(height, width) / 22, 11, 28))
    if label and min(height, width) >= 2 * size:
        draw = ImageDraw.Draw(picture)
        for number, (mask, colour) in enumerate(zip(masks, chosen, strict=True)):
            if mask.any():
                _label(draw, _label_point(mask, size), str(number + 1), colour, size, (width, height))
    return np.asarray(picture)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, as they are shown under a picture."""

    question: str
    answer: Answer


def draw_answers(image: np.ndarray, exchanges: Sequence[Exchange]) -> np.ndarray:
    """The picture with the masks of each answer on it, and under it the question, the answer and a legend."""
    blocks = [_draw_exchange(image, exchange) for exchange in exchanges]
    width = max(block.width for block in blocks)
    page = Image.new("RGB", (width, sum(block.height for block in blocks)), PAPER)
    top = 0
    for block in blocks:
        page.paste(block, (0, top))
        top += block.height
        if top < page.height:
            ImageDraw.Draw(page).line([(MARGIN, top), (width - MARGIN, top)], LINE)
    return np.asarray(page)


def _draw_exchange(image: np.ndarray, exchange: Exchange) -> Image.Image:
    masks = [target.mask for target in exchange.answer.targets]
    picture, shown = scaled(image, masks, least=512, most=1600)
    overlaid = Image.fromarray(overlay_masks(picture, shown))
    width = max(overlaid.width, 480) + 2 * MARGIN
    lines = [
        wrap([(exchange.question, None)], font_of(20), width - 2 * MARGIN),
        wrap(phrase_spans(exchange.answer.pieces) or [("(no words)", None)], font_of(20), width - 2 * MARGIN),
    ]
    step = 32
    text_height = step * (len(lines[0]) + len(lines[1]) + len(masks)) + (12 if masks else 0)
    page = Image.new("RGB", (width, overlaid.height + text_height + 3 * MARGIN), PAPER)
    page.paste(overlaid, ((width - overlaid.width) // 2, MARGIN))
    draw = ImageDraw.Draw(page)
    top = overlaid.height + 2 * MARGIN - 4
    top = draw_lines(draw, (MARGIN, top), lines[0], font_of(20), step, PALE_INK)
    top = draw_lines(draw, (MARGIN, top), lines[1], font_of(20), step, INK) + 12
    area = image.shape[0] * image.shape[1]
    for number, target in enumerate(exchange.answer.targets):
        _chip(draw, (MARGIN, top), str(number + 1), font_of(17), colour_of(number))
        share = 100 * np.count_nonzero(target.mask) / area
        extent = f"{share:.1f} % of the picture" if share else "no pixels"
        behind = MARGIN + 46 + draw_text(draw, (MARGIN + 34, top), target.phrase or "it", INK, font_of(18))
        draw.text((behind, top + 2), f"score {target.score:.2f}, {extent}", PALE_INK, font_of(16))
        top += step
    return page


def scaled(
    image: np.ndarray, masks: Sequence[np.ndarray], least: int, most: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Picture and masks with the long side brought into least..most."""
    longest = max(image.shape[:2])
    target = min(max(longest, least), most)
    if target == longest:
        return image, list(masks)
    height, width = (max(1, round(length * target / longest)) for length in image.shape[:2])
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    smooth = [
        np.asarray(Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)) >= 0.5
        for mask in masks
    ]
    return np.asarray(resized), smooth


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask without its outermost `steps` pixels; the frame of the picture counts as outside."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _label_point(mask: np.ndarray, size: int) -> tuple[int, int]:
    """Where the label of a mask goes: well inside of it, or right above a mask that the label would hide."""
    if np.count_nonzero(mask) > 6 * size**2:
        return _inner_point(mask)
    x, y, width, _ = mask_box(mask)
    return x + width // 2, y - size


def _inner_point(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of a pixel well inside the mask: what survives the most erosion, nearest to the middle of that."""
    step = max(1, max(mask.shape) // 128)  # a label needs no more precision
    inner = mask[::step, ::step]
    if not inner.any():
        step, inner = 1, mask
    while (smaller := _eroded(inner, 1)).any():
        inner = smaller
    rows, columns = np.nonzero(inner)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(columns[nearest]) * step, int(rows[nearest]) * step


def _label(
    draw: ImageDraw.ImageDraw, centre: tuple[int, int], text: str, colour: Colour, size: int, frame: tuple[int, int]
) -> None:
    radius = round(size * 0.72)
    x = int(np.clip(centre[0], radius + 1, frame[0] - radius - 2))
    y = int(np.clip(centre[1], radius + 1, frame[1] - radius - 2))
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline=PAPER, width=max(1, size // 10))
    draw.text((x, y), text, _on(colour), font_of(size), anchor="mm")


Word = tuple[str, int | None]


def wrap(spans: Sequence[tuple[str, int | None]], font: ImageFont.FreeTypeFont, width: int) -> list[list[Word]]:
    """Runs of text broken into lines of at most `width` pixels; each line is a list of runs with single colours."""
    lines: list[list[Word]] = [[]]
    length = 0.0
    for text, number in spans:
        for part in _words(text):
            extent = length_of(part, font) + (10 if number is not None else 0)
            if lines[-1] and length + extent > width and part.strip():
                lines.append([])
                length = 0.0
                part = part.lstrip()
            if lines[-1] and lines[-1][-1][1] == number:
                lines[-1][-1] = (lines[-1][-1][0] + part, number)
            else:
                lines[-1].append((part, number))
            length += extent
    return lines


def _words(text: str) -> list[str]:
    """Words with the space in front of them; a single one is cut where it is absurdly long."""
    words: list[str] = []
    for i, word in enumerate(text.replace("\n", " ").split(" ")):
        for start in range(0, max(len(word), 1), 40):
            words.append((" " if i and not start else "") + word[start : start + 40])
    return [word for word in words if word]


def draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[Sequence[Word]],
    font: ImageFont.FreeTypeFont,
    step: int,
    ink: Colour,
) -> int:
    """Draws wrapped lines from the top left corner; returns where the next line would begin."""
    left, top = corner
    for line in lines:
        x = float(left)
        for text, number in line:
            if number is None:
                x += draw_text(draw, (x, top), text, ink, font)
            else:
                x += _chip(draw, (x, top), text.strip(), font, colour_of(number))
        top += step
    return top


def _chip(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, font: ImageFont.FreeTypeFont, colour: Colour
) -> float:
    """Text on a rounded patch of colour; returns its width."""
    x, top = corner
    width = length_of(text, font) + 10
    box = [x, top - 2, x + width, top + font.size * 1.22]
    draw.rounded_rectangle(box, radius=5, fill=colour)
    draw_text(draw, (x + 5, top), text, _on(colour), font)
    return width + 2


def draw_text(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, ink: Colour, font: ImageFont.FreeTypeFont
) -> float:
    """Text from its top left corner in any script that the shipped fonts have; returns its width."""
    x, top = corner
    for part, chosen in _in_fonts(text, font):
        draw.text((x, top + font.getmetrics()[0]), part, ink, chosen, anchor="ls")  # on one baseline
        x += chosen.getlength(part)
    return x - corner[0]


def length_of(text: str, font: ImageFont.FreeTypeFont) -> float:
    """The width that `draw_text` takes, in pixels."""
    return sum(chosen.getlength(part) for part, chosen in _in_fonts(text, font))


def _in_fonts(text: str, font: ImageFont.FreeTypeFont) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Runs of `text` in `font`, which draws ASCII, and in others for what else there is."""
    for file, part in groupby(text, lambda character: None if character.isascii() else _others().covering(character)):
        yield "".join(part), font if file is None else sized(file, round(font.size), shaped=False)


@lru_cache(maxsize=1)
def _others() -> Fonts:
    return Fonts(tuple(FOLDER / name for name in SHIPPED[1:]))  # without the lettering of comics


def _on(colour: Colour) -> Colour:
    """Black or white, whichever reads better on the colour."""
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 150 else PAPER


@lru_cache(maxsize=16)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pages."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def page_of(cells: Sequence[Image.Image], columns: int, title: str = "") -> np.ndarray:
    """uint8 [H, W, 3]: cells of one width in rows of `columns`, with lines between the rows, below a title."""
    columns = max(1, min(columns, len(cells)))
    width = cells[0].width if cells else 0
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    top = 52 if title else 8
    page = Image.new("RGB", (columns * width, top + sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, 16), title, INK, font_of(24))
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number:
            draw.line([(MARGIN, top), (page.width - MARGIN, top)], LINE)
        for column, cell in enumerate(row):
            page.paste(cell, (column * width, top + 1))
        top += height
    return np.asarray(page)
