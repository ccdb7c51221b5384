"""What the pictures of a COCO-format file show, and which of them are worth a question about several things."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixelstory_jax.data.annotations import AnnotationError, StoredMask, decode_mask
from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.data.names import plain_name
from pixelstory_jax.data.readers.coco_file import CocoAnnotation, CocoFile, CocoPicture

LAYOUT = ("a JSON file in COCO's format: images, annotations, categories",)
ORIENTATION = 0x0112  # of EXIF: from 5 on, height and width change places


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
    category_id: int | str
    box: tuple[float, float, float, float]
    area: float
    segmentation: StoredMask

    @property
    def centre(self) -> tuple[float, float]:
        return self.box[0] + self.box[2] / 2, self.box[1] + self.box[3] / 2


@dataclass(frozen=True)
class Picture:
    """A picture with the instances that can be asked about.

    Attributes:
      file_name: below the folder of pictures. coco_url: as in COCO's files of 2017, or "".
      instances: those that are large enough, larger ones first where there were too many.
      unclear: names of which the picture has more than `instances` shows: small ones, crowds, what LVIS has not
        annotated in full.
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


def read_pictures(path: Path, choice: Choice) -> tuple[list[Picture], list[str]]:
    """(pictures of a COCO-format file that have enough clear instances, why others cannot be used).

    Raises:
      LayoutError: it cannot be read, or is not in COCO's format.
    """
    file = CocoFile(path, LAYOUT)
    pictures, problems = [], []
    for index, entry in enumerate(file.pictures):
        try:
            picture = _picture(entry, file.annotations(index), file.names, choice)
        except AnnotationError as error:
            problems.append(str(error))
            continue
        if len(picture.instances) >= choice.fewest:
            pictures.append(picture)
    return pictures, problems


def readable(category: str) -> str:
    """`plain_name` as it stands inside a sentence: "Dog" -> "dog", but "TV" -> "TV"; "" for what names nothing."""
    name = plain_name(category)
    return name if name.isupper() and len(name) < 4 else name.lower()


def picture_file(picture: Picture, folder: Path) -> Path | None:
    """Where the picture is below `folder`, or None: by its name, by the end of its URL, or by its last name."""
    by_url = "/".join(picture.coco_url.split("/")[-2:])
    names = (picture.file_name, by_url, Path(picture.file_name).name, Path(by_url).name)
    return next((folder / name for name in names if name and (folder / name).is_file()), None)


def problem_with(picture: Picture, file: Path) -> str:
    """Why the file of a picture cannot be used with its annotations, or ""; only its head is read."""
    try:
        with Image.open(file) as image:
            is_turned = image.getexif().get(ORIENTATION, 1) >= 5
            width, height = reversed(image.size) if is_turned else image.size
    except Exception as error:  # damaged heads raise almost anything
        return f"{file} cannot be read as a picture ({error})"
    if (width, height) == (picture.width, picture.height):
        return ""
    return f"{file} is {width} x {height} pixels, its annotations are for {picture.width} x {picture.height}"


def _picture(
    entry: CocoPicture, annotations: Sequence[CocoAnnotation], names: Mapping[str, str], choice: Choice
) -> Picture:
    height, width = entry.size
    clear: list[Instance] = []
    unclear = {readable(names[category]) for category in entry.unsure if category in names}
    for annotation in annotations:
        instance = _instance(annotation, height, width)
        if not instance.name:
            continue
        if annotation.is_crowd or not len(annotation.mask) or instance.area < choice.least_share * height * width:
            unclear.add(instance.name)
        else:
            clear.append(instance)
    if len(clear) > choice.most:
        clear.sort(key=lambda instance: -instance.area)
        unclear |= {instance.name for instance in clear[choice.most :]}
        clear = clear[: choice.most]
    return Picture(entry.file, entry.url, height, width, tuple(clear), frozenset(unclear))


def _box(annotation: CocoAnnotation, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x, y, width, height as annotated or, where the file has no box, around the mask; zeros where that is damaged."""
    if annotation.box is not None:
        return annotation.box
    try:
        return mask_box(decode_mask(annotation.mask, size))
    except (ValueError, TypeError, KeyError, OverflowError):
        return (0.0, 0.0, 0.0, 0.0)


def _instance(annotation: CocoAnnotation, height: int, width: int) -> Instance:
    """Its box is cut at the border of the picture; one that is no box counts as empty."""
    x, y, w, h = _box(annotation, (height, width))
    if not all(map(math.isfinite, (x, y, w, h))):
        x = y = w = h = 0.0
    left, top = min(max(x, 0.0), width), min(max(y, 0.0), height)
    right, bottom = min(max(x + w, left), width), min(max(y + h, top), height)
    box = (left, top, right - left, bottom - top)
    area = min(annotation.area or box[2] * box[3], box[2] * box[3])
    number = int(annotation.category) if annotation.category.isdigit() else annotation.category
    return Instance(annotation.name, readable(annotation.name), number, box, area, annotation.mask)
