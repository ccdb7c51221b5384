"""The engine that reads and writes weights in PyTorch layouts by the mapping tables of `interop.tables`.

A table is data: rows (torch key, parameter path, layout) and the gaps that are meant. Both directions are strict: every
tensor and every parameter must be named by a row or a gap, and all that do not fit are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from pixelstory_jax.models.paths import flatten, unflatten

Tensors = dict[str, np.ndarray]
Params = dict[str, Any]
STACK = "{n}"


class WeightsError(ValueError):
    """Weights that do not fit; the message names every missing, unexpected and mis-shaped tensor."""


def _layout(torch: str, ours: str) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    return (
        lambda x: rearrange(x, f"{torch} -> {ours}"),
        lambda x: rearrange(x, f"{ours} -> {torch}"),
    )


LAYOUTS = {
    "same": (lambda x: x, lambda x: x),
    "linear": _layout("o i", "i o"),
    "conv": _layout("o i h w", "h w i o"),
    "pointwise": _layout("o i 1 1", "i o"),
    "deconv": _layout("i o h w", "i h w o"),
    "row": _layout("1 d", "d"),
    "lead_linear": _layout("o i", "1 i o"),
    "lead": _layout("d", "1 d"),
}


@dataclass(frozen=True)
class Row:
    """One mapping. A torch key with `{n}` stands for n = 0, 1, …, stacked on the first axis of the parameter."""

    torch: str
    path: str
    layout: str = "same"


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


def _torch_pieces(row: Row, values: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that one parameter becomes."""
    to_torch = LAYOUTS[row.layout][1]
    if STACK in row.torch:
        for number, value in enumerate(values):
            yield row.torch.replace(STACK, str(number)), to_torch(value)
    else:
        yield row.torch, to_torch(values)


def _paths(table: Table, flat: Mapping[str, Any]) -> dict[str, Row]:
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
    for path, row in _paths(table, flat).items():
        hollow = np.broadcast_to(np.float32(0), flat[path].shape)  # takes no memory
        shapes.update({key: value.shape for key, value in _torch_pieces(row, hollow)})
    return shapes


def read_torch_tensors(table: Table, tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> Params:
    """Parameters from tensors in a PyTorch layout.

    Args:
      table: the mapping.
      tensors: torch key -> array.
      expected: nested dict of the model's parameters or their `jax.ShapeDtypeStruct`s.

    Returns:
      Nested dict of numpy arrays in the expected dtypes; parameters that are `ours_only` are left out.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    flat = flatten(expected)
    rows = _paths(table, flat)
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
    if missing or wrong or unexpected:
        raise WeightsError("These tensors do not fit:" + _listing(missing + wrong + unexpected))
    read = {}
    for path, row in rows.items():
        to_ours = LAYOUTS[row.layout][0]
        if STACK in row.torch:
            keys = [row.torch.replace(STACK, str(number)) for number in range(flat[path].shape[0])]
            value = np.stack([to_ours(np.asarray(tensors[key])) for key in keys])
        else:
            value = to_ours(np.asarray(tensors[row.torch]))
        read[path] = np.ascontiguousarray(value, dtype=flat[path].dtype)
    return unflatten(read)


def to_torch_tensors(table: Table, params: Mapping[str, Any]) -> Tensors:
    """Parameters to tensors in the PyTorch layout; `ours_only` parameters are left out.

    Raises:
      WeightsError: where a parameter is named by no row or gap.
    """
    flat = flatten(params)
    tensors: Tensors = {}
    for path, row in _paths(table, flat).items():
        pieces = _torch_pieces(row, np.asarray(flat[path]))
        tensors.update({key: np.ascontiguousarray(value) for key, value in pieces})
    return tensors
