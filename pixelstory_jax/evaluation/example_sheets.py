"""Pages of training examples: pictures, their masks, and what is asked and answered about them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pixelstory_jax.data.annotations import Example
from pixelstory_jax.data.builtin.questions import Question
from pixelstory_jax.inference.answers import phrase_spans
from pixelstory_jax.inference.overlay import (
    INK,
    MARGIN,
    PALE_INK,
    PAPER,
    Word,
    draw_lines,
    font_of,
    overlay_masks,
    page_of,
    scaled,
    wrap,
)

HATCH = 6  # pixels from one line of an ignored area to the next
_TEXT, _SMALL, _STEP = 17, 13, 27


def example_sheet(examples: Sequence[Example], title: str = "", columns: int = 2, side: int = 320) -> np.ndarray:
    """uint8 [H, W, 3]: of each example its picture, its masks, numbered, and its conversations.

    Phrases of answers have the colour and the number of their mask; ignored areas are hatched.
    """
    width = 2 * side + 3 * MARGIN
    return page_of([_draw_example(example, side, width) for example in examples], columns, title)


def _draw_example(example: Example, side: int, width: int) -> Image.Image:
    ignored = [] if example.ignored is None else [example.ignored]
    picture, shown = scaled(example.image, [*example.masks, *ignored], least=side, most=side)
    masks = shown[: len(example.masks)]
    marked = overlay_masks(picture, masks)
    if ignored:
        marked = hatched(marked, shown[-1] & ~np.any([*masks, np.zeros_like(shown[-1])], axis=0))
    lines = [line for turns in example.conversations for turn in turns for line in _lines_of(turn, width - 2 * MARGIN)]
    source = " ".join(filter(None, (example.provenance.picture, example.provenance.id)))
    small = wrap([(source, None)], font_of(_SMALL), width - 2 * MARGIN)
    cell = Image.new("RGB", (width, 3 * MARGIN + picture.shape[0] + 20 * len(small) + _STEP * len(lines) + 8), PAPER)
    panels = (picture, marked) if shown else (picture,)
    for number, panel in enumerate(panels):
        cell.paste(Image.fromarray(panel), (MARGIN + number * (side + MARGIN), MARGIN))
    draw = ImageDraw.Draw(cell)
    top = draw_lines(draw, (MARGIN, MARGIN + picture.shape[0] + 6), small, font_of(_SMALL), 20, PALE_INK) + 6
    for line, is_question in lines:
        top = draw_lines(draw, (MARGIN, top), [line], font_of(_TEXT), _STEP, PALE_INK if is_question else INK)
    return cell


def _lines_of(turn: Question, width: int) -> list[tuple[list[Word], bool]]:
    """(line, whether it belongs to the question); the masks of an answer are numbered as in the example."""
    spans: list[Word] = []
    for text, k in phrase_spans(turn.answer):
        if k is None:
            spans.append((text, None))
        else:
            number = turn.targets[k]
            spans.append((f"[{number + 1}]" if text == f"[{k + 1}]" else text, number))
    font = font_of(_TEXT)
    asked, said = wrap([(turn.text, None)], font, width), wrap(spans or [("(no words)", None)], font, width)
    return [(line, True) for line in asked] + [(line, False) for line in said]


def hatched(picture: np.ndarray, area: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with grey diagonal lines over bool [H, W]."""
    rows, columns = np.indices(area.shape)
    pixels = picture.copy()
    pixels[area & ((rows + columns) % HATCH < 2)] = PALE_INK
    return pixels
