"""Device mesh, and which array lies where on it.

Three mesh axes: `data` (replicated parameters), `fsdp` (parameters sharded, gathered when used) and `tensor`
(parameters and activations sharded within a layer). A batch is sharded over (data, fsdp). All axes are of type Auto:
the compiler propagates shardings from those of the state and the batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pixelstory_jax.training.errors import ConfigError, TrainingStopped

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
Rules = Sequence[tuple[str, PartitionSpec]]


def build_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor; at most one size is -1 and takes the devices that are left."""
    devices = list(jax.devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    fixed = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise ConfigError(f"train.mesh ({wanted}): sizes are positive, and at most one is -1")
    if -1 in shape and len(devices) % fixed == 0:
        shape[shape.index(-1)] = len(devices) // fixed
    if int(np.prod(shape)) != len(devices):
        raise ConfigError(f"train.mesh ({wanted}) does not fit {len(devices)} device(s)")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition(path: str, shape: Sequence[int], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """The partition of one parameter: the first rule whose expression is found in `path`, else replicated.

    A dimension that the mesh axes do not divide stays whole, so that one table serves tiny and published sizes.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            if len(spec) > len(shape):
                raise ConfigError(f"The sharding rule {pattern!r} has {len(spec)} dimensions, {path} has {len(shape)}")
            return PartitionSpec(*(_fit(axes, size, mesh) for axes, size in zip(spec, shape, strict=False)))
    return PartitionSpec()


def _fit(axes: Any, size: int, mesh: Mesh) -> Any:
    if axes is None:
        return None
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    ways = int(np.prod([mesh.shape[name] for name in names]))
    return axes if size % ways == 0 else None


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ConfigError(f"train.batch_size ({batch_size}) must be a multiple of data x fsdp of the mesh ({ways})")
    return NamedSharding(mesh, BATCH)


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(index, count): this process loads the index-th of count equal, contiguous parts of each global batch.

    Processes that differ only along `tensor` load the same rows.
    """
    indices = batch_sharding(mesh, batch_size).addressable_devices_indices_map((batch_size,))
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices.values() if index is not None})
    start, stop = spans[0][0], spans[-1][1]
    rows = stop - start
    if sum(end - begin for begin, end in spans) != rows or start % rows or batch_size % rows:
        raise ConfigError("The mesh gives this process rows of the batch that are not contiguous; reorder train.mesh")
    return start // rows, batch_size // rows


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays, sharded over (data, fsdp), from the rows of this process."""
    sharding = batch_sharding(mesh, batch_size)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def check_batch(batch: Mapping[str, np.ndarray], spec: Mapping[str, jax.ShapeDtypeStruct], parts: int) -> None:
    """Raises one sentence that lists every field of `batch` that is missing or differs from `spec` / `parts`."""
    wrong = [f"{name} is missing" for name in spec if name not in batch]
    wrong += [f"{name} is not expected" for name in batch if name not in spec]
    for name in spec.keys() & batch.keys():
        array, wanted = batch[name], spec[name]
        shape = (wanted.shape[0] // parts, *wanted.shape[1:])
        if array.shape != shape or array.dtype != wanted.dtype:
            wrong.append(f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(wanted.dtype)}{list(shape)}")
    if wrong:
        raise TrainingStopped(f"The data do not fit the objective: {'; '.join(sorted(wrong))}")
