"""Folders of weights as PyTorch programs read them, written one parameter at a time.

What a folder consists of is data: `TorchPart`s, each a file (or a set of shards) in a subfolder, with the table that
names its tensors. LLaMA, CLIP and LLaVA are one part; a pipeline of diffusers has one for each network.

    with TorchWriter(folder, parts, shapes) as writer:
        for path, value in params:  # in any order, from any source
            writer.write(path, value)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pixelstory_jax.interop.safetensors_files import ShardWriter
from pixelstory_jax.interop.tensors import LazyArray, WeightsError, cast
from pixelstory_jax.interop.torch_layout import Row, Table, rows_by_path, torch_pieces

MAX_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class TorchPart:
    """One network of a folder.

    Attributes:
      folder: the subfolder of its files; "" for none.
      stem: of the file names, "model" (transformers) or "diffusion_pytorch_model" (diffusers).
      table: its mapping table.
      prefix: what parameter paths begin with before those of the table, as "unet/". A parameter belongs to the part
        with the longest prefix that it begins with.
    """

    folder: str
    stem: str
    table: Table
    prefix: str = ""


@dataclass
class _Network:
    """A part with the parameters that belong to it, and its files.

    Attributes:
      rows: by path without the prefix; parameters without a tensor are not in it.
      digests: of each tensor that several parameters share, once one of them has been written.
    """

    rows: dict[str, Row]
    shared: frozenset[str]
    shards: ShardWriter
    digests: dict[str, bytes] = field(default_factory=dict)

    def takes(self, key: str, tensor: np.ndarray, path: str) -> bool:
        """Whether a tensor is still to be written; raises where another parameter has written other numbers."""
        if key not in self.shared:
            return True
        digest = hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).digest()
        if self.digests.setdefault(key, digest) != digest:
            raise WeightsError(f"{path} and another parameter are one tensor in PyTorch, {key}, but they differ.")
        return key not in self.shards.written


class TorchWriter:
    """Writes parameters into the files of a folder, each as soon as it is given. Use as a context manager.

    A tensor that two rows of a table name (an embedding that is also the head) is written once; both parameters have to
    be given, and to hold the same numbers. Parameters that a table has as `ours_only` (low-rank additions that have not
    been merged) are passed over.

    Args:
      folder: where to write; subfolders are made. Files of the same names are replaced.
      parts: what the folder consists of.
      shapes: slash path -> anything with `.shape` and `.dtype`, of every parameter that will be written.
      dtypes: torch key -> dtype of the tensor in the file; None, and a result of None, keep that of the parameter.
        Only floats are cast: integers and booleans stay what they are.
      max_shard_size: bytes of a file, see `ShardWriter`.
      progress: called with the torch key and the bytes of every tensor that was written; `size` is the sum of them.

    Raises:
      WeightsError: parameters that no row or gap names.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        parts: Sequence[TorchPart],
        shapes: Mapping[str, Any],
        dtypes: Callable[[str], Any] | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        self._dtypes, self._progress = dtypes or (lambda key: None), progress or (lambda key, size: None)
        self._networks: dict[str, _Network] = {}  # by prefix, longest first
        rest = dict(shapes)
        for part in sorted(parts, key=lambda part: -len(part.prefix)):
            own = {path: rest.pop(path) for path in list(rest) if path.startswith(part.prefix)}
            own = {path.removeprefix(part.prefix): leaf for path, leaf in own.items()}
            rows = rows_by_path(part.table, own)
            tensors, shared = self._plan(rows, own)
            shards = ShardWriter(Path(folder) / part.folder, tensors, part.stem, max_shard_size)
            self._networks[part.prefix] = _Network(rows, shared, shards)
        if rest:
            raise WeightsError("These parameters belong to no part of the folder:" + _listing(rest))
        self._paths, self._written = frozenset(shapes), set[str]()

    def _plan(
        self, rows: Mapping[str, Row], shapes: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[tuple[int, ...], np.dtype]], frozenset[str]]:
        """Shape and dtype of every tensor, and which of them several parameters share."""
        tensors: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        shared = set()
        for path, row in rows.items():
            shape, own = tuple(shapes[path].shape), shapes[path].dtype
            for key in row.keys(shape):
                wanted = self._dtypes(key) if jnp.issubdtype(own, jnp.floating) else None
                tensor = row.torch_shape(shape), np.dtype(own if wanted is None else wanted)
                if key in tensors:
                    shared.add(key)
                if tensors.setdefault(key, tensor)[0] != tensor[0]:
                    raise WeightsError(
                        f"{key} is {list(tensors[key][0])} by one parameter and {list(tensor[0])} by {path}."
                    )
        return tensors, frozenset(shared)

    @property
    def size(self) -> int:
        """Bytes of all tensors together."""
        return sum(network.shards.size(key) for network in self._networks.values() for key in network.shards.expected)

    def __enter__(self) -> TorchWriter:
        with contextlib.ExitStack() as files:
            for network in self._networks.values():
                network.shards.folder.mkdir(parents=True, exist_ok=True)
                files.enter_context(network.shards)
            self._files = files.pop_all()
        return self

    def write(self, path: str, value: Any) -> None:
        """Writes all tensors of one parameter: an array of NumPy or jax, or a LazyArray, which is read in pieces.

        Raises:
          WeightsError: a parameter that was not announced or has another shape, numbers that do not fit the dtype of
            the file, or others than those of the parameter that shares the tensor.
        """
        if path not in self._paths:
            raise WeightsError(f"The parameter {path} was not announced.")
        prefix = next(prefix for prefix in self._networks if path.startswith(prefix))
        network = self._networks[prefix]
        row = network.rows.get(path.removeprefix(prefix))
        if row is None:
            return
        for key, tensor in torch_pieces(row, value if isinstance(value, LazyArray) else np.asarray(value)):
            if key not in network.shards.expected:
                raise WeightsError(f"{path} has the shape {list(value.shape)}, which was not announced.")
            tensor = cast(key, tensor, network.shards.expected[key][1])
            if network.takes(key, tensor, path):
                network.shards.write(key, tensor)
                self._progress(key, tensor.nbytes)
        self._written.add(path)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        needed = {prefix + path for prefix, network in self._networks.items() for path in network.rows}
        missing = sorted(needed - self._written)
        if error is None and missing:
            lacking = WeightsError("These parameters were never written:" + _listing(missing))
            self._files.__exit__(type(lacking), lacking, None)
            raise lacking
        self._files.__exit__(kind, error, traceback)


def _listing(paths: Sequence[str] | Mapping[str, Any]) -> str:
    return "".join(f"\n  {path}" for path in paths)
