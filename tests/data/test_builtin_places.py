"""The drawn places: repeatable, varied, distinct, at every size."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.builtin.places import PLACES, draw_place
from pixelstory_jax.data.builtin.story_wording import PLACE_WORDS


def draw(name: str, number: int, size: int = 96) -> np.ndarray:
    return draw_place(name, np.random.default_rng((7, number)), size)


def test_every_place_has_words():
    assert len(PLACES) == 12 and set(PLACES) == set(PLACE_WORDS)


@pytest.mark.parametrize("name", PLACES)
def test_repeatable_varied_and_never_blank(name):
    pictures = [draw(name, number) for number in range(12)]
    np.testing.assert_array_equal(pictures[0], draw(name, 0))
    assert len({picture.tobytes() for picture in pictures}) == 12
    for picture in pictures:
        assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
        # Something is drawn above the ground, and on both halves.
        assert all(picture[:86, half].std((0, 1)).max() > 8 for half in (slice(0, 48), slice(48, 96)))


@pytest.mark.parametrize("size", [32, 48, 160, 161, 512])
def test_other_sizes_show_the_same_picture(size):
    for name in PLACES:
        picture = draw(name, 3, size)
        assert picture.shape == (size, size, 3)
        small = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BOX), np.float32)
        same = np.asarray(Image.fromarray(draw(name, 3)).resize((16, 16), Image.Resampling.BOX), np.float32)
        assert np.abs(small - same).mean() < 8


def test_places_can_be_told_apart():
    """Nearest mean of 6x6 thumbnails, fitted on other drawings than it is checked on."""

    def thumbnails(first: int) -> np.ndarray:
        pictures = [[Image.fromarray(draw(name, first + n)).resize((6, 6)) for n in range(15)] for name in PLACES]
        return np.array([[np.asarray(picture, np.float32).ravel() for picture in row] for row in pictures])

    means = thumbnails(0).mean(1)
    distances = np.abs(thumbnails(100)[:, :, None] - means).mean(-1)
    assert (distances.argmin(-1) == np.arange(len(PLACES))[:, None]).mean() > 0.98


def test_edges_are_smooth():
    """The outline of the full moon has colours between those of the disc and of the ring around it."""
    light = draw("hill", 1).sum(-1).astype(int)
    row = light[np.argmax((light > 600).sum(1))]
    last = np.flatnonzero(row > 650)[-1]
    edges = [light[y, x] for y, x in np.argwhere(light > 0) if row[last + 3] + 40 < light[y, x] < 600]
    assert len(edges) > 12


def test_odd_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown place 'school', expected one of beach"):
        draw("school", 0)
    for size in (0, 31, 4000):
        with pytest.raises(ValueError, match=f"32 to 1024 pixels, got {size}"):
            draw("beach", 0, size)


def test_drawn_fast():
    draw("beach", 0)
    started = time.process_time()
    for name in PLACES:
        for number in range(5):
            draw(name, number)
    # 1.2 ms on a desktop core; the limit leaves room for slow and busy machines.
    assert (time.process_time() - started) / (5 * len(PLACES)) < 0.008
