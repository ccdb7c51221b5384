"""What PACO-LVIS and PASCAL-Part share: categories "object" and "object:part", each annotation asked for by itself.

As in PixelLM's `utils/sem_seg_dataset.py`, but for underscores in names, which become spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pixelstory_jax.data.annotations import Region, Request
from pixelstory_jax.data.readers.coco_file import CocoAnnotation, CocoFile, CocoPicture, CocoReader
from pixelstory_jax.data.readers.reader import LayoutError


def open_parts(
    name: str, split: str, root: Path, pictures: Path, annotations: Path, layout: Sequence[str]
) -> CocoReader:
    """The reader of one file of objects and parts.

    Raises:
      LayoutError: a file or folder is missing, or a category is neither "object" nor "object:part".
    """
    file = CocoFile(annotations, layout)
    for category in file.names.values():
        try:
            part_words(category)
        except ValueError as error:
            raise LayoutError(f"{annotations} has the category {category!r}, {error}.") from None
    return CocoReader(name, split, root, pictures, file, ask_each, frozenset(), layout)


def ask_each(picture: CocoPicture, annotations: Sequence[CocoAnnotation]) -> tuple[list[Region], list[Request]]:
    """A region and a request for every annotation."""
    words = [part_words(one.name) for one in annotations]
    regions = [Region(one.mask, name=said[0], id=one.id) for one, said in zip(annotations, words, strict=True)]
    requests = [Request(said, (place,), id=regions[place].id) for place, said in enumerate(words)]
    return regions, requests


def part_words(category: str) -> tuple[str, ...]:
    """What it is called: "trash_can_(bin):lid" is ("trash can lid", "the lid of the trash can").

    Raises:
      ValueError: it has more than one colon, or nothing on one side of it.
    """
    names = [name.split("_(")[0].replace("_", " ").strip() for name in category.split(":")]
    if len(names) > 2 or not all(names):
        raise ValueError("where OBJECT or OBJECT:PART is expected")
    return (names[0],) if len(names) == 1 else (f"{names[0]} {names[1]}", f"the {names[1]} of the {names[0]}")
