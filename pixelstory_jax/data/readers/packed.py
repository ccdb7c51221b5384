"""Data sets that `python -m experiments.prepare_data` has packed into ArrayRecord shards.

packed/NAME-SPLIT/set.json                                  what it holds, and size and digest of each shard
packed/NAME-SPLIT/NAME-SPLIT-00000-of-00012.array_record    a record a picture

A record is the annotation as one line of JSON (`data.annotations.to_json`), a line break, and the file of the picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixelstory_jax.data.annotations import Annotation, AnnotationError, from_json, to_json
from pixelstory_jax.data.readers.reader import LayoutError, read_json

FORMAT = 1
SET_FILE = "set.json"
LAYOUT = ("packed/NAME-SPLIT/set.json", "packed/NAME-SPLIT/NAME-SPLIT-00000-of-000NN.array_record")


@dataclass(frozen=True)
class Shard:
    """A file with so many pictures, its size in bytes and the SHA-256 of its content."""

    file: str
    pictures: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedSet:
    """What set.json says.

    Attributes:
      name, split: of the data set. source: the folder that it was packed from.
      version: of this package. side: longest side of a picture, 0 where pictures are as they were.
      counts: of its pictures, and of those left out because they cannot be used.
      shards: in the order of their pictures.
    """

    name: str
    split: str
    source: str
    version: str
    side: int
    counts: dict[str, int]
    shards: tuple[Shard, ...]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        (folder / SET_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> PackedSet:
        """Raises LayoutError: set.json is missing, damaged or of another format."""
        fields = read_json(folder / SET_FILE, LAYOUT, dict)
        if fields.get("format") != FORMAT:
            raise LayoutError(
                f"{folder / SET_FILE} has format {fields.get('format')!r}, this version reads {FORMAT}; pack it anew."
            )
        try:
            return cls(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})
        except (KeyError, TypeError) as error:
            raise LayoutError(f"{folder / SET_FILE} does not describe a packed data set: {error}") from error


class Packed:
    """The reader of a packed data set; any number of threads and, pickled, of processes may read.

    Raises:
      LayoutError: set.json or shards are missing, or a shard has another size than set.json says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.set = folder, PackedSet.read(folder)
        self.name, self.split = self.set.name, self.set.split
        check_shards(folder, self.set)
        data_source = array_record("array_record_data_source")
        paths = [f"{folder / shard.file}[0:{shard.pictures}]" for shard in self.set.shards]
        self._records = data_source.ArrayRecordDataSource(paths)
        self._last: dict[int, tuple[int, bytes]] = {}  # by thread: after an annotation its picture is asked for

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Annotation:
        return from_json(self._record(index).partition(b"\n")[0])

    def picture(self, index: int) -> bytes:
        return self._record(index).partition(b"\n")[2]

    def _record(self, index: int) -> bytes:
        number, record = self._last.get(threading.get_ident(), (-1, b""))
        if number != index:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.folder} has no picture {index}, it holds {len(self)}")
            try:
                record = self._records[index]
            except RuntimeError as error:
                raise AnnotationError(f"Picture {index} of {self.folder} cannot be read: {error}") from error
            self._last[threading.get_ident()] = index, record
        return record

    def changed_shards(self) -> list[str]:
        """A sentence for each shard whose content is not what was packed; all bytes are read."""
        return [
            f"{self.folder / shard.file} has changed since it was packed (SHA-256); copy or pack it again."
            for shard in self.set.shards
            if digest_of(self.folder / shard.file) != shard.sha256
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}}


def set_name(name: str, split: str) -> str:
    """NAME-SPLIT as files are called; signs of paths in it ("coco_instances:a/b.json:c") become hyphens."""
    return re.sub(r"[/\\:|{}]+", "-", f"{name}-{split}")


def record_of(annotation: Annotation, picture: bytes) -> bytes:
    """The record of an annotated picture."""
    return to_json(annotation).encode() + b"\n" + picture


def check_shards(folder: Path, described: PackedSet) -> None:
    """Raises LayoutError where a shard is missing or cut."""
    for shard in described.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise LayoutError(
                f"{path} {found}, {SET_FILE} beside it speaks of {shard.bytes:,} bytes; copy or pack it again."
            )


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_record(module: str) -> Any:
    """A module of the library `array_record`, which comes with Grain except on Windows.

    Raises:
      LayoutError: it is not installed.
    """
    try:
        return importlib.import_module(f"array_record.python.{module}")
    except ImportError as error:
        raise LayoutError("Packed data sets need the package array-record: pip install array-record") from error
