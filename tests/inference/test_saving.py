"""Files of an answer: complete, exact, and replaced as a whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.masks import decode_rle, fill_polygons, mask_box
from pixelstory_jax.inference.answers import Answer, Target, phrases, readable
from pixelstory_jax.inference.overlay import Exchange
from pixelstory_jax.inference.saving import save_answers, write_whole


def exchange(pieces, masks) -> Exchange:
    named = zip(phrases(pieces), masks, strict=True)
    targets = tuple(Target(name, mask, 0.75, mask_box(mask)) for name, mask in named)
    return Exchange("Where?", Answer(readable(pieces), targets, pieces))


@pytest.fixture
def masks() -> np.ndarray:
    masks = np.zeros((2, 30, 40), bool)
    masks[0, 2:9, 3:20], masks[1, 12:25, 8:39] = True, True
    return masks


def test_files_hold_the_answer(tmp_path, masks):
    image = np.zeros((30, 40, 3), np.uint8)
    first = exchange(("The red car/../x is ", 0, " and the dog is ", 1, "."), masks)
    second = exchange(("Here ", 0, "."), masks[1:])
    paths = save_answers(tmp_path / "out", image, [first, second], {"checkpoint": "runs/x"})
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    written = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert written["checkpoint"] == "runs/x" and written["size"] == [30, 40] and len(written["turns"]) == 2
    for turn, said in zip(written["turns"], (first, second), strict=True):
        assert turn["text"] == said.answer.text and turn["phrases"] == said.answer.phrases
        for target, true in zip(turn["targets"], said.answer.targets, strict=True):
            np.testing.assert_array_equal(decode_rle(target["rle"]), true.mask)
            np.testing.assert_array_equal(fill_polygons(target["polygons"], (30, 40)), true.mask)
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / target["file"])) > 0, true.mask)
            assert target["score"] == 0.75 and target["area"] == true.mask.sum()


def test_a_second_answer_replaces_the_first(tmp_path, masks):
    image = np.zeros((30, 40, 3), np.uint8)
    (tmp_path / "mask_of_mine.png").write_bytes(b"mine")
    save_answers(tmp_path, image, [exchange(("The car ", 0, " and the dog ", 1, "."), masks)])
    save_answers(tmp_path, image, [exchange(("There is no car.",), [])])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "mask_of_mine.png", "overlay.png"]


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(TypeError):
        write_whole(path, "text")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
