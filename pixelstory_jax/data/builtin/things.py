"""The reviewed table of embedded things (``things.csv``) and the library of their pictures."""

from __future__ import annotations

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
TABLE = FOLDER / "things.csv"
PICTURES = FOLDER / "assets" / "things"

ATTRIBUTES = (
    "edible",
    "flies",
    "has_wheels",
    "lives_in_water",
    "has_legs",
    "is_worn",
    "makes_music",
    "is_electric",
    "grows",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
CATEGORIES = (
    "animal",
    "building",
    "clothing",
    "electronics",
    "food",
    "furniture",
    "household",
    "instrument",
    "kitchenware",
    "plant",
    "sport",
    "stationery",
    "tool",
    "toy",
    "vehicle",
)
SUBGROUPS = (
    "ball",
    "bird",
    "boat",
    "farm animal",
    "flower",
    "fruit",
    "hat",
    "insect",
    "reptile",
    "sea animal",
    "shoe",
    "sweet",
    "vegetable",
)
_BOOLEANS = {"1": True, "0": False, "": None}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One row of the table: a named kind of object.

    ``number`` is "count" (an apple), "mass" (bread) or "plural" (scissors). ``family`` joins names that a person could
    mix up (sailboat, ship): two members never meet in one scene. ``shows`` are names that a person may give to the
    picture, or to a part of it, beside its own: the candle on the cake, the shark as a fish. They never meet it either.
    ``colour`` is "" where no single colour is the clear answer; ``traces`` are other colours that more than 4 % of the
    picture show. Attributes, groups and colours answer True, False or None, where None means that people would
    disagree.
    """

    name: str
    plural: str
    article: str = "a"
    number: str = "count"
    split: str = "train"
    category: str = ""
    groups: frozenset[str] = frozenset()
    doubtful_groups: frozenset[str] = frozenset()
    family: str = ""
    shows: frozenset[str] = frozenset()
    colour: str = ""
    traces: frozenset[str] = frozenset()
    attributes: tuple[tuple[str, bool | None], ...] = ()
    file: str = ""

    def belongs(self, group: str) -> bool | None:
        """Whether the thing is a member of a category or subgroup; None where that is debatable."""
        if group in self.groups:
            return True
        return None if group in self.doubtful_groups else False

    def has(self, attribute: str) -> bool | None:
        """The value of an attribute; None where it is debatable or not recorded."""
        return dict(self.attributes).get(attribute)

    def is_coloured(self, colour: str) -> bool | None:
        """Whether people would call the thing red, blue, ...; None where a part of it has that colour."""
        if self.colour == colour:
            return True
        return None if colour in self.traces or not (self.colour or self.traces) else False

    @property
    def is_plural(self) -> bool:
        return self.number == "plural"

    @property
    def with_article(self) -> str:
        """The name after its indefinite article: "an apple", "bread", "scissors"."""
        return f"{self.article} {self.name}" if self.article else self.name

    def confusable(self, other: Thing) -> bool:
        """True where one of the two names could be taken for the other, or one is seen in the other's picture."""
        same = self.name == other.name or bool(self.family) and self.family == other.family
        return same or other.name in self.shows or self.name in other.shows


def read_table(path: pathlib.Path | str = TABLE) -> tuple[Thing, ...]:
    """Reads a table in the layout of ``things.csv``.

    Raises:
      ValueError: a cell holds something that its column does not allow; the sentence names the row and the column.
    """
    things = []
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            things.append(_thing_of_row(row, path))
    names = {thing.name for thing in things}
    for thing in things:
        for shown in sorted(thing.shows - names):
            raise ValueError(f"{path}: {thing.name!r} shows {shown!r}, expected a name of this table")
    return tuple(things)


def _thing_of_row(row: dict[str, str], path: pathlib.Path | str) -> Thing:
    def check(column: str, allowed: Sequence[str]) -> str:
        if row[column] not in allowed:
            raise ValueError(
                f"{path}: {row['name']!r} has {column} {row[column]!r}, expected one of {', '.join(allowed)}"
            )
        return row[column]

    groups = [group for group in row["groups"].split("|") if group]
    for group in groups:
        if group.rstrip("?") not in CATEGORIES + SUBGROUPS:
            raise ValueError(f"{path}: {row['name']!r} is in the unknown group {group!r}")
    unknown = [trace for trace in row["traces"].split("|") if trace and trace not in COLOURS]
    if unknown:
        raise ValueError(f"{path}: {row['name']!r} has the unknown colour {unknown[0]!r} among its traces")
    return Thing(
        name=row["name"],
        plural=row["plural"],
        article=check("article", ("a", "an", "")),
        number=check("number", ("count", "mass", "plural")),
        split=check("split", ("train", "unseen")),
        category=check("category", CATEGORIES),
        groups=frozenset(group for group in groups if not group.endswith("?")),
        doubtful_groups=frozenset(group[:-1] for group in groups if group.endswith("?")),
        family=row["family"],
        shows=frozenset(name for name in row["shows"].split("|") if name),
        colour=check("colour", ("", *COLOURS)),
        traces=frozenset(trace for trace in row["traces"].split("|") if trace),
        attributes=tuple((name, _BOOLEANS[check(name, tuple(_BOOLEANS))]) for name in ATTRIBUTES),
        file=row["file"],
    )


class ThingLibrary:
    """Things with their cut-out pictures, divided into a trained and a never-trained pool.

    Args:
      things: rows of a table; order is kept and decides which draw gives which thing.
      pictures: one RGBA uint8 array [h, w, 4] a thing, trimmed to its opaque box.

    Raises:
      ValueError: lengths differ, a name is repeated, or a picture is not RGBA.
    """

    def __init__(self, things: Sequence[Thing], pictures: Sequence[np.ndarray]):
        if len(things) != len(pictures):
            raise ValueError(f"a library needs one picture a thing: {len(things)} things, {len(pictures)} pictures")
        names = [thing.name for thing in things]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"names must be unique in a library, repeated: {', '.join(repeated)}")
        for thing, picture in zip(things, pictures, strict=True):
            if picture.ndim != 3 or picture.shape[-1] != 4 or picture.dtype != np.uint8:
                raise ValueError(
                    f"the picture of {thing.name!r} must be RGBA uint8, got {picture.dtype} {picture.shape}"
                )
        self.things = tuple(things)
        self.pictures = tuple(pictures)
        self.index = {thing.name: number for number, thing in enumerate(things)}
        self._premultiplied: dict[int, Image.Image] = {}

    def pool(self, split: str) -> tuple[int, ...]:
        """Indices of the things of one table split, "train" or "unseen"."""
        return tuple(number for number, thing in enumerate(self.things) if thing.split == split)

    def sprite(self, number: int) -> Image.Image:
        """The picture with colours multiplied by alpha, which is what resampling needs; cached."""
        if number not in self._premultiplied:
            picture = self.pictures[number].astype(np.uint16)
            picture[..., :3] = (picture[..., :3] * picture[..., 3:] + 127) // 255
            self._premultiplied[number] = Image.fromarray(picture.astype(np.uint8), "RGBA")
        return self._premultiplied[number]


@functools.cache
def builtin_library() -> ThingLibrary:
    """The embedded library: Fluent emoji pictures and the reviewed table. Loaded once a process."""
    things = read_table()
    pictures = []
    for thing in things:
        with Image.open(PICTURES / thing.file) as image:
            pictures.append(np.asarray(image.convert("RGBA")))
    return ThingLibrary(things, pictures)
