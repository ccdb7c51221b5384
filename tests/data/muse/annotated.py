"""A file in COCO's format about composed pictures, with what such files have of odd cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from pixelstory_jax.data.builtin.scenes import compose
from pixelstory_jax.data.masks import encode_rle, mask_box, mask_polygons

ODD = ("without_file.png", "one_thing.png")


def write_annotated(root: Path, pictures: int = 12, size: int = 160) -> tuple[Path, Path]:
    """(instances.json, folder of pictures) below `root`: polygons, run lengths in every third picture, one crowd."""
    folder = root / "pictures"
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for number in range(pictures):
        scene = compose(5, number, "train", size=size)
        height, width = scene.image.shape[:2]
        Image.fromarray(scene.image).save(folder / f"{number:04d}.png")
        images.append({"id": number, "file_name": f"{number:04d}.png", "height": height, "width": width})
        for thing, mask in zip(scene.things, scene.masks, strict=True):
            is_run = number % 3 == 2
            segmentation = encode_rle(mask, compressed=number % 2 == 0) if is_run else mask_polygons(mask)
            category = names.setdefault(thing.name.replace(" ", "_"), len(names) + 1)
            fields = {"category_id": category, "bbox": list(mask_box(mask)), "area": int(mask.sum()), "iscrowd": 0}
            annotations.append(
                {"id": 2**31 + len(annotations), "image_id": number, "segmentation": segmentation} | fields
            )
    for name in ODD:
        images.append({"id": name, "file_name": name, "height": 50, "width": 50})
        box = {"bbox": [0, 0, 20, 20], "area": 400, "segmentation": [[0, 0, 20, 0, 20, 20]], "category_id": 1}
        annotations += [{"id": f"{name}{i}", "image_id": name} | box for i in range(2 if name == ODD[0] else 1)]
    categories = [{"id": number, "name": name} for name, number in names.items()]
    path = root / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, folder
