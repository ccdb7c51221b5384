"""The embedded characters, what a cast refuses, and how the files are made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.builtin import characters
from pixelstory_jax.data.builtin.characters import FRAME_SIZE, FRAMES, NAMES, POSES, Cast, builtin_cast
from pixelstory_jax.data.builtin.prepare_characters import IMAGES, prepare_characters
from pixelstory_jax.data.builtin.story_wording import ACTIONS
from pixelstory_jax.data.builtin.things import FOLDER


def test_six_characters_in_five_poses():
    cast = builtin_cast()
    assert len(cast) == 6 and len(set(cast.names)) == 6
    assert cast.pose_words == ("climbing", "falling", "jumping", "standing", "walking")
    assert set(cast.pose_words) <= set(ACTIONS)
    assert sorted(frame for frames in POSES.values() for frame in frames) == sorted(FRAMES) and len(FRAMES) == 13
    frames = [cast.sprite(number, frame) for number in range(6) for frame in FRAMES]
    assert all(frame.shape == (128, 96, 4) and frame.dtype == np.uint8 for frame in frames)
    assert len({frame.tobytes() for frame in frames}) == 78
    for frame in frames:  # A figure with a soft edge on a clear ground, not a filled or an empty box.
        assert 0.2 < (frame[..., 3] > 127).mean() < 0.6
        assert not frame[frame[..., 3] == 0].any()
    heights = [np.flatnonzero(cast.sprite(number, "idle")[..., 3].any(1)) for number in range(6)]
    assert 90 < np.median([rows[-1] + 1 - rows[0] for rows in heights]) < 106 == cast.height + 6


def test_licence_and_size():
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    section = notice[notice.index("assets/characters") :]
    for fact in ("Kenney", "arcade", "3.3.3", "CC0"):
        assert fact in section
    files = sorted(characters.ATLASES.iterdir())
    assert [path.stem for path in files] == sorted(NAMES)
    assert sum(path.stat().st_size for path in files) < 400_000


def test_unusable_casts_are_refused():
    cast = builtin_cast()
    sprite = np.full((8, 8, 4), 255, np.uint8)
    one = Cast(("a box",), ({"still": sprite},), ({"standing": ("still",)},), 8)
    for change, message in (
        ({"names": ("a box", "a cone")}, "2 names, 1 sets"),
        ({"names": ("box",)}, "'box' must be a noun phrase"),
        ({"poses": ({"standing": ("gone",)},)}, "'a box' lacks frames of the pose 'standing': gone"),
        ({"poses": ({},)}, "'a box' has no pose"),
        ({"sprites": ({"still": sprite[..., :3]},)}, r"RGBA uint8 \[h, w, 4\], got uint8 \[8, 8, 3\]"),
        ({"sprites": ({"still": np.zeros_like(sprite)},)}, "'still' of 'a box' is fully transparent"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(one, **change)
    with pytest.raises(ValueError, match="repeated: a robot"):
        dataclasses.replace(cast, names=("a robot",) * 6)


@pytest.fixture
def package(tmp_path):
    """A stand-in for the unpacked wheel: frames of coarse random patches."""
    rng = np.random.default_rng(0)
    for file in NAMES:
        folder = tmp_path / "wheel/arcade" / IMAGES / file
        folder.mkdir(parents=True)
        first, *others = file.split("_")
        stem = first + "".join(word.capitalize() for word in others)
        for frame in FRAMES:
            patches = Image.fromarray(rng.integers(0, 256, (2, 2, 4), dtype=np.uint8))
            patches.resize(FRAME_SIZE, Image.Resampling.NEAREST).save(folder / f"{stem}_{frame}.png")
    return tmp_path / "wheel"


def test_packed_without_loss_and_always_alike(package, tmp_path, monkeypatch):
    monkeypatch.setattr(
        characters, "NAMES", {"female_person": "a girl", "robot": "a robot"}
    )  # two are quicker than six
    prepare_characters(package, tmp_path / "first")
    prepare_characters(package / "arcade", tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    monkeypatch.setattr(characters, "ATLASES", tmp_path / "first")
    folder = package / "arcade" / IMAGES / "female_person"
    frames = characters._read_atlas("female_person")
    for frame in FRAMES:
        original = np.asarray(Image.open(folder / f"femalePerson_{frame}.png"))
        visible = original[..., 3] > 0
        np.testing.assert_array_equal(frames[frame][visible], original[visible])
        np.testing.assert_array_equal(frames[frame][..., 3], original[..., 3])


def test_missing_and_odd_frames_are_named(package, tmp_path):
    robot = package / "arcade" / IMAGES / "robot"
    Image.new("RGBA", (10, 10)).save(robot / "robot_idle.png")
    with pytest.raises(ValueError, match="robot_idle.png is 10x10 pixels, expected 96x128"):
        prepare_characters(package, tmp_path / "target")
    for name in ("robot_idle", "robot_walk3"):
        (robot / f"{name}.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the pictures robot_idle.png, robot_walk3.png"):
        prepare_characters(package, tmp_path / "target")
    assert not (tmp_path / "target").exists()
