"""Miniatures of the data sets that are files in COCO's annotation format, with the odd cases of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.masks import encode_rle, mask_polygons
from tests.data.readers.miniature import maker, save_json, save_picture, scene

PICTURES = 4
FAR = 1 << 40  # ids may be larger than 32 bits


def polygons(mask: np.ndarray) -> list[list[float]]:
    """COCO polygons of a mask."""
    return [[float(x) for x in ring] for ring in mask_polygons(mask)]


def entry(number: int, picture: int, category: int, segmentation: Any, **fields: Any) -> dict[str, Any]:
    """An annotation."""
    return {"id": number, "image_id": picture, "category_id": category, "segmentation": segmentation} | fields


def picture_entry(number: int, file: str) -> dict[str, Any]:
    """The entry of scene `number` in the list of pictures; ids lie beyond 2^31."""
    height, width = scene(number).image.shape[:2]
    return {"id": FAR + number, "file_name": file, "height": height, "width": width}


def coco_content(names: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
    """The annotations of the scenes 0, 1, ... whose pictures are `files`: polygons, run lengths of both kinds, in turn.

    The last picture has no annotations, and one annotation is of a picture that is not listed.
    """
    annotations = []
    for number in range(len(files) - 1):
        for place, mask in enumerate(scene(number).masks):
            rle = encode_rle(mask, compressed=place % 3 == 1)
            shape = polygons(mask) if place % 3 == 0 else rle
            annotations.append(entry(FAR + len(annotations), FAR + number, 1 + place % len(names), shape))
    annotations.append(entry(7, 12345, 1, [[0, 0, 4, 0, 4, 4]]))
    return {
        "images": [picture_entry(number, file) for number, file in enumerate(files)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        "annotations": annotations,
    }


PACO_NAMES = (
    "bottle",
    "trash_can",
    "bottle:cap",
    "dog:ear",
    "trash_can:lid",
    "scarf_(cloth)",
    "mug_(cup):handle_(side)",
)
PASCAL_NAMES = ("aeroplane:body", "dog:ear", "tvmonitor:screen")
INSTANCE_NAMES = ("person", "potted plant", "aeroplane", "traffic_light", "__ignore__")


@maker("paco_lvis")
def make_paco_lvis(root: Path) -> None:
    """Pictures 0 to 3 for training and for validation; the last of either has no annotations."""
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        files = [f"{folder}/{number:012d}.jpg" for number in range(PICTURES)]
        save_json(coco_content(PACO_NAMES, files), root / f"vlpart/paco/annotations/paco_lvis_v1_{split}.json")
        for number, file in enumerate(files):
            save_picture(scene(number).image, root / "coco" / file, ("RGB", "L", "CMYK", "RGB")[number])


@maker("pascal_part")
def make_pascal_part(root: Path) -> None:
    """As above, in one folder of pictures, for training only."""
    files = [f"2008_{number:06d}.jpg" for number in range(PICTURES)]
    save_json(coco_content(PASCAL_NAMES, files), root / "vlpart/pascal_part/train.json")
    for number, file in enumerate(files):
        save_picture(scene(number).image, root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages" / file)


@maker("coco_instances")
def make_coco_instances(root: Path) -> None:
    """COCO 2017 with a crowd in its first picture, and polygons that lie outside or enclose nothing."""
    for split in ("train", "val"):
        files = [f"{number:012d}.jpg" for number in range(PICTURES)]
        content = coco_content(INSTANCE_NAMES, files)
        height, width = scene(0).image.shape[:2]
        crowd = np.zeros((height, width), bool)
        crowd[: height // 4] = True
        content["annotations"] += [
            entry(1, FAR, 1, encode_rle(crowd, compressed=False), iscrowd=1),
            entry(2, FAR, 2, [[-9.0, -9.0, 5.0, -9.0, 5.0, 5.0, -9.0, 5.0], [1, 1, 2, 2]], iscrowd=0),
            entry(3, FAR, 3, []),
        ]
        save_json(content, root / f"coco/annotations/instances_{split}2017.json")
        for number, file in enumerate(files):
            save_picture(scene(number).image, root / f"coco/{split}2017" / file)
