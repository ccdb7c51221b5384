"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow.

NAME/CONFIG/VERSION/NAME-SPLIT.tfrecord-00000-of-000NN          or .array_record-00000-of-000NN

A record is a `tf.train.Example`: a protocol buffer of named lists of bytes, floats or whole numbers. Lists of lists are
kept as `PATH/ragged_flat_values` and `PATH/ragged_row_lengths_0`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.readers.packed import array_record
from pixelstory_jax.data.readers.reader import LayoutError, need

HEAD = 12  # bytes before a record of a TFRecord file: its length and a check sum
FOOT = 4  # bytes behind it: another check sum


class TfdsFolder:
    """Random access to the records of a split; can be pickled.

    Args:
      folder: has a folder for each version; the newest one is read.
      name: of the data set, with which its files begin.

    Raises:
      LayoutError: there is no version, no file of the split, or one of several files is missing or cut.
    """

    def __init__(self, folder: Path, name: str, split: str, layout: Sequence[str]) -> None:
        versions = [path for path in need(folder, layout).iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
        if not versions:
            raise LayoutError(f"{folder} has no folder of a version, as 1.0.0. Expected are:\n  " + "\n  ".join(layout))
        self.folder = max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
        files = sorted(self.folder.glob(f"{name}-{split}.*-[0-9]*-of-[0-9]*"))
        if not files or len(files) != int(files[0].name.rpartition("-")[2]):
            raise LayoutError(
                f"{self.folder} has {len(files)} files of the split {split}, which are not all. Expected are:\n  "
                + "\n  ".join(layout)
            )
        self._records = _TfRecords(files) if ".tfrecord-" in files[0].name else _array_records(files)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, list[Any]]:
        """Name of a feature -> its values; raises ValueError where the record is damaged."""
        try:
            return parse_example(self._records[index])
        except RuntimeError as error:  # of ArrayRecord's check sums
            raise ValueError(str(error)) from error


def _array_records(files: Sequence[Path]) -> Any:
    return array_record("array_record_data_source").ArrayRecordDataSource([str(path) for path in files])


class _TfRecords:
    """Records of TFRecord files, whose places are found by going from length to length."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        places = [(number, *place) for number, path in enumerate(files) for place in _places(path)]
        self.places = np.array(places, np.int64).reshape(-1, 3)  # file, first byte, length

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> bytes:
        number, start, length = self.places[index].tolist()
        with self.files[number].open("rb") as file:
            file.seek(start)
            return file.read(length)


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and length of each record."""
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            head = file.read(HEAD)
            length = struct.unpack("<Q", head[:8])[0] if len(head) == HEAD else size
            if start + HEAD + length + FOOT > size:
                raise LayoutError(f"{path} is cut short or no TFRecord file; copy or prepare it again.")
            yield start + HEAD, length
            start += HEAD + length + FOOT


# Protocol buffers: a field is a number and a value, which is a whole number or bytes.


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """Name of a feature -> its values: bytes, floats or ints.

    Raises:
      ValueError: it is no `tf.train.Example`.
    """
    features: dict[str, list[Any]] = {}
    for _, group in _fields(memoryview(record)):
        for _, entry in _fields(group):
            parts = dict(_fields(entry))
            kind, values = next(_fields(parts.get(2, memoryview(b""))), (0, memoryview(b"")))
            features[_bytes(parts.get(1)).decode()] = _values(kind, values)
    return features


def _values(kind: int, values: memoryview) -> list[Any]:
    """Of a list of bytes (1), of floats (2) or of whole numbers (3)."""
    found = [value for _, value in _fields(values)]
    if kind == 1:
        return [_bytes(value) for value in found]
    if kind == 2:
        return [number for value in found for number in np.frombuffer(_bytes(value), "<f4").tolist()]
    numbers = [number for value in found for number in ([value] if isinstance(value, int) else _numbers(value))]
    return [number - (1 << 64) if number >> 63 else number for number in numbers]


def _bytes(value: Any) -> bytes:
    if not isinstance(value, memoryview):
        raise ValueError("a number where bytes are expected")
    return bytes(value)


def _numbers(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        number, place = _number(data, place)
        yield number


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(data, int):
        raise ValueError("a number where a message is expected")
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        if key & 7 == 0:
            value, place = _number(data, place)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, place = _number(data, place)
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {key & 7}")
        if place + length > len(data):
            raise ValueError("a field longer than its message")
        yield key >> 3, data[place : place + length]
        place += length


def _number(data: memoryview, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place behind it."""
    number = shift = 0
    while place < len(data) and shift < 64:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
    raise ValueError("a number without end")
