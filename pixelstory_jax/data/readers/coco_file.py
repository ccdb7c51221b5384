"""Files in COCO's annotation format, and what readers of such files share.

{"images": [{"id", "file_name", "height", "width"}], "categories": [{"id", "name"}],
 "annotations": [{"id", "image_id", "category_id", "segmentation", "iscrowd", "bbox"}]}

Ids are compared as text, since numbers above 2^31 and text occur. Pictures without annotations are left out, so are
annotations of pictures that the file does not list. Damage of the file as a whole is a `LayoutError`, damage of an
entry an `AnnotationError` for its picture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from absl import logging

from pixelstory_jax.data.annotations import (
    Annotation,
    AnnotationError,
    Provenance,
    Region,
    Request,
    StoredMask,
)
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers.reader import LayoutError, need, read_file, read_json

FileMask = Mapping[str, Any] | Sequence[Sequence[float]]  # run lengths, or polygons: of `StoredMask` what files hold


@dataclass(frozen=True)
class CocoPicture:
    """A picture of the file.

    Attributes:
      id: as text; file: path below the folder of the pictures, "" where unusable; size: (H, W), (0, 0) likewise.
      unsure: ids of categories of which not every instance is annotated (LVIS).
      problem: what is wrong with it, or "".
      url: where COCO has it, or "".
    """

    id: str
    file: str
    size: tuple[int, int]
    unsure: tuple[str, ...] = ()
    problem: str = ""
    url: str = ""


@dataclass(frozen=True)
class CocoAnnotation:
    """One annotation: id and category as text, name of the category, mask (of length 0 where it has none), whether it
    is a crowd, its box (x, y, width, height) and its area in pixels where the file has them."""

    id: str
    category: str
    name: str
    mask: FileMask
    is_crowd: bool
    box: tuple[float, float, float, float] | None
    area: float | None = None


class CocoFile:
    """The annotations of a file, picture by picture, in the order of its list of pictures.

    They are kept as JSON text: a fifth of the memory that lists of numbers take, and quick to hand to other processes.

    Raises:
      LayoutError: it is missing, is no JSON, or lacks one of the three lists.
    """

    def __init__(self, path: Path, layout: Sequence[str]) -> None:
        content = read_json(path, layout, dict)
        self.path = path
        self.names = _names(_entries(content, "categories", path), path)
        pictures = _pictures(_entries(content, "images", path))
        found: dict[str, dict[str, None]] = {}  # a dict, so that an annotation that is there twice counts once
        strays = 0
        for entry in _entries(content, "annotations", path):
            picture = str(entry.get("image_id"))
            if picture in pictures:
                found.setdefault(picture, {})[json.dumps(entry, separators=(",", ":"))] = None
            else:
                strays += 1
        if strays:
            logging.warning("%s: %d annotations of pictures that it does not list are left out.", path, strays)
        self.pictures = [picture for picture in pictures.values() if picture.id in found]
        self._annotations = [f"[{','.join(found[picture.id])}]".encode() for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def annotations(self, index: int) -> list[CocoAnnotation]:
        """All annotations of a picture.

        Raises:
          AnnotationError: the entry of the picture or of one of them is damaged.
        """
        picture = self.pictures[index]
        if picture.problem:
            raise AnnotationError(f"{self.path}: picture {picture.id} {picture.problem}.")
        return [self._annotation(entry) for entry in json.loads(self._annotations[index])]

    def _annotation(self, entry: dict[str, Any]) -> CocoAnnotation:
        where = f"{self.path}: annotation {entry.get('id')} of picture {entry.get('image_id')}"
        category = str(entry.get("category_id"))
        if category not in self.names:
            raise AnnotationError(f"{where} has the category {category}, which the file does not name.")
        try:
            mask = _stored_mask(entry.get("segmentation"))
        except ValueError as error:
            raise AnnotationError(f"{where} {error}.") from None
        return CocoAnnotation(
            id=str(entry.get("id", "")),
            category=category,
            name=self.names[category],
            mask=mask,
            is_crowd=bool(entry.get("iscrowd")),
            box=_box(entry.get("bbox")),
            area=float(area) if isinstance(area := entry.get("area"), int | float) else None,
        )


Ask = Callable[[CocoPicture, Sequence[CocoAnnotation]], tuple[list[Region], list[Request]]]


class CocoReader:
    """A data set in a COCO file.

    Args:
      name, split: of the data set.
      root: the folder that provenances are relative to.
      pictures: the folder that the file's names of pictures are relative to.
      file: the annotations.
      ask: regions and requests of a picture, from those of its annotations that have a mask and are not ignored.
      ignored: ids of categories whose annotations, as those of crowds, are ignored pixels.
      layout: for errors.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        pictures: Path,
        file: CocoFile,
        ask: Ask,
        ignored: frozenset[str],
        layout: Sequence[str],
    ) -> None:
        self.name, self.split, self.root, self.file = name, split, root, file
        self.pictures, self.ask, self.ignored = need(pictures, layout), ask, ignored

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Annotation:
        picture, annotations = self.file.pictures[index], self.file.annotations(index)
        asked: list[CocoAnnotation] = []
        ignored: list[FileMask] = []
        for one in (one for one in annotations if len(one.mask)):
            if one.is_crowd or one.category in self.ignored:
                ignored.append(one.mask)
            else:
                asked.append(one)
        regions, requests = self.ask(picture, asked)
        if not requests:
            raise AnnotationError(f"{self.name}: {picture.file} shows nothing that can be asked for.")
        return Annotation(
            size=picture.size,
            task="names",
            regions=tuple(regions),
            requests=tuple(requests),
            provenance=Provenance(self.name, self.split, os.path.relpath(self._path(index), self.root), picture.id),
            ignored=united(ignored),
        )

    def picture(self, index: int) -> bytes:
        picture = self.file.pictures[index]
        if not picture.file:
            raise ImageError(f"{self.file.path}: picture {picture.id} {picture.problem}.")
        return read_file(self._path(index))

    def _path(self, index: int) -> Path:
        return self.pictures / self.file.pictures[index].file


def united(masks: Sequence[FileMask]) -> StoredMask | None:
    """All masks of a file as one, None if there is none."""
    return [part for mask in masks for part in ([mask] if isinstance(mask, Mapping) else mask)] or None


def _entries(content: dict[str, Any], field: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(field)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise LayoutError(f'{path} needs a list "{field}" of objects, as in the annotation files of COCO.')
    return entries


def _names(categories: Sequence[dict[str, Any]], path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for category in categories:
        number, name = category.get("id"), category.get("name")
        if number is None or not isinstance(name, str) or not name.strip():
            raise LayoutError(f"{path} has a category without id or name: {str(category)[:80]}.")
        if names.setdefault(str(number), name.strip()) != name.strip():
            raise LayoutError(f"{path} gives category {number} two names: {names[str(number)]} and {name}.")
    return names


def _pictures(entries: Sequence[dict[str, Any]]) -> dict[str, CocoPicture]:
    pictures: dict[str, CocoPicture] = {}
    for entry in entries:
        if entry.get("id") is None:
            continue  # nothing can belong to it
        picture = _picture(entry)
        known = pictures.setdefault(picture.id, picture)
        if known != picture:
            pictures[picture.id] = CocoPicture(picture.id, "", (0, 0), problem="has two entries that differ")
    return pictures


def _picture(entry: dict[str, Any]) -> CocoPicture:
    try:
        file = _inside(entry)
        height, width = int(entry["height"]), int(entry["width"])
        if height < 1 or width < 1:
            raise ValueError(f"has the size {height} x {width}")
        unsure = tuple(map(str, entry.get("not_exhaustive_category_ids") or ()))
    except KeyError as error:
        return CocoPicture(str(entry["id"]), "", (0, 0), problem=f"has no {error.args[0]}")
    except (ValueError, TypeError, OverflowError) as error:
        return CocoPicture(str(entry["id"]), "", (0, 0), problem=str(error))
    return CocoPicture(str(entry["id"]), file, (height, width), unsure, url=str(entry.get("coco_url") or ""))


def _inside(entry: dict[str, Any]) -> str:
    """The path of the picture; LVIS has only "coco_url", whose last folder and name are those of COCO's archives."""
    name = entry.get("file_name") or "/".join(str(entry.get("coco_url", "")).split("/")[-2:])
    if not name:
        raise KeyError("file_name")
    path = PurePosixPath(str(name).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"has the file name {name!r}, which is no path inside the folder of pictures")
    return str(path)


def _box(box: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        return None
    return box[0], box[1], box[2], box[3]


def _stored_mask(segmentation: Any) -> FileMask:
    """Run lengths, or the polygons that enclose something: of less than three corners (6 numbers) none does."""
    if isinstance(segmentation, Mapping):
        if not {"size", "counts"} <= set(segmentation):
            raise ValueError("has run lengths without size or counts")
        return segmentation
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError("has no segmentation in polygons or run lengths")
    return [polygon for polygon in segmentation if len(polygon) >= 6]
