"""Miniatures of data sets that tensorflow-datasets has prepared, written by its own writer, without TensorFlow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import example_serializer, file_adapters, naming, writer

from tests.data.readers.miniature import maker, scene

PANOPTIC_NAMES = ("person", "traffic light", "sky-other-merged", "wall-brick")
IDS = (1, 300, 70_000, 16_000_000)
"""Numbers of the segments of a panoptic map: of one, two and three bytes."""


def file_of(pixels: np.ndarray, kind: str) -> bytes:
    """A picture as the bytes of a file of that kind."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, name: str, version: str, features: Any, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """A data set in TFDS's folders: `name` is "set" or "set/config"."""
    folder = root / name / version
    folder.mkdir(parents=True)
    base = name.split("/")[0]
    identity = tfds.core.DatasetIdentity(
        name=base, version=tfds.core.Version(version), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, description=name, features=features)
    info.set_file_format("array_record")
    found = []
    for split, examples in splits.items():
        template = naming.ShardedFileTemplate(
            data_dir=folder, dataset_name=base, split=split, filetype_suffix="array_record"
        )
        shards = writer.Writer(
            serializer=example_serializer.ExampleSerializer(features.get_serialized_info()),
            filename_template=template,
            hash_salt=split,
            disable_shuffling=True,
            example_writer=writer.ExampleWriter(file_format=file_adapters.FileFormat.ARRAY_RECORD),
        )
        for key, example in enumerate(examples):
            shards.write(key, features.encode_example(example))
        lengths, size = shards.finalize()
        found.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    info.set_splits(tfds.core.splits.SplitDict(found))
    info.write_to_directory(folder)
    return folder


def scene_map(number: int) -> np.ndarray:
    """uint8 [H, W, 3]: thing k of the scene has the class 1 + 33 k and the instance number k + 1."""
    things = scene(number)
    pixels = np.zeros(things.image.shape, np.uint8)
    for place, mask in enumerate(things.masks):
        pixels[mask] = (1 + 33 * (place % 4), place + 1, 0)
    return pixels


def panoptic_map(number: int) -> np.ndarray:
    """uint8 [H, W, 3]: thing k has the number `IDS[k % 4]`, as blue, green and red bytes; the rest is unlabelled."""
    things = scene(number)
    pixels = np.zeros(things.image.shape, np.uint8)
    for place, mask in enumerate(things.masks):
        segment = IDS[place % 4]
        pixels[mask] = (segment % 256, segment // 256 % 256, segment // 65536)
    return pixels


def panoptic_objects(number: int) -> Iterator[dict[str, Any]]:
    """Segments by the order of `IDS`; of the second picture, those of the first class are crowds."""
    for place in range(min(4, len(scene(number).masks))):
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        crowd = number == 1 and place == 0
        yield {"id": IDS[place], "area": 1, "bbox": box, "label": PANOPTIC_NAMES[place], "is_crowd": crowd}


@maker("tfds:scene_parse150")
def make_scene_parse(root: Path) -> None:
    """Three pictures for training, the last without instances, and one for the test, which is our validation."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "annotation": tfds.features.Image(encoding_format="png"),
        }
    )
    examples = [
        {
            "image": file_of(scene(number).image, "JPEG"),
            "annotation": file_of(scene_map(number) * np.uint8(number != 2), "PNG"),
        }
        for number in range(4)
    ]
    write(root, "scene_parse150", "1.0.0", features, {"train": examples[:3], "test": examples[3:]})


@maker("tfds:coco/2017_panoptic")
def make_panoptic(root: Path) -> None:
    """Two pictures for training, with a crowd in the second, and one for validation."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "panoptic_image": tfds.features.Image(encoding_format="png"),
            "panoptic_image/filename": tfds.features.Text(),
            "panoptic_objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=PANOPTIC_NAMES),
                    "is_crowd": np.bool_,
                }
            ),
        }
    )
    examples = [
        {
            "image": file_of(scene(number).image, "JPEG"),
            "image/filename": f"{number:012d}.jpg",
            "image/id": (1 << 40) + number,
            "panoptic_image": file_of(panoptic_map(number), "PNG"),
            "panoptic_image/filename": f"{number:012d}.png",
            "panoptic_objects": list(panoptic_objects(number)),
        }
        for number in range(3)
    ]
    write(root, "coco/2017_panoptic", "1.1.0", features, {"train": examples[:2], "validation": examples[2:]})
