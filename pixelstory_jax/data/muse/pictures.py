"""What the pictures of a COCO-format file show, and which of them are worth a question about several things."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class InstancesError(ValueError):
    """A file of annotations that cannot be used: one sentence that names it and what was expected."""


@dataclass(frozen=True)
class Instance:
    """One annotated thing.

    Attributes:
      category: the name as the file has it, as "bow_(decorative_ribbons)"; name: as people say it, "bow".
      box: x, y, width, height in pixels, cut at the border. area: of the mask, in pixels.
      segmentation: as the file has it: polygons or run lengths.
    """

    category: str
    name: str
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    segmentation: Any

    @property
    def centre(self) -> tuple[float, float]:
        return self.box[0] + self.box[2] / 2, self.box[1] + self.box[3] / 2


@dataclass(frozen=True)
class Picture:
    """A picture with the instances that can be asked about.

    Attributes:
      file_name: below the folder of pictures. coco_url: as in COCO's files of 2017, or "".
      instances: those that are large enough, larger ones first where there were too many.
      unclear: names of which the picture has more than `instances` shows: small ones, crowds.
    """

    file_name: str
    coco_url: str
    height: int
    width: int
    instances: tuple[Instance, ...]
    unclear: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """Which instances and pictures are taken.

    Attributes:
      least_share: of the picture's area that an instance must cover. fewest, most: instances of a picture; those
        with fewer are left out, of those with more the largest are taken.
    """

    least_share: float = 0.002
    fewest: int = 2
    most: int = 30


def read_pictures(path: Path, choice: Choice) -> list[Picture]:
    """The pictures of a COCO-format file (COCO, LVIS, or made by a labelling tool) that have enough clear instances.

    Raises:
      InstancesError: it cannot be read, or has not the lists `images`, `annotations` and `categories`.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InstancesError(f"There is no file of annotations {path}.") from None
    except (OSError, ValueError) as error:
        raise InstancesError(f"{path} cannot be read as JSON: {error}.") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise InstancesError(f"{path} is not in COCO's format: lists named {', '.join(lists)} are expected.")
    try:
        categories = {category["id"]: str(category["name"]) for category in content["categories"]}
        annotations: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            annotations.get(annotation["image_id"], []).append(annotation)
        pictures = [_picture(image, annotations[image["id"]], categories, choice) for image in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InstancesError(f"{path} is not in COCO's format: {reason}.") from error
    return [picture for picture in pictures if len(picture.instances) >= choice.fewest]


def readable(category: str) -> str:
    """ "traffic_light" -> "traffic light", "bow_(decorative_ribbons)" -> "bow", "TV" -> "TV", "Dog" -> "dog"."""
    words = re.sub(r"[_\s]+", " ", re.sub(r"[_\s]*\([^)]*\)", "", category)).strip()
    return words if words.isupper() and len(words) < 4 else words.lower()


def picture_file(picture: Picture, folder: Path) -> Path | None:
    """Where the picture is below `folder`, or None: by its name, by the end of its URL, or by its last name."""
    candidates = [picture.file_name, "/".join(picture.coco_url.split("/")[-2:])]
    candidates += [Path(name).name for name in candidates if name]
    for name in filter(None, candidates):
        path = folder / name
        if ".." not in Path(name).parts and path.is_file():
            return path
    return None


def _picture(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], categories: Mapping[Any, str], choice: Choice
) -> Picture:
    height, width = int(image["height"]), int(image["width"])
    if height < 1 or width < 1:
        raise ValueError(f"the picture {image['id']} is {width} x {height}")
    clear: list[Instance] = []
    unclear: set[str] = set()
    for annotation in annotations:
        instance = _instance(annotation, categories[annotation["category_id"]], height, width)
        if annotation.get("iscrowd") or instance.area < choice.least_share * height * width:
            unclear.add(instance.name)
        elif instance.segmentation:
            clear.append(instance)
    if len(clear) > choice.most:
        clear.sort(key=lambda instance: -instance.area)
        unclear |= {instance.name for instance in clear[choice.most :]}
        clear = clear[: choice.most]
    url = str(image.get("coco_url") or "")
    name = str(image.get("file_name") or url.rpartition("/")[2])
    if Path(name).is_absolute() or ".." in Path(name).parts:
        name = Path(name).name
    if not name:
        raise ValueError(f"the picture {image['id']} has neither file_name nor coco_url")
    return Picture(name, url, height, width, tuple(clear), frozenset(unclear))


def _instance(annotation: Mapping[str, Any], category: str, height: int, width: int) -> Instance:
    """Its box is cut at the border of the picture; one that is no box counts as empty."""
    x, y, w, h = (float(value) for value in annotation["bbox"])
    if not all(map(math.isfinite, (x, y, w, h))):
        x = y = w = h = 0.0
    left, top = min(max(x, 0.0), width), min(max(y, 0.0), height)
    right, bottom = min(max(x + w, left), width), min(max(y + h, top), height)
    box = (left, top, right - left, bottom - top)
    area = min(float(annotation.get("area") or box[2] * box[3]), box[2] * box[3])
    return Instance(
        category, readable(category), int(annotation["category_id"]), box, area, annotation.get("segmentation")
    )
