"""PACO-LVIS: objects and their parts in pictures of COCO 2017.

vlpart/paco/annotations/paco_lvis_v1_{train,val,test}.json
coco/{train2017,val2017}/*.jpg                                 (the file names both)
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.coco_file import CocoReader
from pixelstory_jax.data.readers.parts import open_parts

SPLITS = ("train", "val", "test")
LAYOUT = (
    "vlpart/paco/annotations/paco_lvis_v1_train.json, paco_lvis_v1_val.json, paco_lvis_v1_test.json",
    "coco/train2017/*.jpg, coco/val2017/*.jpg",
)


def open_paco_lvis(root: Path, split: str) -> CocoReader:
    """The reader of `root`/vlpart/paco with the pictures of `root`/coco."""
    annotations = root / "vlpart" / "paco" / "annotations" / f"paco_lvis_v1_{split}.json"
    return open_parts("paco_lvis", split, root, root / "coco", annotations, LAYOUT)
