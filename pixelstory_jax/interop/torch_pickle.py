"""Weights in files of `torch.save` (.bin, .pth, .pt, .ckpt), read without torch and without running anything in them.

Both formats are read: the zip archive (torch 1.6 and later; `torch/serialization.py`, `_save`) and the row of pickles
before it (`_legacy_save`). Only the list of tensors is read at once; their values stay in the file until they are asked
for.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pixelstory_jax.interop.restricted_pickle import (
    CONTAINERS,
    LIMIT,
    Constructor,
    DamagedPickle,
    PickleError,
    load_pickle,
    shown,
)
from pixelstory_jax.interop.tensors import FileTensor, WeightsError

WRAPPERS = ("state_dict", "model", "module")  # of Lightning, of many training scripts, of DeepSpeed
_STORAGES: dict[str, Any] = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
_ZIP_START = b"PK\x03\x04"
_ZIP_ENTRY = struct.Struct("<4s22xHH")  # of the header before each entry: signature, lengths of name and extra field
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_TRUNCATED = "is truncated: it ends before its tensors do"
_MAX_AXES = 32  # what every supported NumPy can hold
_MAX_NUMBER = 1 << 62
_MAX_WRAPPERS = 4


def open_torch_file(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """The tensors of a file of `torch.save`, by name, not read yet.

    The file holds a state dict, or a table with one under "state_dict", "model" or "module", whose neighbours are then
    left out; so are entries of a state dict that are no tensors. Parameters are read as their tensors.

    Raises:
      WeightsError: absent, empty, truncated, no such file, a TorchScript program, tables of tensors within a state
        dict, a tensor outside its storage, or a pickle that asks for anything but tensors (named).
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            return _open(file, str(path))
    except PickleError as error:
        raise WeightsError(f"{path} {error}.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}).") from error


def _open(file: BinaryIO, path: str) -> dict[str, FileTensor]:
    if not file.read(1):
        raise PickleError("is empty")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = len(mapped)
    file.seek(0)
    table = _state_dict(_read_zip(file, size) if mapped[:4] == _ZIP_START else _read_legacy(file, size))
    tensors: dict[str, FileTensor] = {}
    seen: set[int] = set()
    for name, tensor in table.items():
        if isinstance(tensor, _Tensor):
            _check(name, tensor, size)
            tensors[name] = FileTensor(tensor.shape, tensor.span.storage.dtype, partial(_read, mapped, tensor), path)
        elif _holds_tensors(tensor, seen):
            raise PickleError(
                f"holds tensors inside {shown(name)}; they were expected side by side, at the top or in one of "
                + ", ".join(WRAPPERS)
            )
    if not tensors:
        raise PickleError("holds no tensors")
    return tensors


# What the pickle is made of: nothing of it is a class of torch.


@dataclass(frozen=True)
class _StorageType:
    """Stands for torch.FloatStorage and its like."""

    dtype: np.dtype


@dataclass
class _Storage:
    """A row of values in the file; `place` is its position in bytes, which the legacy format tells after the pickle."""

    dtype: np.dtype
    count: int
    place: int = 0


@dataclass(frozen=True)
class _Span:
    """A storage, or the part of one that older releases of torch shared between tensors: positions in values."""

    storage: _Storage
    first: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor over a span; `first` and `strides` are counted in values."""

    span: _Span
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list):
        raise ValueError("no row of sizes")
    if len(values) > _MAX_AXES:
        raise PickleError(f"holds a tensor with {len(values)} axes; {_MAX_AXES} can be read")
    if not all(_is_number(value) for value in values):
        raise ValueError("no sizes")
    return tuple(values)


def _rebuild_tensor(span: Any, first: Any, shape: Any, strides: Any) -> _Tensor:
    tensor = _Tensor(span, first, _numbers(shape), _numbers(strides))
    if type(span) is not _Span or not _is_number(first) or len(tensor.shape) != len(tensor.strides):
        raise ValueError("no tensor")
    return tensor


def _rebuild_tensor_v2(
    span: Any, first: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    if metadata:  # marks of values that are negated or conjugated when they are used
        raise PickleError("holds a tensor with lazily negated or conjugated values, which are not read")
    return _rebuild_tensor(span, first, shape, strides)


def _rebuild_parameter(tensor: Any, *others: Any) -> _Tensor:
    if type(tensor) is not _Tensor:
        raise ValueError("a parameter of no tensor")
    return tensor


_ALLOWED: Mapping[str, Any] = {
    **CONTAINERS,
    **{f"torch {name}Storage": _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
    "torch Size": Constructor(_numbers),
    "torch._utils _rebuild_tensor": Constructor(_rebuild_tensor),
    "torch._utils _rebuild_tensor_v2": Constructor(_rebuild_tensor_v2),
    "torch._utils _rebuild_parameter": Constructor(_rebuild_parameter),
    "torch._utils _rebuild_parameter_with_state": Constructor(_rebuild_parameter),
}


def _storage_identity(identity: Any, length: int) -> tuple[np.dtype, str, int]:
    """Type, key and count of values of ("storage", type, key, device, count, …), of `length` in all."""
    if type(identity) is not tuple or len(identity) != length or identity[0] != "storage":
        raise DamagedPickle("refers to something that is no storage of a tensor")
    kind, key, count = identity[1], identity[2], identity[4]
    if type(kind) is not _StorageType or type(key) is not str or not _is_number(count):
        raise DamagedPickle("refers to a storage in an unknown way")
    return kind.dtype, key, count


# The zip archive: ROOT/data.pkl is the pickle, ROOT/data/KEY the bytes of each storage.


def _read_zip(file: BinaryIO, size: int) -> Any:
    archive = _Archive(file, size)
    start, length = archive.find("data.pkl")
    if "byteorder" in archive:
        order_start, order_length = archive.find("byteorder")
        file.seek(order_start)
        if file.read(min(order_length, 16)) != b"little":
            raise PickleError("was written by a big-endian machine, which is not read")
    file.seek(start)
    storages: dict[str, _Storage] = {}
    return load_pickle(file, _ALLOWED, partial(_zip_storage, archive, storages), min(length, LIMIT))


class _Archive:
    """Where the entries of a zip archive lie in its file.

    Raises:
      PickleError: no archive of torch.save, or a damaged one.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
            raise PickleError("is truncated or damaged: its zip archive has no whole list of entries") from error
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) < len(entries):
            raise PickleError("is a zip archive with two entries of one name, so it is refused")
        roots = [name.partition("/")[0] for name in self.entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise PickleError("is a zip archive, but none that torch.save has written")
        self.root = roots[0]
        if "constants.pkl" in self or any(name.startswith(f"{self.root}/code/") for name in self.entries):
            raise PickleError("is a TorchScript program, not a file of weights; save its state_dict() by torch.save")

    def __contains__(self, name: str) -> bool:
        return f"{self.root}/{name}" in self.entries

    def find(self, name: str) -> tuple[int, int]:
        """Position and length, in bytes, of an entry."""
        entry = self.entries.get(f"{self.root}/{name}")
        if entry is None:
            raise PickleError(f"is damaged: there is no entry {shown(name)} in it")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise PickleError(
                f"holds {shown(name)} compressed or encrypted, which torch.save never does; it is not read"
            )
        start = self._start(entry)
        if start is None:
            raise PickleError(f"is damaged: the entry {shown(name)} is not where it should be")
        if entry.file_size != entry.compress_size or start + entry.file_size > self.size:
            raise PickleError(_TRUNCATED)
        return start, entry.file_size

    def _start(self, entry: zipfile.ZipInfo) -> int | None:
        """Position of the bytes of an entry, which its own header tells, if that is there."""
        if not 0 <= entry.header_offset <= self.size - _ZIP_ENTRY.size:
            return None
        self.file.seek(entry.header_offset)
        signature, name_length, extra_length = _ZIP_ENTRY.unpack(self.file.read(_ZIP_ENTRY.size))
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if signature != _ZIP_START or self.file.read(name_length) != name:
            return None
        return entry.header_offset + _ZIP_ENTRY.size + name_length + extra_length


def _zip_storage(archive: _Archive, storages: dict[str, _Storage], identity: Any) -> _Span:
    dtype, key, count = _storage_identity(identity, 5)
    if key not in storages:
        position = archive.file.tell()
        start, length = archive.find(f"data/{key}")
        archive.file.seek(position)
        if count * dtype.itemsize > length:
            raise PickleError(_TRUNCATED)
        storages[key] = _Storage(dtype, count, start)
    return _whole(storages[key], dtype, count)


def _whole(storage: _Storage, dtype: np.dtype, count: int) -> _Span:
    if (storage.dtype, storage.count) != (dtype, count):
        raise DamagedPickle("is damaged: it gives two types or sizes to one storage")
    return _Span(storage, 0, count)


# The legacy format: five pickles (magic number, version, machine, tensors, keys of storages), then the storages.


def _read_legacy(file: BinaryIO, size: int) -> Any:
    try:
        magic = load_pickle(file, limit=64)
    except DamagedPickle:
        magic = None
    if magic != _LEGACY_MAGIC:
        raise PickleError("is no file that torch.save has written")
    if load_pickle(file, limit=64) != _LEGACY_VERSION:
        raise PickleError(f"is of an unknown version of torch.save; {_LEGACY_VERSION} was expected")
    load_pickle(file, limit=4096)  # the machine that wrote it: values are little-endian on every one
    storages: dict[str, _Storage] = {}
    top = load_pickle(file, _ALLOWED, partial(_legacy_storage, storages))
    keys = load_pickle(file)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise PickleError("is damaged: it has no list of storages")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise PickleError("is damaged: its list of storages is not that of its tensors")
    for key in keys:
        _place(storages[key], file, size)
    return top


def _legacy_storage(storages: dict[str, _Storage], identity: Any) -> _Span:
    dtype, key, count = _storage_identity(identity, 6)
    whole = _whole(storages.setdefault(key, _Storage(dtype, count)), dtype, count)
    if identity[5] is None:
        return whole
    view = identity[5]  # (its key, first value, count)
    if type(view) is not tuple or len(view) != 3 or not _is_number(view[1]) or not _is_number(view[2]):
        raise DamagedPickle("refers to a part of a storage in an unknown way")
    if view[1] + view[2] > count:
        raise PickleError("refers to a part outside of a storage")
    return _Span(whole.storage, view[1], view[2])


def _place(storage: _Storage, file: BinaryIO, size: int) -> None:
    """Notes where a storage lies, with `file` at the count before it, and moves behind it."""
    header = file.read(8)
    if len(header) < 8:
        raise PickleError(_TRUNCATED)
    if int.from_bytes(header, "little", signed=True) != storage.count:
        raise PickleError("is damaged: a storage has another size than its tensors say")
    storage.place = file.tell()
    end = storage.place + storage.count * storage.dtype.itemsize
    if end > size:
        raise PickleError(_TRUNCATED)
    file.seek(end)


# From what the pickle holds to arrays.


def _state_dict(top: Any) -> dict[Any, Any]:
    """The table of tensors in what was saved."""
    if isinstance(top, _Tensor):
        raise PickleError("holds one tensor without a name; a table of tensors by name was expected")
    table = top
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(table, dict):
            raise PickleError("holds no table of tensors")
        inner = [key for key in WRAPPERS if isinstance(table.get(key), dict) and _holds_tensors(table[key], set())]
        if not inner:
            return table
        if len(inner) > 1:
            raise PickleError(f"holds tensors in {' and in '.join(inner)}; one of them was expected")
        table = table[inner[0]]
    raise PickleError(f"holds tables within tables deeper than {_MAX_WRAPPERS}")


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    """Whether there are tensors anywhere in tables and lists, which may contain themselves.

    Args:
      seen: the `id` of those that hold none, or are being looked at.
    """
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _Tensor):
            return True
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return False


def _check(name: Any, tensor: _Tensor, file_size: int) -> None:
    if type(name) is not str:
        raise PickleError(f"names a tensor by {shown(name)}; text was expected")
    span, shape = tensor.span, tensor.shape
    last = tensor.first + sum((length - 1) * stride for length, stride in zip(shape, tensor.strides, strict=True))
    if 0 not in shape and last >= span.count:
        raise PickleError(f"is damaged: its tensor {shown(name)} reaches outside of its storage")
    # Values that repeat (stride 0) take no space in the file, but would where they are copied.
    limit = _MAX_NUMBER if 0 in shape else file_size
    if math.prod(length for length in shape if length) * span.storage.dtype.itemsize > limit:
        raise PickleError(f"holds {shown(name)}, which is larger than the file, so it is refused")


def _read(mapped: mmap.mmap, tensor: _Tensor) -> np.ndarray:
    """A view of the mapped file, or a copy where values do not lie at multiples of their width."""
    storage, shape = tensor.span.storage, tensor.shape
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    width = storage.dtype.itemsize
    start = storage.place + (tensor.span.first + tensor.first) * width
    strides = tuple(stride * width if length > 1 else 0 for length, stride in zip(shape, tensor.strides, strict=True))
    array: np.ndarray = np.ndarray(shape, storage.dtype, mapped, start, strides)
    return array if array.flags.aligned else array.copy()
