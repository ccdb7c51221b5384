"""PASCAL-Part in the form that VLPart gave it: parts of the objects of PASCAL VOC 2010.

vlpart/pascal_part/{train,val}.json
vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/*.jpg
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.coco_file import CocoReader
from pixelstory_jax.data.readers.parts import open_parts

SPLITS = ("train", "val")
LAYOUT = (
    "vlpart/pascal_part/train.json, vlpart/pascal_part/val.json",
    "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/*.jpg",
)


def open_pascal_part(root: Path, split: str) -> CocoReader:
    """The reader of `root`/vlpart/pascal_part."""
    folder = root / "vlpart" / "pascal_part"
    pictures = folder / "VOCdevkit" / "VOC2010" / "JPEGImages"
    return open_parts("pascal_part", split, root, pictures, folder / f"{split}.json", LAYOUT)
