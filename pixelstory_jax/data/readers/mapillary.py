"""Mapillary Vistas 2.0: 124 classes of streets, named in the configuration that comes with it.

mapillary/config_v2.0.json
mapillary/{training,validation}/images/*.jpg
mapillary/{training,validation}/v2.0/labels/*.png

PixelLM asks for all 124. Here the eight that the owners do not evaluate ("evaluate": false: groups, ambiguous signs and
markings, unlabelled pixels) are ignored pixels.
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.label_maps import LabelMaps
from pixelstory_jax.data.readers.reader import LayoutError, read_json

SPLITS = {"train": "training", "val": "validation"}
LAYOUT = (
    "mapillary/config_v2.0.json",
    "mapillary/training/images/*.jpg, mapillary/validation/images/*.jpg",
    "mapillary/training/v2.0/labels/*.png, mapillary/validation/v2.0/labels/*.png",
)


def open_mapillary(root: Path, split: str) -> LabelMaps:
    """The reader of `root`/mapillary."""
    folder = root / "mapillary" / SPLITS[split]
    names = read_names(root / "mapillary" / "config_v2.0.json")
    return LabelMaps("mapillary", split, root, folder / "images", folder / "v2.0" / "labels", names, LAYOUT)


def read_names(path: Path) -> dict[int, str]:
    """Value in the maps -> name, of the classes that are asked for.

    Raises:
      LayoutError: the file has no list of labels with their names.
    """
    labels = read_json(path, LAYOUT, dict).get("labels")
    try:
        return {value: label["readable"].lower() for value, label in enumerate(labels) if label.get("evaluate", True)}
    except (TypeError, KeyError, AttributeError) as error:
        raise LayoutError(f'{path} needs a list "labels" of {{"readable": NAME, ...}}.') from error
