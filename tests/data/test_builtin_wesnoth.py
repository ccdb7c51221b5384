"""Characters from a folder: a miniature of the unpacked package stands in for the real one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixelstory_jax.data.builtin.places import PLACES
from pixelstory_jax.data.builtin.stories import StorySource, labelled_panels
from pixelstory_jax.data.builtin.story_wording import ACTIONS
from pixelstory_jax.data.builtin.wesnoth import _POSE_WORDS, pose_of, split_of, unit_types, wesnoth_cast

MAGENTA = (0xEC, 0x00, 0x8C)
UNITS = [f"{kind} {job}" for kind in ("Elvish", "Orcish", "Dune") for job in ("Archer", "Guard", "Rider", "Mage")]
FRAMES = ("", "-bow-attack-1", "-bow-attack-2", "-defend1", "-die-1", "-se-run-3", "-halo-1")


def figure(width: int = 24, height: int = 48, side: int = 72) -> Image.Image:
    """A brown figure with a coat in the colour of the side, its feet at three quarters of the canvas."""
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)
    left, bottom = side // 2 - width // 2, side * 3 // 4
    draw.rectangle((left, bottom - height, left + width - 1, bottom - 1), (120, 80, 40, 255))
    draw.rectangle((left + 4, bottom - height + 8, left + width - 5, bottom - 9), (*MAGENTA, 255))
    return picture


def write_unit(core, name: str, frames=FRAMES, race: str = "people", **shape) -> None:
    stem = name.lower().replace(" ", "-")
    images, units = core / "images/units" / race, core / "units" / race
    for folder in (images, units):
        folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        figure(**{"width": 24 + 2 * number, **shape}).save(images / f"{stem}{frame}.png")
    block = f'[unit_type]\n    id={name}\n    name= _ "{name}"\n    image="units/{race}/{stem}.png"\n[/unit_type]\n'
    (units / f"{stem}.cfg").write_text("#textdomain wesnoth-units\n" + block, encoding="utf-8")


@pytest.fixture
def package(tmp_path):
    """Twenty-four types, so that both splits have enough."""
    core = tmp_path / "unpacked/usr/share/games/wesnoth/1.16/data/core"
    for name in UNITS:
        write_unit(core, name)
        write_unit(core, f"Great {name}", race="people/great")
    return tmp_path / "unpacked"


def core_of(package):
    return package / "usr/share/games/wesnoth/1.16/data/core"


def by_name(package) -> dict[str, tuple]:
    found = {}
    for split in ("train", "test"):
        cast = wesnoth_cast(package, split)
        for number, name in enumerate(cast.names):
            assert name not in found and split_of(name) == split
            found[name] = cast.poses[number], cast.sprites[number]
    return found


def test_names_poses_and_splits(package, monkeypatch):
    monkeypatch.setattr("pixelstory_jax.data.builtin.wesnoth.MIN_CHARACTERS", 1)
    found = by_name(package)
    assert len(found) == 2 * len(UNITS)
    poses, sprites = found["an elvish archer"]
    assert poses == {
        "standing": ("elvish-archer",),
        "shooting": ("elvish-archer-bow-attack-1", "elvish-archer-bow-attack-2"),
        "defending": ("elvish-archer-defend1",),
        "dying": ("elvish-archer-die-1",),
        "running": ("elvish-archer-se-run-3",),
    }
    assert set(sprites) == {frame for frames in poses.values() for frame in frames}  # no halo
    assert sprites["elvish-archer"].shape == (48, 24, 4)
    assert wesnoth_cast(package, "train").height == 48
    assert "a great dune mage" in found
    for folder in (core_of(package), core_of(package).parent):
        assert wesnoth_cast(folder, "train").names == wesnoth_cast(package, "train").names


def test_every_pose_has_verbs():
    assert {pose for pose, _ in _POSE_WORDS} - {"left out"} <= set(ACTIONS)


def test_coats_have_one_colour_a_character(package, monkeypatch):
    monkeypatch.setattr("pixelstory_jax.data.builtin.wesnoth.MIN_CHARACTERS", 1)
    coats = {}
    for name, (_, sprites) in by_name(package).items():
        of_name = {tuple(sprite[20, sprite.shape[1] // 2, :3]) for sprite in sprites.values()}
        assert len(of_name) == 1
        coats[name] = of_name.pop()
        assert coats[name] != MAGENTA and max(coats[name]) == max(MAGENTA) and min(coats[name]) == 0
        assert all(tuple(sprite[1, 1]) == (120, 80, 40, 255) for sprite in sprites.values())
    assert len(set(coats.values())) >= 3


def test_stories_of_them(package):
    cast = wesnoth_cast(package, "train")
    stories = StorySource(cast, lambda caption: np.zeros(5, np.int32), seed=0, split="train", size=64)
    example = stories[0]
    assert example["images"].shape == (4, 64, 64, 3)
    images, characters, poses, places = labelled_panels(cast, 12, 0, "train", 64)
    assert images.std((1, 2, 3)).min() > 5
    assert characters.max() < len(cast) and poses.max() < len(cast.pose_words) and places.max() < len(PLACES)


def test_too_few_frames_large_ones_remainders_and_damaged_files_are_left_out(package, monkeypatch):
    monkeypatch.setattr("pixelstory_jax.data.builtin.wesnoth.MIN_CHARACTERS", 1)
    core = core_of(package)
    write_unit(core, "Orcish Boat", frames=("", "-attack-1", "-defend"))
    write_unit(core, "Stone Giant", side=200)
    images = core / "images/units/people"
    (images / "elvish-guard-die-1.png").write_bytes(b"\x89PNG nothing")
    figure(width=10).save(images / "elvish-rider-die-1.png")
    Image.new("RGBA", (72, 72)).save(images / "elvish-mage-die-1.png")
    found = by_name(package)
    assert not {"an orcish boat", "a stone giant"} & set(found)
    assert "an elvish guard" in found and "dying" not in found["an elvish guard"][0]
    assert "dying" not in found["an elvish rider"][0] and "dying" not in found["an elvish mage"][0]
    (images / "elvish-guard.png").unlink()
    assert "an elvish guard" not in by_name(package)


def test_frames_belong_to_the_longest_name(package, monkeypatch):
    monkeypatch.setattr("pixelstory_jax.data.builtin.wesnoth.MIN_CHARACTERS", 1)
    write_unit(core_of(package), "Elvish Archer Lord", frames=("", *(f"-melee-{n}" for n in range(5))))
    found = by_name(package)
    assert "attacking" not in found["an elvish archer"][0]
    assert len(found["an elvish archer lord"][0]["attacking"]) == 5


@pytest.mark.parametrize("folder", [None, "", "nowhere"])
def test_a_missing_folder_is_answered_with_the_command(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download wesnoth-1.16-data"):
        wesnoth_cast(folder and tmp_path / folder, "train")


def test_wrong_splits_and_too_few_characters(package, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'unseen', expected one of train, test"):
        wesnoth_cast(package, "unseen")
    core = tmp_path / "small/core"
    write_unit(core, "Elvish Archer")
    with pytest.raises(FileNotFoundError, match=r"[01] usable characters of the split train, expected at least 5"):
        wesnoth_cast(tmp_path / "small", "train")


@pytest.mark.parametrize(
    ("rest", "pose"),
    [
        ("", "standing"),
        ("-1", "standing"),
        ("-ne-3", "standing"),
        ("-idle-4", "standing"),
        ("-bow-attack-2", "shooting"),
        ("-bow-defend", "defending"),
        ("-s-attack5", "attacking"),
        ("-2claws", "attacking"),
        ("-magic-1", "casting"),
        ("-flying-8", "flying"),
        ("-attack-halo", None),
        ("-teleport-3", None),
    ],
)
def test_poses_from_file_names(rest, pose):
    assert pose_of(rest) == pose


def test_unit_types_of_a_file():
    text = """#define PATH
units/elves/#enddef
[unit_type]
    id=Elvish Archer
    name= _ "Elvish Archer"
    image="{PATH}archer.png"
    [attack]
        name=bow
        image="units/elves/wrong.png"
    [/attack]
    [female]
        name= _ "female^Elvish Archer"
        image="units/elves/archer+female.png"
    [/female]
[/unit_type]
[unit_type]
    name= _"Sorcerer"
    image="units/sorcerer.png"
    [female]
        name= _ "Sorceress"
        image="units/sorceress.png"
    [/female]
[/unit_type]
[unit_type]
    name= _ "Escaped"
    image="units/../../secret.png"
[/unit_type]
[unit_type]
    name= _ "Mal-Ravanal's $ghost"
    image="units/ghost.png"
[/unit_type]
"""
    assert list(unit_types(text)) == [
        ("units/elves/archer.png", "an elvish archer"),
        ("units/elves/archer+female.png", "a female elvish archer"),
        ("units/sorcerer.png", "a sorcerer"),
        ("units/sorceress.png", "a sorceress"),
    ]
