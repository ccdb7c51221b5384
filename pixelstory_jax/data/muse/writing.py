"""Pairs in the schema of the released MUSE files, in a folder that every reader of MUSE can be pointed at.

OUT/muse/muse_{split}.json
OUT/refer_seg/images/mscoco/images/{train2014,train2017,val2017}/NAME      links to the pictures
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelstory_jax.data.muse.pair import Mention, Pair
from pixelstory_jax.data.muse.pictures import Instance, Picture
from pixelstory_jax.training.files import replacing

FILES = {"train": "muse_train", "val": "muse_val", "test_few": "muse_test_less", "test_many": "muse_test_many"}
PICTURES = "refer_seg/images/mscoco/images"


@dataclass(frozen=True)
class Entry:
    """A picture, where its file is, and what is asked about it."""

    picture: Picture
    file: Path
    pairs: tuple[Pair, ...]


def write_entries(entries: Sequence[Entry], out: Path, split: str) -> Path:
    """Writes the file of a split and links its pictures; returns the path of the file.

    Raises:
      ValueError: two pictures have the same name in the released schema, or a link's place is taken.
    """
    places: dict[str, Path] = {}
    for entry in entries:
        place = picture_place(entry.picture)
        if places.setdefault(place, entry.file) != entry.file:
            raise ValueError(f"{places[place]} and {entry.file} would both be {place}; MUSE tells them by their names.")
    for place, file in places.items():
        _link(out / PICTURES / place, file)
    path = out / "muse" / f"{FILES[split]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([as_json(entry) for entry in entries], ensure_ascii=False), encoding="utf-8")
    return path


def as_json(entry: Entry) -> dict[str, Any]:
    """One picture of a MUSE file."""
    picture = entry.picture
    named = {"coco_url": picture.coco_url} if _is_of_2017(picture) else {"file_name": picture.file_name}
    return {
        **named,
        "height": picture.height,
        "width": picture.width,
        "ann_list": [_instance(instance) for instance in picture.instances],
        "questions": [pair.question for pair in entry.pairs],
        "answers": [
            [{**_instance(picture.instances[m.number]), "rephrased_name": rephrased(m)} for m in pair.mentions]
            for pair in entry.pairs
        ],
        "text_answers": [pair.slotted for pair in entry.pairs],
    }


def rephrased(mention: Mention) -> str:
    """The phrase as it stands inside a sentence: "the dog on the left", not "The dog on the left"."""
    first, space, rest = mention.phrase.partition(" ")
    return f"{first.lower() if first.lower() in ('the', 'a', 'an') else first}{space}{rest}"


def picture_place(picture: Picture) -> str:
    """Where readers of MUSE look for a picture, below `PICTURES`."""
    if not _is_of_2017(picture):
        return f"train2014/{picture.file_name}"
    return f"{'train2017' if 'train2017' in picture.coco_url else 'val2017'}/{picture.coco_url.split('/')[-1]}"


def _is_of_2017(picture: Picture) -> bool:
    return "train2017" in picture.coco_url or "val2017" in picture.coco_url


def _instance(instance: Instance) -> dict[str, Any]:
    return {
        "category_id": instance.category_id,
        "category_name": instance.category,
        "bbox": [round(value, 2) for value in instance.box],
        "segmentation": instance.segmentation,
    }


def _link(place: Path, file: Path) -> None:
    if place.is_symlink():
        place.unlink()  # of an earlier run
    elif place.exists():
        if place.samefile(file):  # OUT is the folder of the data sets itself
            return
        raise ValueError(f"{place} exists and is another picture than {file}; choose another --out.")
    place.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(file.resolve(), place)
