"""ADE20K of the scene parsing challenge 2016 (SceneParse150): 150 classes, 0 is unlabelled.

ade20k/images/{training,validation}/*.jpg
ade20k/annotations/{training,validation}/*.png
ade20k/objectInfo150.txt            (comes with it; names of the classes)
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.label_maps import LabelMaps
from pixelstory_jax.data.readers.reader import LayoutError, need

SPLITS = {"train": "training", "val": "validation"}
LAYOUT = (
    "ade20k/images/training/*.jpg, ade20k/images/validation/*.jpg",
    "ade20k/annotations/training/*.png, ade20k/annotations/validation/*.png",
    "ade20k/objectInfo150.txt",
)


def open_ade20k(root: Path, split: str) -> LabelMaps:
    """The reader of `root`/ade20k."""
    folder = root / "ade20k"
    names = read_names(need(folder / "objectInfo150.txt", LAYOUT))
    pictures, labels = (folder / part / SPLITS[split] for part in ("images", "annotations"))
    return LabelMaps("ade20k", split, root, pictures, labels, names, LAYOUT)


def read_names(path: Path) -> dict[int, str]:
    """Class number -> its first name, from lines "1<tab>0.1576<tab>11664<tab>1172<tab>wall"; the head is passed over.

    Raises:
      LayoutError: a line is none of these.
    """
    names: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        fields = line.strip().split("\t")
        if len(fields) < 2 or not fields[0].isdigit():
            raise LayoutError(f"{path} has a line that names no class: {line[:60]!r}")
        names[int(fields[0])] = fields[-1].split(",")[0].strip()
    return names
