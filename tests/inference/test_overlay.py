"""Pictures of answers have the parts that they promise."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.inference.answers import Answer, Target, phrases, readable
from pixelstory_jax.inference.overlay import (
    Exchange,
    colour_of,
    draw_answers,
    draw_text,
    font_of,
    length_of,
    overlay_masks,
)


def answer(pieces, masks) -> Answer:
    named = zip(phrases(pieces), masks, strict=True)
    return Answer(readable(pieces), tuple(Target(name, mask, 0.5, mask_box(mask)) for name, mask in named), pieces)


def test_masks_are_tinted_outlined_and_the_rest_is_not():
    image = np.full((100, 100, 3), 128, np.uint8)
    mask = np.zeros((100, 100), bool)
    mask[20:80, 20:80] = True
    drawn = overlay_masks(image, [mask], colours=[2], label=False)
    assert (drawn[20, 20:80] == colour_of(2)).all() and (drawn[0] == drawn[0, 0]).all()
    inside = drawn[50, 50].astype(float) - 128
    assert np.dot(inside, np.array(colour_of(2)) - 128.0) > 0 and tuple(drawn[50, 50]) != colour_of(2)
    np.testing.assert_array_equal(overlay_masks(image, []), image)


def contains(page: np.ndarray, colour) -> bool:
    return bool((page == colour).all(axis=-1).any())


@pytest.mark.parametrize("size", [(1, 1), (20, 20_000), (3000, 40), (480, 640)])
def test_pictures_of_any_shape(size):
    image, mask = np.zeros((*size, 3), np.uint8), np.ones(size, bool)
    first = Exchange("What is " + "x" * 200 + "?", answer(("Sure, ", 0, "."), [mask]))
    page = draw_answers(image, [first, Exchange("And?", answer((), []))])
    assert page.dtype == np.uint8 and 480 <= page.shape[1] <= 1632
    assert contains(page, colour_of(0))


def test_letters_that_the_font_of_pages_lacks_come_from_others():
    def drawn(text: str) -> np.ndarray:
        page = Image.new("L", (60, 40), 255)
        width = draw_text(ImageDraw.Draw(page), (10, 8), text, 0, font_of(20))
        assert width == length_of(text, font_of(20))
        return np.asarray(page)

    missing = np.asarray(drawn("\ue123"))  # no font has this
    shown = [drawn(text) for text in ("e", "é", "ß", "—", "中")]
    assert all((one < 128).any() and not np.array_equal(one, missing) for one in shown)
    rows = [np.flatnonzero((one < 128).any(axis=1)) for one in shown[:3]]
    assert rows[0][-1] == rows[1][-1] == rows[2][-1] and rows[1][0] < rows[0][0]  # on one line; the accent is above
