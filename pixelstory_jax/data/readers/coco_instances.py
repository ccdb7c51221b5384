"""Any file in COCO's annotation format with names of categories: COCO itself, LVIS, exports of labelling tools.

The name of the data set says where it is, below the root:

    coco_instances                                       coco/annotations/instances_{split}2017.json, coco/{split}2017
    coco_instances:ANNOTATIONS.json:PICTURES_FOLDER      a file of your own, the split train
    coco_instances:tools/{split}.json:tools/pictures     with train.json, val.json, ...

A question for a category is answered with all its instances, one mask each, from left to right. Categories with more
than `MOST` instances in a picture are not asked for, nor those of which LVIS does not annotate every instance. Crowds
and categories without a name ("__ignore__", "_background_") are ignored pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelstory_jax.data.annotations import AnnotationError, Region, Request, StoredMask, decode_mask
from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.data.names import plain_name
from pixelstory_jax.data.readers.coco_file import CocoAnnotation, CocoFile, CocoPicture, CocoReader

MOST = 5
"""Instances of a category up to which it is asked for: three such questions fit the 16 targets of a picture."""

SPLITS = ("train", "val", "test")
LAYOUT = (
    "coco/annotations/instances_train2017.json, coco/annotations/instances_val2017.json",
    "coco/train2017/*.jpg, coco/val2017/*.jpg",
    "or, of coco_instances:ANNOTATIONS.json:PICTURES_FOLDER, that file and that folder",
)


def open_coco_instances(root: Path, split: str, where: str = "") -> CocoReader:
    """The reader of COCO 2017, or of what `where` names: "ANNOTATIONS.json:PICTURES_FOLDER" below `root`.

    Raises:
      ValueError: `where` is not two paths, or is the same for all splits and another than train is asked for.
      LayoutError: a file or folder is missing, or the file is not in COCO's format.
    """
    paths = (where or "coco/annotations/instances_{split}2017.json:coco/{split}2017").split(":")
    if len(paths) != 2 or not all(paths):
        raise ValueError(f"coco_instances:{where} should be coco_instances:ANNOTATIONS.json:PICTURES_FOLDER.")
    if "{split}" not in paths[0] and split != "train":
        raise ValueError(
            f"coco_instances:{where} has the split train only; where it has more, its name holds {{split}} for them."
        )
    annotations, pictures = (root / path.replace("{split}", split) for path in paths)
    file = CocoFile(annotations, LAYOUT)
    nameless = frozenset(category for category, name in file.names.items() if not plain_name(name))
    name = f"coco_instances:{where}" if where else "coco_instances"
    return CocoReader(name, split, root, pictures, file, ask_instances, nameless, LAYOUT)


def ask_instances(picture: CocoPicture, annotations: Sequence[CocoAnnotation]) -> tuple[list[Region], list[Request]]:
    """Regions and requests of a picture, see the top of this file."""
    instances = [
        Instance(one.id, plain_name(one.name), one.mask, _centre(one, picture))
        for one in annotations
        if one.category not in picture.unsure
    ]
    return ask_by_name(instances)


@dataclass(frozen=True)
class Instance:
    """One thing; `centre`: x of its middle, in any unit."""

    id: str
    name: str
    mask: StoredMask
    centre: float


def ask_by_name(instances: Sequence[Instance]) -> tuple[list[Region], list[Request]]:
    """A request for every name that at most `MOST` of them have, whose targets are these from left to right."""
    by_name: dict[str, list[Instance]] = {}
    for instance in instances:
        by_name.setdefault(instance.name, []).append(instance)
    regions: list[Region] = []
    requests: list[Request] = []
    for name, same in by_name.items():
        if len(same) <= MOST:
            requests.append(Request((name,), tuple(range(len(regions), len(regions) + len(same)))))
            ordered = sorted(same, key=lambda instance: instance.centre)
            regions += [Region(instance.mask, name=name, id=instance.id) for instance in ordered]
    return regions, requests


def _centre(one: CocoAnnotation, picture: CocoPicture) -> float:
    if one.box is not None:
        return one.box[0] + one.box[2] / 2
    try:
        left, _, width, _ = mask_box(decode_mask(one.mask, picture.size))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise AnnotationError(f"{picture.file}: the mask of annotation {one.id} cannot be decoded: {error}") from error
    return left + width / 2
