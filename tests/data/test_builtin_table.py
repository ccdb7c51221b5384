"""The reviewed table of embedded things, their pictures and the command that makes them."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.builtin import backgrounds, prepare_assets, things
from pixelstory_jax.data.builtin.things import ATTRIBUTES, CATEGORIES, Thing, ThingLibrary, builtin_library, read_table

TABLE = read_table()
# Hues in degrees that a colour name covers; the emoji's red leans to crimson and their brown to dark red.
HUES = {
    "red": (330, 20),
    "orange": (0, 50),
    "yellow": (25, 75),
    "green": (55, 190),
    "blue": (170, 265),
    "purple": (215, 330),
    "pink": (290, 20),
    "brown": (300, 50),
}


def colourful_share(picture: np.ndarray, colour: str) -> float:
    """Share of the opaque pixels that a colour name covers."""
    rgb = picture[picture[..., 3] > 127][:, :3].astype(np.float64) / 255
    low, high = rgb.min(1), rgb.max(1)
    if colour in ("black", "white", "gray"):
        plain = high - low < 0.25
        bright = {"black": high < 0.4, "white": low > 0.6, "gray": (high > 0.3) & (low < 0.9)}[colour]
        return float((plain & bright).mean())
    span = np.maximum(high - low, 1e-9)
    red, green, blue = rgb.T
    hue = np.where(high == red, (green - blue) / span % 6, np.where(high == green, (blue - red) / span + 2, 0))
    hue = 60 * np.where((high == blue) & (high != red) & (high != green), (red - green) / span + 4, hue)
    first, last = HUES[colour]
    inside = (hue >= first) & (hue <= last) if first < last else (hue >= first) | (hue <= last)
    return float((inside & (high - low > 0.08)).mean())


def test_enough_names_in_disjoint_splits():
    trained = {thing.name for thing in TABLE if thing.split == "train"}
    unseen = {thing.name for thing in TABLE if thing.split == "unseen"}
    assert len(trained) >= 120 and len(unseen) >= 30
    assert not trained & unseen
    assert len(TABLE) == len(trained) + len(unseen)


def test_every_category_of_unseen_things_has_trained_members():
    trained = {thing.category for thing in TABLE if thing.split == "train"}
    assert {thing.category for thing in TABLE if thing.split == "unseen"} == trained == set(CATEGORIES)


def test_every_cell_is_recorded():
    for thing in TABLE:
        assert [name for name, _ in thing.attributes] == list(ATTRIBUTES)
        assert all(value in (True, False, None) for _, value in thing.attributes)
        assert thing.belongs(thing.category) is not False
        assert thing.plural and thing.name == thing.name.lower()
        assert bool(thing.article) == (thing.number == "count")


def test_articles_and_plurals():
    by_name = {thing.name: thing for thing in TABLE}
    assert by_name["apple"].with_article == "an apple"
    assert by_name["mouse"].plural == "mice"
    assert by_name["scissors"].with_article == "scissors" and by_name["scissors"].is_plural
    for thing in TABLE:
        if thing.number == "count":
            assert thing.article == ("an" if thing.name[0] in "aeiou" else "a"), thing.name


def test_attributes_fit_the_categories():
    for thing in TABLE:
        assert not (thing.has("edible") and thing.category != "food"), thing.name
        assert not (thing.has("makes_music") and thing.category != "instrument"), thing.name
        assert not (thing.has("lives_in_water") and thing.category != "animal"), thing.name
        assert not (thing.has("grows") and thing.category not in ("food", "plant")), thing.name
        if thing.belongs("insect") or thing.belongs("bird"):
            # Some pictures show an animal without its legs: then it is not said.
            assert thing.has("has_legs") is not False and thing.category == "animal", thing.name
        if thing.belongs("sea animal"):
            assert thing.category == "animal" and thing.has("lives_in_water"), thing.name
        if thing.belongs("fruit") or thing.belongs("vegetable"):
            assert thing.has("edible") and thing.has("grows"), thing.name


BY_NAME = {thing.name: thing for thing in TABLE}


@pytest.mark.parametrize(
    ("name", "others"),
    {
        "shark": "fish",
        "cake": "candle|cupcake",
        "snowman": "scarf|top hat|cap|carrot",
        "hamburger": "cheese|tomato|bread",
        "pizza": "cheese|tomato",
        "taco": "cheese|tomato",
        "sandwich": "cheese|tomato|bread",
        "hot dog": "bread",
        "alarm clock": "bell|watch",
        "house": "hut|school|castle",
        "castle": "school|hut",
        "pen": "pencil|crayon",
        "pencil": "crayon",
        "van": "car|bus|truck|ambulance",
        "ambulance": "car|bus|truck",
        "tiger": "cat",
        "ice skate": "boot|roller skate",
    }.items(),
)
def test_names_that_a_picture_shows_beside_its_own(name, others):
    for other in others.split("|"):
        assert BY_NAME[name].confusable(BY_NAME[other]) and BY_NAME[other].confusable(BY_NAME[name]), other


def test_things_that_only_share_a_part_may_meet():
    """What the hamburger shows does not join tomato and cheese, nor the van the car and the bus."""
    for name, other in (("tomato", "cheese"), ("car", "bus"), ("car", "truck"), ("candle", "scarf"), ("cat", "dog")):
        assert not BY_NAME[name].confusable(BY_NAME[other])


def test_what_a_picture_leaves_open_is_neither_claimed_nor_denied():
    groups = {
        "snowman": "hat clothing vegetable",
        "hamburger": "vegetable",
        "taco": "vegetable",
        "pizza": "vegetable",
        "sandwich": "vegetable",
        "ice skate": "shoe clothing",
        "roller skate": "shoe clothing",
        "canoe": "sport",
    }
    for name, listed in groups.items():
        assert [BY_NAME[name].belongs(group) for group in listed.split()] == [None] * len(listed.split()), name
    attributes = {"snowman": "is_worn", "swan": "has_legs", "duck": "has_legs", "butterfly": "has_legs"}
    attributes |= dict.fromkeys(("car", "bus", "truck", "van", "tractor", "motorcycle"), "is_electric")
    for name, attribute in attributes.items():
        assert BY_NAME[name].has(attribute) is None, name


def test_colours_agree_with_the_pictures():
    library = builtin_library()
    coloured = [
        (thing, picture) for thing, picture in zip(library.things, library.pictures, strict=True) if thing.colour
    ]
    assert len(coloured) > 60
    wrong = {thing.name: thing.colour for thing, picture in coloured if colourful_share(picture, thing.colour) < 0.4}
    assert not wrong


def test_a_colour_is_never_denied_to_a_thing_that_shows_it():
    library = builtin_library()
    narrow = {"red": (345, 5), "yellow": (46, 64), "green": (75, 160), "blue": (185, 240)}
    for thing, picture in zip(library.things, library.pictures, strict=True):
        rgb = Image.fromarray(picture[..., :3]).convert("HSV")
        hue, saturation, value = (np.asarray(band, np.float64) for band in rgb.split())
        strong = (picture[..., 3] > 127) & (saturation > 130) & (value > 110)
        for colour, (first, last) in narrow.items():
            degrees = hue * 360 / 255
            inside = (degrees >= first) & (degrees <= last) if first < last else (degrees >= first) | (degrees <= last)
            if (inside & strong).sum() > 0.12 * (picture[..., 3] > 127).sum():
                assert thing.is_coloured(colour) is not False, (thing.name, colour)


def test_pictures_are_there_small_and_trimmed():
    files = {path.name for path in things.PICTURES.glob("*.webp")}
    assert files == {thing.file for thing in TABLE}
    for picture in builtin_library().pictures:
        assert max(picture.shape[:2]) == prepare_assets.LONG_SIDE
        alpha = picture[..., 3]
        assert alpha[[0, -1]].max(1).min() > 0 and alpha[:, [0, -1]].max(0).min() > 0
    pictures = list((things.FOLDER / "assets").rglob("*.webp"))
    assert sum(path.stat().st_size for path in pictures) <= 4_000_000


def test_notice_names_every_background():
    notice = (things.FOLDER / "NOTICE").read_text(encoding="utf-8")
    for path in backgrounds.PHOTOS.glob("*.webp"):
        assert path.name in notice
    assert "Copyright (c) Microsoft Corporation" in notice and "MIT License" in notice


def test_a_wrong_cell_is_named(tmp_path):
    rows = list(csv.DictReader(things.TABLE.read_text(encoding="utf-8").splitlines()))
    wrong = {"edible": "yes", "groups": "animals", "colour": "mauve", "traces": "mauve", "shows": "unicorn"}
    for column, value in wrong.items():
        path = tmp_path / f"{column}.csv"
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerow({**rows[0], column: value})
        with pytest.raises(ValueError, match=f"{rows[0]['name']}.*{value}"):
            read_table(path)


def test_library_checks_its_pictures():
    thing = Thing(name="box", plural="boxes")
    picture = np.zeros((8, 8, 4), np.uint8)
    with pytest.raises(ValueError, match="one picture a thing"):
        ThingLibrary([thing], [])
    with pytest.raises(ValueError, match="repeated: box"):
        ThingLibrary([thing, thing], [picture, picture])
    with pytest.raises(ValueError, match="RGBA"):
        ThingLibrary([thing], [picture[..., :3]])


def test_trim_cuts_to_the_opaque_box_and_refuses_nothing():
    canvas = np.zeros((60, 50, 4), np.uint8)
    canvas[10:40, 20:30] = 200
    small = prepare_assets.trim(Image.fromarray(canvas, "RGBA"), 15)
    assert small.size == (5, 15)
    with pytest.raises(ValueError, match="transparent"):
        prepare_assets.trim(Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA"))


def test_prepare_makes_the_same_files_twice_and_lists_what_is_missing(tmp_path, monkeypatch):
    with open(things.TABLE, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))[:3]
    table = tmp_path / "things.csv"
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(things, "TABLE", table)
    (tmp_path / "assets").mkdir()
    rng = np.random.default_rng(0)
    for row, suffix in zip(rows[:2], ("", "-fe0f"), strict=True):
        pixels = rng.integers(0, 256, (256, 256, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(tmp_path / "assets" / f"{row['code']}{suffix}.webp", lossless=True)
    with pytest.raises(FileNotFoundError, match=rows[2]["code"]):
        prepare_assets.prepare_things(tmp_path, tmp_path / "out")
    picture = Image.fromarray(np.full((256, 256, 4), 255, np.uint8), "RGBA")
    picture.save(tmp_path / "assets" / f"{rows[2]['code']}.webp")
    written = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "stale.webp").write_bytes(b"")
        prepare_assets.prepare_things(tmp_path, tmp_path / folder)
        written.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert written[0] == written[1] and set(written[0]) == {row["file"] for row in rows}


def test_thing_answers_none_where_people_disagree():
    thing = Thing(name="tomato", plural="tomatoes", groups=frozenset({"food"}), doubtful_groups=frozenset({"fruit"}))
    assert thing.belongs("food") is True and thing.belongs("fruit") is None and thing.belongs("tool") is False
    assert thing.has("edible") is None and thing.is_coloured("red") is None
    red = dataclasses.replace(thing, colour="red", traces=frozenset({"green"}))
    assert red.is_coloured("red") is True and red.is_coloured("green") is None and red.is_coloured("blue") is False
