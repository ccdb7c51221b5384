"""A page of pictures with their questions and answers, to be looked at before anything is trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pixelstory_jax.data.annotations import decode_mask
from pixelstory_jax.data.images import open_image
from pixelstory_jax.data.muse.pair import Pair
from pixelstory_jax.data.muse.writing import Entry
from pixelstory_jax.inference.overlay import (
    INK,
    MARGIN,
    PAPER,
    draw_lines,
    font_of,
    overlay_masks,
    page_of,
    scaled,
    wrap,
)

SIDE = 360


def contact_sheet(entries: Sequence[Entry], columns: int = 3) -> np.ndarray:
    """uint8 [H, W, 3]: of every entry one question, the masks of its answer numbered in the order of the answer.

    Raises:
      ImageError: a picture cannot be read. ValueError: a mask cannot be decoded, or the picture has another size.
    """
    cells = [_cell(entry, entry.pairs[number % len(entry.pairs)]) for number, entry in enumerate(entries)]
    return page_of(cells, columns)


def _cell(entry: Entry, pair: Pair) -> Image.Image:
    image, size = open_image(entry.file), (entry.picture.height, entry.picture.width)
    if image.shape[:2] != size:
        raise ValueError(
            f"{entry.file} is {image.shape[0]} x {image.shape[1]} pixels, its annotations are for "
            f"{size[0]} x {size[1]} (height x width)."
        )
    masks = [decode_mask(entry.picture.instances[number].segmentation, size) for number in pair.targets]
    picture, shown = scaled(image, masks, least=SIDE, most=SIDE)
    spans: list[tuple[str, int | None]] = []
    for part in pair.answer:
        spans.append((part, None) if isinstance(part, str) else (part.phrase, pair.targets.index(part.number)))
    font, step = font_of(16), 25
    question, answer = wrap([(pair.question, None)], font, SIDE), wrap(spans, font, SIDE)
    text_height = step * (len(question) + len(answer)) + 3 * MARGIN
    cell = Image.new("RGB", (SIDE + 2 * MARGIN, picture.shape[0] + text_height), PAPER)
    cell.paste(Image.fromarray(overlay_masks(picture, shown)), (MARGIN, MARGIN))
    draw = ImageDraw.Draw(cell)
    top = draw_lines(draw, (MARGIN, picture.shape[0] + MARGIN + 8), question, font, step, INK) + 4
    draw_lines(draw, (MARGIN, top), answer, font, step, INK)
    return cell
