"""The engine that reads and writes weights in PyTorch layouts by the mapping tables of `interop.tables`.

A table is data: rows (torch key, parameter path, layout) and the gaps that are meant. Both directions are strict: every
tensor and every parameter must be named by a row or a gap, and all that do not fit are reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from pixelstory_jax.interop.tensors import (
    LazyArray,
    LazyParams,
    TensorMap,
    WeightsError,
    cast,
    common_dtype,
    is_floating,
)
from pixelstory_jax.models.paths import flatten, unflatten

Tensors = dict[str, np.ndarray]
Params = dict[str, Any]
STACK = "{n}"
READ_AT_ONCE = 1 << 30  # bytes of a stacked parameter


@dataclass(frozen=True)
class Layout:
    """How a tensor of torch and a parameter of ours hold the same numbers.

    Attributes:
      torch, ours: the axes on both sides, as patterns of einops.
      sizes: lengths of axes that the patterns put together.
      part: for a tensor that holds several parameters, whose `ours` begins with that axis: which one. Read only.
    """

    torch: str
    ours: str
    sizes: tuple[tuple[str, int], ...] = ()
    part: int | None = None

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        value = rearrange(tensor, f"{self.torch} -> {self.ours}", **dict(self.sizes))
        return value if self.part is None else value[self.part]

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        if self.part is not None:
            raise WeightsError("A tensor that holds several parameters can be read, not written.")
        return rearrange(value, f"{self.ours} -> {self.torch}", **dict(self.sizes))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in torch of a parameter of `shape`."""
        if self.part is not None:
            shape = (dict(self.sizes)[self.ours.split()[0]], *shape)
        hollow = np.broadcast_to(np.float32(0), shape)  # takes no memory
        return rearrange(hollow, f"{self.ours} -> {self.torch}", **dict(self.sizes)).shape


@dataclass(frozen=True)
class Same(Layout):
    """The same array on both sides, of any shape."""

    torch: str = ""
    ours: str = ""

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        return value

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


LAYOUTS: dict[str, Layout] = {
    "same": Same(),
    "linear": Layout("o i", "i o"),
    "conv": Layout("o i h w", "h w i o"),
    "pointwise": Layout("o i 1 1", "i o"),
    "deconv": Layout("i o h w", "i h w o"),
    "row": Layout("1 d", "d"),
    "lead_linear": Layout("o i", "1 i o"),
    "lead": Layout("d", "1 d"),
}


@dataclass(frozen=True)
class Row:
    """One mapping. A torch key with `{n}` stands for n = 0, 1, …, stacked on the first axis of the parameter.

    `layout` is a name in `LAYOUTS` or a `Layout` of its own.
    """

    torch: str
    path: str
    layout: str | Layout = "same"

    @property
    def how(self) -> Layout:
        return LAYOUTS[self.layout] if isinstance(self.layout, str) else self.layout

    def keys(self, shape: tuple[int, ...]) -> list[str]:
        """The torch keys of a parameter of this shape."""
        if STACK in self.torch:
            return [self.torch.replace(STACK, str(number)) for number in range(shape[0])]
        return [self.torch]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        return self.how.torch_shape(shape[1:] if STACK in self.torch else shape)


def linear(torch: str, path: str, layout: str | Layout = "linear") -> tuple[Row, Row]:
    """Weight and bias of a map: linear, or a convolution by another layout."""
    return Row(f"{torch}.weight", f"{path}/kernel", layout), Row(f"{torch}.bias", f"{path}/bias")


def norm(torch: str, path: str) -> tuple[Row, Row]:
    """Weight and bias of a norm."""
    return Row(f"{torch}.weight", f"{path}/scale"), Row(f"{torch}.bias", f"{path}/bias")


@dataclass(frozen=True)
class Table:
    """Rows and intended gaps.

    Attributes:
      ignored: patterns (full match) of torch keys that have no parameter and are skipped on reading.
      ours_only: patterns of parameter paths that have no tensor; on reading they are left out of the result.
      more_layers: stacked keys beyond the parameter's first axis are skipped (a tower with only its first layers).
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()
    ours_only: tuple[str, ...] = ()
    more_layers: bool = False

    def prefixed(self, torch: str, path: str) -> Table:
        """The same table for a network that is part of another one."""
        return Table(
            tuple(Row(torch + row.torch, path + row.path, row.layout) for row in self.rows),
            tuple(re.escape(torch) + pattern for pattern in self.ignored),
            tuple(re.escape(path) + pattern for pattern in self.ours_only),
            self.more_layers,
        )

    def __add__(self, other: Table) -> Table:
        return Table(
            self.rows + other.rows,
            self.ignored + other.ignored,
            self.ours_only + other.ours_only,
            self.more_layers or other.more_layers,
        )


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def rows_by_path(table: Table, flat: Mapping[str, Any]) -> dict[str, Row]:
    """The row of each parameter; raises where one is named by no row or gap."""
    rows = {row.path: row for row in table.rows}
    unnamed = [path for path in flat if path not in rows and not _matches(table.ours_only, path)]
    if unnamed:
        raise WeightsError("The mapping table names no tensor for these parameters:" + _listing(unnamed))
    return {path: rows[path] for path in flat if path in rows}


def _listing(lines: Iterable[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def torch_shapes(table: Table, expected: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Torch key -> shape of everything that parameters of these shapes become (`expected`: anything with `.shape`)."""
    flat = flatten(expected)
    shapes = {}
    for path, row in rows_by_path(table, flat).items():
        shape = tuple(flat[path].shape)
        shapes.update(dict.fromkeys(row.keys(shape), row.torch_shape(shape)))
    return shapes


def map_tensors(
    table: Table, tensors: TensorMap, expected: Mapping[str, Any], dtype: Callable[[Any, Any], Any] | None = None
) -> LazyParams:
    """Parameters by slash path from tensors in a PyTorch layout; everything is checked, nothing is read yet.

    Args:
      table: the mapping.
      tensors: torch key -> tensor.
      expected: nested dict of the model's parameters or their `jax.ShapeDtypeStruct`s.
      dtype: (dtype in the file, expected dtype) -> dtype of the result; None keeps that of the file. That of a stack is
        one that holds all of its layers.

    Returns:
      All parameters but those that are `ours_only`.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    flat = flatten(expected)
    rows = rows_by_path(table, flat)
    shapes = torch_shapes(table, expected)
    missing = [f"missing: {key} {list(shape)}" for key, shape in shapes.items() if key not in tensors]
    wrong = [
        f"mis-shaped: {key} is {list(tensors[key].shape)}, expected {list(shape)}"
        for key, shape in shapes.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    skipped = table.ignored
    if table.more_layers:
        skipped += tuple(re.escape(row.torch).replace(re.escape(STACK), r"\d+") for row in rows.values())
    unexpected = [
        f"unexpected: {key} {list(value.shape)}"
        for key, value in tensors.items()
        if key not in shapes and not _matches(skipped, key)
    ]
    whole_numbers = [
        f"not a floating-point tensor: {key} is {tensors[key].dtype}"
        for key in shapes
        if key in tensors and not is_floating(tensors[key].dtype)
    ]
    if missing or wrong or unexpected or whole_numbers:
        raise WeightsError("These tensors do not fit:" + _listing(missing + wrong + unexpected + whole_numbers))
    return {path: _lazy(row, tensors, flat[path], dtype) for path, row in rows.items()}


def _lazy(row: Row, tensors: TensorMap, leaf: Any, dtype: Callable[[Any, Any], Any] | None) -> LazyArray:
    shape = tuple(leaf.shape)
    keys = row.keys(shape)
    own = common_dtype(np.dtype(tensors[key].dtype) for key in keys)
    kind = own if dtype is None else np.dtype(dtype(own, leaf.dtype))

    def one(key: str, index: tuple[slice, ...]) -> np.ndarray:
        return cast(key, row.how.to_ours(np.asarray(tensors[key]))[index], kind)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if STACK not in row.torch:
            return np.asarray(one(keys[0], index), order="C")
        chosen, rest = keys[index[0]], index[1:]
        first = one(chosen[0], rest) if chosen else np.empty((0,), kind)
        stacked = np.empty((len(chosen), *first.shape), kind)
        for number, key in enumerate(chosen):
            stacked[number] = first if number == 0 else one(key, rest)
        return stacked

    return LazyArray(shape, kind, part)


def read_torch_tensors(table: Table, tensors: TensorMap, expected: Mapping[str, Any]) -> Params:
    """As `map_tensors`, read at once: nested dict of NumPy arrays in the expected dtypes."""
    lazy = map_tensors(table, tensors, expected, lambda _, wanted: wanted)
    return unflatten({path: np.asarray(value) for path, value in lazy.items()})


def torch_pieces(row: Row, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that one parameter becomes, with their keys. Of a stack some layers at a time are read."""
    keys = row.keys(value.shape)
    if STACK not in row.torch:
        yield keys[0], np.asarray(row.how.to_torch(np.asarray(value)), order="C")
        return
    if isinstance(value, LazyArray) and not value.in_parts:
        value = np.asarray(value)
    layer_bytes = max(1, math.prod(value.shape[1:]) * value.dtype.itemsize)
    count = max(1, READ_AT_ONCE // layer_bytes)
    for start in range(0, len(keys), count):
        layers = np.asarray(value[start : start + count])
        for key, layer in zip(keys[start : start + count], layers, strict=True):
            yield key, np.asarray(row.how.to_torch(layer), order="C")


def to_torch_tensors(table: Table, params: Mapping[str, Any]) -> Tensors:
    """Parameters to tensors in the PyTorch layout; `ours_only` parameters are left out.

    Raises:
      WeightsError: where a parameter is named by no row or gap.
    """
    flat = flatten(params)
    tensors: Tensors = {}
    for path, row in rows_by_path(table, flat).items():
        tensors.update(torch_pieces(row, np.asarray(flat[path])))
    return tensors
