"""Stories out of a folder: which panels an example has, how pictures are cut, and what is said about faulty folders."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.data.pipeline import DataError, make_iterator
from pixelstory_jax.data.story_folder import StoryFolder, StoryFolderError


def half_and_half(number: int, size: int = 16) -> np.ndarray:
    """Black on the left; the right half's red tells which picture it is."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[:, size // 2 :, 0] = 40 * number
    return picture


def write_folder(folder: Path, stories: list[dict | str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(1, 7):
        Image.fromarray(half_and_half(number)).save(folder / f"{number}.png")
    lines = [story if isinstance(story, str) else json.dumps(story) for story in stories]
    (folder / "stories.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def story(*numbers: int, **fields: str) -> dict:
    return {"panels": [{"image": f"{number}.png", "caption": f"picture {number}"} for number in numbers], **fields}


def open_folder(folder: Path, panels: int = 3, split: str = "train", **changes: int) -> StoryFolder:
    encoders = {"tokens": small_clip_tokenizer().encode}
    return StoryFolder(folder, encoders, **{"seed": 5, "split": split, "size": 16, "panels": panels, **changes})


def shown(stories: StoryFolder, index: int) -> list[tuple[int, bool]]:
    return [(int(panel.image.stem), panel.mirrored) for panel in stories.panels(index)]


def test_pictures_and_tokens_of_an_example(tmp_path):
    stories = open_folder(write_folder(tmp_path, [story(2, 4, 6), "", story(1, 2, 3)]))
    assert len(stories) == 2
    example = stories[0]
    np.testing.assert_array_equal(example["images"], [half_and_half(number) for number in (2, 4, 6)])
    tokenizer = small_clip_tokenizer()
    np.testing.assert_array_equal(example["tokens"], [tokenizer.encode(f"picture {number}") for number in (2, 4, 6)])
    assert example["tokens"].dtype == np.int32
    with pytest.raises(IndexError, match="example 2 does not exist, there are 2"):
        stories[2]


def test_each_encoder_has_its_field(tmp_path):
    write_folder(tmp_path, [story(1)])
    encoders = {"tokens": lambda text: np.full(3, len(text)), "tokens_2": lambda text: np.arange(5)}
    example = StoryFolder(tmp_path, encoders, seed=0, split="train", size=8, panels=2)[0]
    np.testing.assert_array_equal(example["tokens"], np.full((2, 3), len("picture 1")))
    np.testing.assert_array_equal(example["tokens_2"], np.tile(np.arange(5), (2, 1)))


def test_a_long_story_gives_runs_of_consecutive_panels(tmp_path):
    write_folder(tmp_path, [story(1, 2, 3, 4, 5, 6), story(3, 2, 1)])
    stories = open_folder(tmp_path, draws=60)
    assert len(stories) == 120
    runs = [shown(stories, index) for index in range(0, 120, 2)]
    firsts = {run[0][0] for run in runs}
    assert firsts == {1, 2, 3, 4}
    assert all(run == [(run[0][0] + step, False) for step in range(3)] for run in runs)
    assert all(shown(stories, index) == [(3, False), (2, False), (1, False)] for index in range(1, 120, 2))
    again, other = open_folder(tmp_path, draws=60), open_folder(tmp_path, draws=60, seed=6)
    assert [shown(again, index) for index in range(0, 120, 2)] == runs
    assert [shown(other, index) for index in range(0, 120, 2)] != runs


def test_a_short_story_is_repeated_and_mirrored_in_turn(tmp_path):
    stories = open_folder(write_folder(tmp_path, [story(2, 5)]), panels=5)
    assert shown(stories, 0) == [(2, False), (5, False), (2, True), (5, True), (2, False)]
    images = stories[0]["images"]
    np.testing.assert_array_equal(images[2], half_and_half(2)[:, ::-1])
    np.testing.assert_array_equal(images[4], images[0])


def test_pictures_are_cut_to_the_middle_square_and_resized(tmp_path):
    write_folder(tmp_path, [story(1)])
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64, 1] = 200  # the middle square alone is green
    Image.fromarray(wide).save(tmp_path / "1.png")
    for size in (16, 64):
        np.testing.assert_array_equal(
            open_folder(tmp_path, panels=1, size=size)[0]["images"][0], np.full((size, size, 3), (0, 200, 0))
        )


def test_odd_modes_are_read(tmp_path):
    """A palette with a transparent colour comes out on white."""
    write_folder(tmp_path, [story(1)])
    Image.fromarray(np.zeros((16, 16), np.uint8), "P").save(tmp_path / "1.png", transparency=0)
    assert open_folder(tmp_path, panels=1)[0]["images"].min() == 255


def test_splits(tmp_path):
    write_folder(tmp_path, [story(1), story(2, split="test"), story(3, split="train")])
    train, test = open_folder(tmp_path, panels=1), open_folder(tmp_path, panels=1, split="test")
    assert [shown(train, index)[0][0] for index in range(len(train))] == [1, 3]
    assert len(test) == 1 and shown(test, 0) == [(2, False)]


def test_the_digest_is_that_of_the_list(tmp_path):
    first = open_folder(write_folder(tmp_path, [story(1)])).digest
    assert open_folder(write_folder(tmp_path, [story(1)])).digest == first
    assert open_folder(write_folder(tmp_path, [story(2)])).digest != first


def test_batches_and_worker_processes(tmp_path):
    """The source can be sent to other processes, and its examples stack."""
    stories = pickle.loads(pickle.dumps(open_folder(write_folder(tmp_path, [story(1, 2), story(3, 4, 5, 6)]))))
    batch = next(make_iterator(stories, 2, threads=0))
    assert batch["images"].shape == (2, 3, 16, 16, 3) and batch["tokens"].shape[:2] == (2, 3)


def write_faulty(folder: Path, line: str) -> Path:
    return write_folder(folder, [story(1), line])


FAULTS = {
    "{": r"not JSON .*a story is \{",
    "[1]": 'no list "panels"',
    '{"panels": []}': 'no list "panels" with anything in it',
    '{"panels": ["1.png"]}': "panel 1 is not",
    '{"panels": [{"image": "1.png"}]}': 'panel 1 has no "caption"',
    '{"panels": [{"image": "1.png", "caption": " "}]}': 'no "caption", or an empty one',
    '{"panels": [{"image": "1.png", "caption": "a"}, {"caption": "a"}]}': 'panel 2 has no "image"',
    '{"panels": [{"image": "1.png", "caption": "\\ud800"}]}': '"caption" of panel 1 is not valid text',
    '{"panels": [{"image": "7.png", "caption": "a"}]}': "picture of panel 1 is missing: there is no file .*7.png",
    '{"panels": [{"image": ".", "caption": "a"}]}': "picture of panel 1 is missing",
    '{"panels": [{"image": "a\\u0000.png", "caption": "a"}]}': "cannot be reached",
    '{"panels": [{"image": "../secret.png", "caption": "a"}]}': "lies outside the folder",
    '{"panels": [{"image": "link.png", "caption": "a"}]}': "lies outside the folder; put it, not a link to it",
    '{"panels": [{"image": "1.png", "caption": "a"}], "split": "dev"}': "\"split\" is 'dev'; it is one of train, test",
}


@pytest.mark.parametrize("line", FAULTS)
def test_faults_are_one_sentence_with_file_and_line(tmp_path, line):
    secret = tmp_path / "secret.png"
    Image.fromarray(half_and_half(1)).save(secret)
    folder = write_faulty(tmp_path / "stories", line)
    (folder / "link.png").symlink_to(secret)
    with pytest.raises(StoryFolderError, match=FAULTS[line]) as error:
        open_folder(folder)
    assert str(error.value).startswith(f"{folder / 'stories.jsonl'}, line 2: ") and "\n" not in str(error.value)


def test_text_that_is_not_utf_8(tmp_path):
    write_folder(tmp_path, [])
    (tmp_path / "stories.jsonl").write_bytes(b'\xef\xbb\xbf{"panels": [{"image": "1.png", "caption": "a"}]}\n"\xff"')
    with pytest.raises(StoryFolderError, match="line 2: the text is not UTF-8"):
        open_folder(tmp_path)


def test_damaged_pictures_are_named_with_their_line(tmp_path):
    write_folder(tmp_path, [story(1), story(2)])
    (tmp_path / "2.png").write_bytes(b"no picture")
    stories = open_folder(tmp_path)
    assert stories[0]["images"].any()
    with pytest.raises(StoryFolderError, match=r"stories\.jsonl, line 2: .*2\.png is not a picture"):
        stories[1]


def test_missing_files_and_empty_splits(tmp_path):
    with pytest.raises(DataError, match=r"stories\.jsonl cannot be read \(No such file"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(StoryFolderError, match="no story of the split 'test' among its 1"):
        open_folder(write_folder(tmp_path, [story(1)]), split="test")


@pytest.mark.parametrize("changes", [{"seed": -1}, {"size": 0}, {"panels": 0}, {"draws": 0}, {"split": "dev"}])
def test_arguments_out_of_range(tmp_path, changes):
    with pytest.raises(ValueError, match="expected one of|needs a seed of at least 0"):
        open_folder(write_folder(tmp_path, [story(1)]), **changes)
