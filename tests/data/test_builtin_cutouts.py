"""Photo cut-outs from a folder: a miniature of the unpacked package stands in for the real one."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixelstory_jax.data.builtin import AskedScenes, compose, cutouts
from pixelstory_jax.data.builtin.cutouts import cutout_library, short_name
from pixelstory_jax.data.builtin.things import read_table

NAMES = {
    "animals/mammals/cats/lion": "A lion.",
    "animals/mammals/rodents/rabbit": "A big eared rabbit.",
    "animals/birds/rooster": "A colorful rooster.",
    "animals/fish/clownfish": "A clownfish.",
    "food/fruit/apple_red": "A red apple.",
    "food/fruit/grapes": "A bunch of grapes.",
    "food/vegetables/carrot": "A carrot.",
    "hobbies/music/string/violin": "A violin.",
    "household/tools/hammer": "A hammer.",
    "household/arttools/scissors": "A pair of closed scissors.",
    "vehicles/auto/sedan": "A sedan car.",
    "vehicles/flight/planes/747": "An airplane.",
    "plants/flowers/iris": "An iris.",
    "sports/basketball": "A basketball.",
}
FILLERS = (
    "otter",
    "badger",
    "yak",
    "ferret",
    "marmot",
    "wombat",
    "bison",
    "donkey",
    "camel",
    "gorilla",
    "zebra",
    "goat",
)


def write_stamp(root, path: str, description: str, number: int = 0) -> None:
    target = root / f"{path}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (80, 60))
    ImageDraw.Draw(picture).ellipse((10, 5, 60 + number % 10, 50), fill=(10 * number % 256, 90, 200, 255))
    picture.save(target)
    target.with_suffix(".txt").write_text(f"{description}\nde.utf8=Etwas.\n", encoding="utf-8")


@pytest.fixture
def stamps(tmp_path):
    root = tmp_path / "unpacked" / "usr/share/tuxpaint/stamps"
    for number, (path, description) in enumerate(NAMES.items()):
        write_stamp(root, path, description, number)
    for number, name in enumerate(FILLERS):
        write_stamp(root, f"animals/mammals/{name}", f"A {name}.", number)
    write_stamp(root, "animals/mammals/cartoon/cat", "A cat.")
    write_stamp(root, "symbols/music/note", "A note.")
    write_stamp(root, "animals/birds/long", "This bird is a very long story, and not a name.")
    return tmp_path / "unpacked"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "cutouts.npz"


def test_names_categories_and_splits(stamps, cache):
    library = cutout_library(stamps, cache)
    by_name = {thing.name: thing for thing in library.things}
    things = {thing.name: thing for thing in read_table()}
    assert set(by_name) == {
        "lion", "rabbit", "rooster", "clownfish", "apple", "grapes", "carrot", "violin", "hammer", "scissors", "car",
        "airplane", "iris", "basketball", *FILLERS,
    }  # fmt: skip
    assert by_name["apple"].belongs("fruit") and by_name["apple"].has("edible") and by_name["apple"].colour == ""
    assert by_name["clownfish"].confusable(things["fish"]) and not by_name["lion"].confusable(things["fish"])
    assert by_name["lion"].confusable(things["cat"])  # what the table says of a name holds for its photo
    assert by_name["clownfish"].belongs("sea animal") and by_name["clownfish"].has("lives_in_water")
    assert by_name["iris"].with_article == "an iris" and by_name["iris"].plural == "irises"
    assert by_name["grapes"].is_plural and by_name["scissors"].is_plural
    assert by_name["zebra"].split == "train" and by_name["gorilla"].split == by_name["goat"].split == "unseen"
    assert library.pool("train") and library.pool("unseen")
    assert max(library.pictures[0].shape[:2]) == cutouts.LONG_SIDE


def test_scenes_are_composed_of_them(stamps, cache):
    library = cutout_library(stamps, cache)
    names = {thing.name for thing in library.things}
    assert all(set(compose(0, index, "train", library=library).names) <= names for index in range(5))
    scene, conversations = AskedScenes(seed=0, split="unseen", library=library)[0]
    assert conversations and any(thing.split == "unseen" for thing in scene.things)


def test_converts_once_and_writes_nothing_half(stamps, cache, monkeypatch):
    first = cutout_library(stamps, cache)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    monkeypatch.setattr(cutouts, "_convert", lambda *_: pytest.fail("converted again"))
    again = cutout_library(stamps, cache)
    assert again.things == first.things
    for one, other in zip(first.pictures, again.pictures, strict=True):
        np.testing.assert_array_equal(one, other)


def test_changed_stamps_and_damaged_caches_are_converted_anew(stamps, cache):
    cutout_library(stamps, cache)
    write_stamp(stamps / "usr/share/tuxpaint/stamps", "animals/mammals/tapir", "A tapir.")
    assert "tapir" in cutout_library(stamps, cache).index
    cache.write_bytes(cache.read_bytes()[:200])
    assert "tapir" in cutout_library(stamps, cache).index
    cache.write_bytes(b"not an archive")
    assert "tapir" in cutout_library(stamps, cache).index


def test_a_failed_write_leaves_no_file(stamps, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        cutout_library(stamps, cache)
    assert not os.listdir(cache.parent)


def test_damaged_stamps_are_left_out(stamps, cache):
    root = stamps / "usr/share/tuxpaint/stamps"
    (root / "animals/mammals/cats/lion.png").write_bytes(b"\x89PNG nothing")
    Image.fromarray(np.zeros((9, 9, 4), np.uint8), "RGBA").save(root / "food/vegetables/carrot.png")
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(root / "sports/basketball.png")
    names = set(cutout_library(stamps, cache).index)
    assert not names & {"lion", "carrot", "basketball"} and "apple" in names


@pytest.mark.parametrize("folder", [None, "", "nowhere"])
def test_a_missing_folder_is_answered_with_the_command(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get download tuxpaint-stamps-default"):
        cutout_library(folder and tmp_path / folder, tmp_path / "cache.npz")


def test_too_few_stamps(tmp_path):
    write_stamp(tmp_path, "animals/mammals/lion", "A lion.")
    with pytest.raises(FileNotFoundError, match="1 usable stamps"):
        cutout_library(tmp_path, tmp_path / "cache.npz")


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("A cheetah.", "cheetah"),
        ("A male black rhino.", "rhino"),
        ("A “Granny Smith” apple.", "apple"),
        ("An albino peahen (a female peafowl, or peacock).", "peahen"),
        ("A kiwifruit.", "kiwi"),
        ("Eat your broccoli!", None),
        ("We remember those who have died.", None),
        ("A football used in Australian Rules.", None),
        ("", None),
    ],
)
def test_short_names(description, name):
    assert short_name(description) == name
