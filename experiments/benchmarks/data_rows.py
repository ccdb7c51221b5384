"""Rows of the data pipeline: from files of pictures to a finished batch, by one core."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.benchmarks.row import Row, Side
from pixelstory_jax.data.annotations import Annotation
from pixelstory_jax.data.asking import Asking, ask_about
from pixelstory_jax.data.builtin.questions import Conversation
from pixelstory_jax.data.builtin.scenes import compose, scene_rng
from pixelstory_jax.data.examples import Layout, SegmentationExamples
from pixelstory_jax.data.masks import mask_box, mask_polygons
from pixelstory_jax.data.mixture import Group, Mixture
from pixelstory_jax.data.readers.reader import open_picture

SEED, SPLIT = 5, "train"
WIDTH, HEIGHT = 640, 480  # of most pictures of COCO
CORNERS = 60  # of a polygon
DATASET = "coco_instances:instances.json:images"


def data_rows(quick: bool) -> list[Row]:
    """A pass is a batch of 448 pixels; the reference leaves masks as large as their pictures."""
    pictures, batch, canvas = (12, 4, 96) if quick else (256, 32, 448)
    layout = Layout(canvas, questions=3, length=512, slots=16, image_tokens=256, style="llava_v1")

    def row(form: str) -> Row:
        def ours() -> Side:
            return our_pipeline(mixture(pictures, packed=form == "packed"), layout, batch)

        def torch() -> Side:
            from experiments.benchmarks.torch_pipeline import torch_pipeline

            root = pictures_folder(pictures)
            return torch_pipeline(root, [item(mixture(pictures), index) for index in range(pictures)], canvas, batch)

        return Row(
            f"data pipeline, {form}, 32 x 448 px, one core", ours, torch, target=1.0, dtype="uint8", seconds=40.0
        )

    return [row("folder"), row("packed")]


def our_pipeline(source: Mixture, layout: Layout, batch: int) -> Side:
    """The pipeline of training, in this process."""
    from pixelstory_jax.data.pipeline import make_iterator
    from pixelstory_jax.data.tokenizers import small_tokenizer

    batches = make_iterator(SegmentationExamples(source, small_tokenizer(), layout), batch, threads=0)

    def run() -> Any:
        made = next(batches)
        return compared(lambda: made["image"], lambda: made["target_masks"])

    return Side(run)


class Later:
    """What is compared and not part of the work: computed when somebody looks."""

    def __init__(self, compute: Callable[[], np.ndarray]) -> None:
        self._compute = compute

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._compute()


def compared(images: Callable[[], np.ndarray], masks: Callable[[], np.ndarray]) -> tuple[Later, ...]:
    """What both sides have to agree on: colours [B, C, C, 3], and pixels of masks [B, S, C, C] in rows and columns."""
    return Later(images), Later(lambda: masks().sum(2, dtype=np.int64)), Later(lambda: masks().sum(3, dtype=np.int64))


def mixture(pictures: int, packed: bool = False) -> Mixture:
    """Questions about the generated pictures, read from their folder or from shards."""
    from pixelstory_jax.data.packing import pack
    from pixelstory_jax.data.readers import open_folder
    from pixelstory_jax.data.readers.packed import Packed

    root = pictures_folder(pictures)
    reader: Any = open_folder(DATASET, root, SPLIT)
    if packed:
        folder = Path(tempfile.mkdtemp(dir=root)) / "packed"
        pack(reader, range(len(reader)), folder, source=DATASET)
        reader = Packed(folder)
    return Mixture([Group("pictures", 1.0, (reader,))], Asking(), SEED)


Item = tuple[str, list[Any], tuple[Conversation, ...]]


def item(source: Mixture, index: int) -> Item:
    """Example `index` before anything is read: picture, polygons of every target in order, what is asked."""
    reader, picture = source.place(index)
    wanted: list[int] = []

    class Noted(Annotation):
        def mask(self, number: int) -> np.ndarray:
            wanted.append(number)
            return super().mask(number)

    annotation = Noted(**vars(reader[picture]))
    file = annotation.provenance.picture
    rng = scene_rng(SEED, index, "train", "mixture")
    conversations = ask_about(open_picture(reader, picture, file), annotation, rng, source.asking).conversations
    targets = [wanted[target] for turns in conversations for turn in turns for target in turn.targets]
    return file, [annotation.regions[number].mask for number in targets], conversations


def pictures_folder(count: int) -> Path:
    """JPEGs and their polygons in COCO's format, made of the embedded pictures when first asked for."""
    folder = Path(tempfile.gettempdir()) / f"pixelstory-pictures-{count}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made, contextlib.suppress(OSError):
            write_pictures(Path(made) / "set", count)
            os.rename(Path(made) / "set", folder)  # unless another process was first
    return folder


def write_pictures(folder: Path, count: int) -> None:
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for picture in range(count):
        scene = compose(SEED, picture, "train", size=WIDTH)
        image = scene.image[:HEIGHT]
        name = f"{picture:012d}.jpg"
        Image.fromarray(image).save(folder / "images" / name, quality=90)
        images.append({"id": picture, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for thing, mask in zip(scene.things, scene.masks, strict=True):
            rings = [np.reshape(ring, (-1, 2)) for ring in mask_polygons(mask[:HEIGHT])[:3]]
            coarse = [ring[:: max(1, len(ring) // CORNERS)] for ring in rings]
            polygons = [ring.ravel().tolist() for ring in coarse if len(ring) > 2]
            if polygons:
                category = numbers.setdefault(thing.name, len(numbers) + 1)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": picture,
                        "category_id": category,
                        "segmentation": polygons,
                        "bbox": list(mask_box(mask[:HEIGHT])),
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
