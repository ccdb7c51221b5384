"""ADE20K's instances and COCO's panoptic maps as TensorFlow Datasets prepares them, read without TensorFlow.

tfds:scene_parse150        scene_parse150/1.0.0/scene_parse150-train.tfrecord-00000-of-000NN
tfds:coco/2017_panoptic    coco/2017_panoptic/1.1.0/coco-train.tfrecord-00000-of-000NN, and the names of its labels

They are asked for as other instances are, see `coco_instances.py`. TFDS's scene_parse150 holds the instances of the
Places Challenge 2017, not the class maps that `ade20k.py` reads: red is one of 100 classes of things, green the number
of the instance. COCO's panoptic maps hold the number of a segment as red + 256 green + 65536 blue. Of its names,
"tree-merged" is a tree and "sky-other-merged" the sky; those that name a kind ("wall-brick", "floor-wood") are ignored
pixels, as in COCO-Stuff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance
from pixelstory_jax.data.images import open_image
from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.data.names import plain_name
from pixelstory_jax.data.readers.ade20k import CLASSES
from pixelstory_jax.data.readers.coco_instances import Instance, ask_by_name
from pixelstory_jax.data.readers.reader import need
from pixelstory_jax.data.readers.tfds_folder import TfdsFolder

SCENE_PARSE_SPLITS = {"train": "train", "val": "test"}
PANOPTIC_SPLITS = {"train": "train", "val": "validation"}
SCENE_PARSE_LAYOUT = ("scene_parse150/1.0.0/scene_parse150-train.tfrecord-00000-of-000NN, or .array_record-",)
LABELS = "panoptic_objects-label.labels.txt"
PANOPTIC_LAYOUT = (
    "coco/2017_panoptic/1.1.0/coco-train.tfrecord-00000-of-000NN, or .array_record-",
    f"coco/2017_panoptic/1.1.0/{LABELS}",
)

# Numbers of the classes of ADE20K that the challenge of instances leaves out: walls, sky, grass, ...
_NO_THINGS = frozenset(
    (1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60, 61, 62, 64, 69, 78)
    + (80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132, 141, 142, 146)
)
THINGS = tuple(name for number, name in enumerate(CLASSES, start=1) if number not in _NO_THINGS)
"""Names of the classes 1 to 100 of scene_parse150."""

Segments = tuple[list[Instance], np.ndarray | None]  # what can be asked for, and bool [H, W] of what is ignored
Record = dict[str, list[Any]]


class TfdsReader:
    """One split of a data set in the folder of TFDS.

    Args:
      name, split: of the data set here.
      records: of the split.
      map_field: of the map of a picture.
      segments: of a record, its map uint8 [H, W, 3] and `names`; raises ValueError.
      names: of the classes.
    """

    def __init__(
        self,
        name: str,
        split: str,
        records: TfdsFolder,
        map_field: str,
        segments: Callable[[Record, np.ndarray, Sequence[str]], Segments],
        names: Sequence[str],
    ) -> None:
        self.name, self.split, self.records, self.map_field = name, split, records, map_field
        self.segments, self.names = segments, names

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Annotation:
        record = self._record(index)
        try:
            colours = open_image(record[self.map_field][0])
            instances, ignored = self.segments(record, colours, self.names)
            (file,) = record.get("image/filename", [f"{self.split}-{index}.jpg".encode()])
            (number,) = record.get("image/id", [index])
        except (ValueError, KeyError, IndexError) as error:
            raise AnnotationError(f"{self.name}, {self.split}: picture {index} is damaged: {error}") from error
        regions, requests = ask_by_name(instances)
        if not requests:
            raise AnnotationError(f"{self.name}, {self.split}: picture {index} shows nothing that can be asked for.")
        return Annotation(
            size=(colours.shape[0], colours.shape[1]),
            task="names",
            regions=tuple(regions),
            requests=tuple(requests),
            provenance=Provenance(self.name, self.split, file.decode(), str(number)),
            ignored=ignored,
        )

    def picture(self, index: int) -> bytes:
        return self._record(index)["image"][0]

    def _record(self, index: int) -> Record:
        try:
            record = self.records[index]
            if not record["image"]:
                raise ValueError("it has no picture")
            return record
        except (ValueError, KeyError) as error:
            raise AnnotationError(f"{self.name}, record {index} of {self.split} is damaged: {error}") from error


def open_scene_parse(root: Path, split: str) -> TfdsReader:
    """The reader of `root`/scene_parse150."""
    records = TfdsFolder(root / "scene_parse150", "scene_parse150", SCENE_PARSE_SPLITS[split], SCENE_PARSE_LAYOUT)
    return TfdsReader("tfds:scene_parse150", split, records, "annotation", scene_instances, THINGS)


def open_panoptic(root: Path, split: str) -> TfdsReader:
    """The reader of `root`/coco/2017_panoptic."""
    records = TfdsFolder(root / "coco" / "2017_panoptic", "coco", PANOPTIC_SPLITS[split], PANOPTIC_LAYOUT)
    names = need(records.folder / LABELS, PANOPTIC_LAYOUT).read_text(encoding="utf-8").splitlines()
    return TfdsReader("tfds:coco/2017_panoptic", split, records, "panoptic_image", panoptic_segments, names)


def scene_instances(record: Record, colours: np.ndarray, names: Sequence[str]) -> Segments:
    """The instances of a map of scene_parse150; ValueError where the class of one is none of the hundred."""
    instances = []
    for number in np.unique(colours[..., 1]).tolist():
        mask = colours[..., 1] == number
        kind = int(colours[..., 0][mask].max())
        if number and not 1 <= kind <= len(names):
            raise ValueError(f"instance {number} has the class {kind}, which is not one of 1 to {len(names)}.")
        if number:
            instances.append(_instance(str(number), names[kind - 1], mask))
    return instances, None


def panoptic_segments(record: Record, colours: np.ndarray, names: Sequence[str]) -> Segments:
    """The segments of a panoptic map that can be asked for; crowds, kinds of stuff and unlabelled pixels: ignored."""
    numbers = colours.astype(np.int64) @ np.array([1, 256, 65536])
    ids, labels, crowds = (record.get(f"panoptic_objects/{field}", []) for field in ("id", "label", "is_crowd"))
    instances = []
    ignored = np.ones(numbers.shape, bool)
    for number, label, is_crowd in zip(ids, labels, crowds, strict=True):
        mask = numbers == number
        name = panoptic_name(names[label])
        if name and not is_crowd and mask.any():
            instances.append(_instance(str(number), name, mask))
            ignored &= ~mask
    return instances, ignored if ignored.any() else None


def panoptic_name(label: str) -> str:
    """ "" for a kind of stuff: "wall-brick"; else the label in plain English: "sky-other-merged" is "sky"."""
    words = [word for word in label.split("-") if word not in ("merged", "other", "stuff")]
    return plain_name(words[0]) if len(words) == 1 else ""


def _instance(number: str, name: str, mask: np.ndarray) -> Instance:
    left, _, width, _ = mask_box(mask)
    return Instance(number, name, mask, left + width / 2)
