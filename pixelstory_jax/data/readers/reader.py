"""What every reader of a data set is, and what readers share: files, layouts and their errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pixelstory_jax.data.annotations import Annotation
from pixelstory_jax.data.images import ImageError, open_image


class LayoutError(ValueError):
    """A folder that is not the data set: one sentence that names the missing file and the layout that is expected."""


class Reader(Protocol):
    """Random access to the annotated pictures of one split of a data set; can be pickled.

    Making one reads lists and indices but no picture. It raises `LayoutError` where the folder is not as expected.
    """

    name: str
    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Annotation:
        """Raises `AnnotationError` or `ImageError` where this one cannot be used; the others still can."""
        ...

    def picture(self, index: int) -> bytes:
        """The file of the picture as it is stored; raises `ImageError` where it cannot be read."""
        ...


def open_picture(reader: Reader, index: int, name: str) -> np.ndarray:
    """The picture uint8 [H, W, 3]; errors name it as `name` (of the provenance).

    Raises:
      ImageError: it is missing or damaged.
    """
    return decode_picture(reader.picture(index), f"{reader.name}: {name}")


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """The picture uint8 [H, W, 3] of a file; raises `ImageError`, with its name, where it is damaged."""
    try:
        return open_image(data)
    except ImageError as error:
        raise ImageError(str(error).replace("the given bytes", name)) from error


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file; raises `ImageError` where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"There is no picture at {path}.") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error


def picture_path(folder: Path, name: Any) -> Path:
    """The file of a picture that a data set names; raises `ImageError` where that is no path inside `folder`."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ImageError(f"{name!r} is named as a picture, but it is no path inside {folder}.")
    return folder / name


def need(path: Path, layout: Sequence[str]) -> Path:
    """The path, which must exist; `layout` are the lines of what the folder should hold.

    Raises:
      LayoutError: it does not.
    """
    if not path.exists():
        raise LayoutError(f"There is no {path}. Expected are:\n" + "\n".join(f"  {line}" for line in layout))
    return path


def read_json(path: Path, layout: Sequence[str], kind: type) -> Any:
    """The content of a JSON file, a `dict` or a `list` as `kind` says.

    Raises:
      LayoutError: it is missing, is no JSON, or holds something else.
    """
    try:
        content = json.loads(need(path, layout).read_bytes())
    except (ValueError, OSError) as error:
        if isinstance(error, LayoutError):
            raise
        raise LayoutError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise LayoutError(f"{path} holds a {type(content).__name__}, but a {kind.__name__} is expected.")
    return content
