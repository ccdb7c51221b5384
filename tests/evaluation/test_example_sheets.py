"""Pages of training examples: what is drawn where."""

from __future__ import annotations

import dataclasses

import numpy as np

from pixelstory_jax.data.annotations import Example, Provenance
from pixelstory_jax.data.builtin.questions import question
from pixelstory_jax.evaluation.example_sheets import example_sheet, hatched
from pixelstory_jax.inference.overlay import MARGIN, PALE_INK, colour_of

SIDE = 320


def example() -> Example:
    """A grey square whose left third is asked for, and whose right third is ignored."""
    masks = np.zeros((2, 60, 60), bool)
    masks[0, :, :20] = masks[1, :10] = True
    ignored = np.zeros((60, 60), bool)
    ignored[:, 40:] = True
    turns = (question("names", "Where are both?", ("The first ", 1, " and the other ", 0, ".")),)
    return Example(
        np.full((60, 60, 3), 128, np.uint8), masks, (turns,), Provenance("toy", "train", "a.jpg", "7"), ignored
    )


def test_masks_phrases_and_ignored_areas_are_shown():
    sheet = example_sheet([example()], "toy", side=SIDE)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 2 * SIDE + 3 * MARGIN
    marked = sheet[:, 2 * MARGIN + SIDE : 2 * MARGIN + 2 * SIDE]
    picture = sheet[:, MARGIN : MARGIN + SIDE]

    def share(part: np.ndarray, colour: tuple[int, int, int]) -> float:
        return float((part == colour).all(-1).mean())

    for number in range(2):
        assert share(marked, colour_of(number)) > 0.002  # the outline
    top = np.flatnonzero((sheet == colour_of(1)).all(-1).any(1))[-1]  # the answer is below the picture
    assert top > SIDE and (sheet[top:] == colour_of(0)).all(-1).sum() < (sheet == colour_of(0)).all(-1).sum()
    right = marked[100:300, 2 * SIDE // 3 + 8 :]
    assert 0.2 < share(right, PALE_INK) < 0.5 and share(marked[100:300, SIDE // 3 + 8 : SIDE // 2], PALE_INK) == 0
    assert share(picture[60 : 60 + SIDE], (128, 128, 128)) > 0.9


def test_examples_without_masks_show_the_picture_once():
    bare = dataclasses.replace(
        example(),
        masks=np.zeros((0, 60, 60), bool),
        conversations=((question("dialogue", "What?", ("Grey.",)),),),
        ignored=None,
    )
    sheet = example_sheet([bare, example(), bare], side=SIDE)
    assert sheet.shape[1] == 2 * (2 * SIDE + 3 * MARGIN)
    second = sheet[20:SIDE, 2 * MARGIN + SIDE : 2 * MARGIN + 2 * SIDE]
    assert (second == 255).all()


def test_hatching_leaves_the_rest():
    area = np.zeros((20, 20), bool)
    area[5:15] = True
    lines = (hatched(np.zeros((20, 20, 3), np.uint8), area) == PALE_INK).all(-1)
    assert not lines[~area].any() and 0.2 < lines[area].mean() < 0.5
