"""What ADE20K, COCO-Stuff and Mapillary share: a picture of class numbers beside every picture.

Each class that occurs is one region, all its instances together, as in PixelLM's `utils/sem_seg_dataset.py`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pixelstory_jax.data.annotations import Annotation, AnnotationError, ClassMask, Provenance, Region, Request
from pixelstory_jax.data.images import MAX_PIXELS, ImageError
from pixelstory_jax.data.readers.reader import LayoutError, need, read_file


class LabelMaps:
    """A data set of pictures with class maps.

    Args:
      name, split: of the data set.
      root: the folder that provenances are relative to.
      pictures, labels: folders of the pictures (`.jpg`) and of the maps (`.png`, of the same names).
      names: value in the map -> name of the class; pixels of other values are ignored.
      layout: for errors.

    Raises:
      LayoutError: a folder is missing or holds no maps.
    """

    def __init__(
        self,
        name: str,
        split: str,
        root: Path,
        pictures: Path,
        labels: Path,
        names: Mapping[int, str],
        layout: Sequence[str],
    ) -> None:
        self.name, self.split, self.root, self.names = name, split, root, dict(names)
        self.pictures, self.labels = need(pictures, layout), need(labels, layout)
        self.stems = sorted(path.stem for path in labels.glob("*.png"))
        if not self.stems:
            raise LayoutError(f"{labels} holds no maps (.png). Expected are:\n" + "\n".join(f"  {x}" for x in layout))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> Annotation:
        stem = self.stems[index]
        labels = read_label_map(self.labels / f"{stem}.png")
        present = [value for value in _values(labels) if value in self.names]
        if not present:
            raise AnnotationError(f"{self.name}: {self.labels / stem}.png shows no class that can be asked for.")
        regions = tuple(Region(ClassMask(labels, value), name=self.names[value], id=str(value)) for value in present)
        requests = tuple(Request((region.name,), (number,)) for number, region in enumerate(regions))
        ignored = ~np.isin(labels, list(self.names))
        picture = (self.pictures / f"{stem}.jpg").relative_to(self.root).as_posix()
        return Annotation(
            size=(labels.shape[0], labels.shape[1]),
            task="names",
            regions=regions,
            requests=requests,
            provenance=Provenance(self.name, self.split, picture, stem),
            ignored=ignored if ignored.any() else None,
        )

    def picture(self, index: int) -> bytes:
        return read_file(self.pictures / f"{self.stems[index]}.jpg")


def _values(labels: np.ndarray) -> list[int]:
    """The numbers that occur, in order; counting is fast, but for bytes only."""
    is_byte = labels.dtype == np.uint8
    return (np.flatnonzero(np.bincount(labels.ravel())) if is_byte else np.unique(labels)).tolist()


def read_label_map(path: Path) -> np.ndarray:
    """Class numbers uint8 (or int32, of more than 256 classes) [H, W] of a PNG with one channel or a palette.

    Raises:
      ImageError: it cannot be read, or has colours in place of numbers.
    """
    data = read_file(path)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS or image.mode not in ("L", "P", "I", "I;16", "1"):
                raise ImageError(
                    f"{path} is no map of class numbers (mode {image.mode}, {image.width}x{image.height})."
                )
            numbers = np.array(image)
            return numbers.astype(np.uint8 if numbers.dtype.itemsize == 1 else np.int32)
    except ImageError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ImageError(f"{path} is damaged and cannot be read as a map of class numbers ({error}).") from error
