"""Weights in .safetensors files: read one tensor at a time, write whole files or shards."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixelstory_jax.interop.tensors import FileTensor, WeightsError
from pixelstory_jax.interop.torch_layout import Tensors

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPE_NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
_HEADER_ALIGNMENT = 8


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """The tensors of a file, not read yet.

    Raises:
      WeightsError: a file that is absent, truncated or no safetensors file.
    """
    return _open(path)[0]


def read_safetensors(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
      WeightsError: as `open_safetensors`.
    """
    tensors, metadata = _open(path)
    return {name: tensor.read() for name, tensor in tensors.items()}, metadata


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, FileTensor], dict[str, str]]:
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file.")
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        unknown = sorted({part.get_dtype() for part in slices.values()} - DTYPES.keys())
        if unknown:
            raise WeightsError(f"{path} holds tensors of {', '.join(unknown)}, which cannot be read.")
        tensors = {
            name: FileTensor(
                tuple(part.get_shape()), np.dtype(DTYPES[part.get_dtype()]), _reader(file, name), str(path)
            )
            for name, part in slices.items()
        }
        return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        twice = _repeated_name(Path(path))
        if twice:
            raise WeightsError(f"{path} holds two tensors of the name {twice}.") from error
        raise WeightsError(f"{path}: not a whole safetensors file ({error}).") from error


def _reader(file: Any, name: str) -> Any:
    return lambda: file.get_tensor(name)


def _repeated_name(path: Path) -> str | None:
    """A name that the header of a file has twice, if it can be read at all."""
    repeated: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    with contextlib.suppress(OSError, ValueError, struct.error), path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length <= path.stat().st_size:
            json.loads(file.read(length), object_pairs_hook=note)
    return repeated[0] if repeated else None


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (name -> array) under a temporary name beside `path`, then rename it."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(arrays, str(partial), metadata=dict(metadata or {}))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


class ShardWriter:
    """Writes tensors one at a time, in any order, into shards whose sizes are known before. Use as a context manager.

    Where everything fits into one file it is called STEM.safetensors; else STEM-00001-of-0000N.safetensors and so on,
    with STEM.safetensors.index.json beside them, as transformers and diffusers read them.

    Args:
      folder: where to write; files of these names in it are replaced.
      tensors: name -> (shape, dtype), in the order of the files.
      stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers).
      max_shard_size: bytes of a shard; a larger tensor has a shard of its own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        stem: str = "model",
        max_shard_size: int = 5_000_000_000,
    ) -> None:
        self.folder, self.stem = folder, stem
        self.expected = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        self.shards: list[list[str]] = [[]]
        filled = 0
        for name in tensors:
            size = self.size(name)
            if self.shards[-1] and filled + size > max_shard_size:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(name)
            filled += size
        self.written: set[str] = set()
        self.places: dict[str, tuple[Path, int]] = {}

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        shape, dtype = self.expected[name]
        return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    @property
    def files(self) -> list[str]:
        """Names of the shards."""
        count = len(self.shards)
        if count == 1:
            return [f"{self.stem}.safetensors"]
        return [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def __enter__(self) -> ShardWriter:
        for file_name, names in zip(self.files, self.shards, strict=True):
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                (shape, dtype), size = self.expected[name], self.size(name)
                header[name] = {
                    "dtype": DTYPE_NAMES[dtype],
                    "shape": list(shape),
                    "data_offsets": [offset, offset + size],
                }
                offset += size
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % _HEADER_ALIGNMENT)
            start = 8 + len(text)
            with (self.folder / file_name).open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                file.truncate(start + offset)
            for name in names:
                self.places[name] = self.folder / file_name, start + header[name]["data_offsets"][0]
        return self

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes one tensor; its shape and dtype are those given before."""
        if (value.shape, value.dtype) != self.expected[name]:
            raise WeightsError(f"{name} is {value.dtype}{list(value.shape)}, not what was announced.")
        path, offset = self.places[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        self.written.add(name)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            return
        missing = sorted(self.expected.keys() - self.written)
        if missing:
            raise WeightsError(f"These tensors were never written: {', '.join(missing)}.")
        if len(self.shards) > 1:
            total = sum(self.size(name) for name in self.expected)
            places = {name: file for file, names in zip(self.files, self.shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; expected one like 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name of a `*.index.json`.

    Raises:
      WeightsError: it is no such index, or names files outside its folder.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f'{index} is not an index of shards: a table "weight_map" was expected.') from error
    outside = sorted({file for file in places.values() if Path(file).name != file})
    if outside:
        raise WeightsError(f"{index} names {outside[0]!r}, which is not a file beside it.")
    return places
