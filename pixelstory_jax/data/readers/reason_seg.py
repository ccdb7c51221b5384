"""ReasonSeg (of LISA): questions that take reasoning, each picture with its own file of polygons.

reason_seg/ReasonSeg/{train,val,test}/*.jpg and *.json of the same names
reason_seg/ReasonSeg/explanatory/train.json         answers in words for some of the training pictures

A file has {"text": [...], "is_sentence": ..., "shapes": [{"label", "points"}, ...]}. Source of the rules:
`utils/data_processing.py` and `utils/reason_seg_dataset.py` of PixelLM and LISA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.images import ImageError, picture_size
from pixelstory_jax.data.masks import outlined_polygon
from pixelstory_jax.data.readers.reader import LayoutError, need, read_file, read_json

SPLITS = ("train", "val", "test")
LAYOUT = (
    "reason_seg/ReasonSeg/train/*.jpg and *.json, the same for val and test",
    "reason_seg/ReasonSeg/explanatory/train.json",
)
TARGET, IGNORED = 1, 255


class ReasonSeg:
    """One region a picture, which answers all of its questions; what is labelled as to be ignored is ignored.

    Raises:
      LayoutError: a folder or the explanations are missing.
    """

    name = "reason_seg"

    def __init__(self, root: Path, split: str) -> None:
        folder = root / "reason_seg/ReasonSeg"
        self.split, self.root = split, root
        self.pictures = sorted(need(folder / split, LAYOUT).glob("*.jpg"))
        if not self.pictures:
            raise LayoutError(f"{folder / split} holds no pictures (.jpg).")
        self.explanations = read_explanations(folder / "explanatory/train.json") if split == "train" else {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Annotation:
        path = self.pictures[index]
        size = picture_size(path)
        file = path.with_suffix(".json")
        try:
            content = read_text_json(file)
            labels = draw_shapes(content["shapes"], size)
            texts = content["text"]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError("text is no list of texts")
            is_sentence = bool(content["is_sentence"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, AnnotationError):
                raise
            raise AnnotationError(
                f"{file} needs text, is_sentence and shapes with label and points: {type(error).__name__} {error}"
            ) from error
        if not texts:
            raise AnnotationError(f"{file} has no text, so nothing can be asked.")
        explanation = self.explanations.get(path.name, "")
        ignored = labels == IGNORED
        return Annotation(
            size=size,
            task="reasoning",
            regions=(Region(labels == TARGET, id=path.stem),),
            requests=tuple(
                Request((text,), (0,), is_sentence, explanation=explanation, id=f"{path.stem}-{number}")
                for number, text in enumerate(texts)
            ),
            provenance=Provenance(self.name, self.split, path.relative_to(self.root).as_posix(), path.stem),
            ignored=ignored if ignored.any() else None,
        )

    def picture(self, index: int) -> bytes:
        return read_file(self.pictures[index])


def read_text_json(path: Path) -> Any:
    """The JSON of a picture, which some editors wrote as cp1252.

    Raises:
      AnnotationError: it is missing or no JSON.
    """
    try:
        data = read_file(path)
    except ImageError:
        raise AnnotationError(f"There is no {path}, the annotation of the picture beside it.") from None
    try:
        try:
            return json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return json.loads(data.decode("cp1252"))
    except ValueError as error:
        raise AnnotationError(f"{path} cannot be read as JSON: {error}") from error


def draw_shapes(shapes: list[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W]: `TARGET`, `IGNORED` or 0; the largest shape is painted first, so that smaller ones lie on it."""
    masks = [
        (outlined_polygon(shape["points"], size), IGNORED if "ignore" in shape["label"].lower() else TARGET)
        for shape in shapes
        if shape["label"].lower() != "flag"
    ]
    labels = np.zeros(size, np.uint8)
    for mask, value in sorted(masks, key=lambda pair: pair[0].sum())[::-1]:  # the later one of two equal ones first
        labels[mask] = value
    return labels


def read_explanations(path: Path) -> dict[str, str]:
    """Name of a picture -> why the answer is what it is.

    Raises:
      LayoutError: the file is missing or has another form.
    """
    entries = read_json(path, LAYOUT, list)
    try:
        return {entry["image"]: str(entry["outputs"]) for entry in entries}
    except (KeyError, TypeError) as error:
        raise LayoutError(f"{path} needs entries with image, query and outputs: {error}") from error
