"""Miniature data sets in their official layouts, made of the embedded pictures: what the tests of readers share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.scenes import Scene, compose

SIZE = 96
MAKERS: dict[str, Callable[[Path], None]] = {}
"""Name of a data set -> what writes its miniature below a root folder; the modules of this package register theirs."""


def maker(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers the function that writes the miniature of `name`."""

    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        MAKERS[name] = make
        return make

    return register


def scene(number: int) -> Scene:
    """A composed picture of about 96 x 80 pixels with 2 to 6 masked things; the same one for the same number."""
    return compose(11, number, "train", size=SIZE)


def save_picture(image: np.ndarray, path: Path, mode: str = "RGB") -> None:
    """Writes a JPEG or PNG; mode "L" and "CMYK" make the grey and the four-coloured JPEGs of real data sets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(path)


def save_labels(labels: np.ndarray, path: Path, palette: bool = False) -> None:
    """Writes a map of class numbers as PNG, with a palette where `palette` says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image.putpalette([value for number in range(256) for value in (number, 255 - number, (7 * number) % 256)])
    image.save(path)


def save_json(content: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
