"""Where activations lie on the mesh: the one helper through which models tell the compiler.

Parameters have shardings of their own (the tables beside the objectives). Left to itself the compiler may follow them
and cut activations along their width, which costs a sum over all devices after every product; `constrain` keeps the
batch where the batch was.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

AXES = {"batch": ("data", "fsdp"), "tensor": ("tensor",)}  # name of a dimension -> mesh axes that it may lie over
Place = str | tuple[str, ...] | None


def target_device() -> str:
    """What the computation being traced is for: "cpu", "tpu" or "gpu".

    The device of the mesh, which may be one that is only compiled for; without a mesh, this process's default device.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return next((name for name in ("cpu", "tpu") if name in kind), "gpu")


def automatic_axes() -> dict[str, int]:
    """Name -> size of the mesh axes over which the compiler partitions: none within `shard_map` or without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {} if mesh.size == 1 else {axis: mesh.shape[axis] for axis, kind in kinds if kind == AxisType.Auto}


def split(sizes: Sequence[int], name: str = "batch") -> list[tuple[str, ...]]:
    """The mesh axes for adjacent dimensions that together are a "batch" (or "tensor"), as far as these divide them.

    With data=2 and fsdp=8, sizes (2, 64), two groups of 64 panels, give [("data",), ("fsdp",)]; sizes (16, 4), sixteen
    stories of four panels, give [("data", "fsdp"), ()]. Placed so, they flatten into one batch without moving.
    """
    automatic = automatic_axes()
    left = [axis for axis in AXES[name] if automatic.get(axis, 1) > 1]
    result: list[tuple[str, ...]] = []
    for size in sizes:
        taken: list[str] = []
        while left and size % automatic[left[0]] == 0:
            taken.append(left.pop(0))
            size //= automatic[taken[-1]]
        result.append(tuple(taken))
    return result


def constrain(x: jax.Array, *names: Place) -> jax.Array:
    """`x`, its dimensions sharded over the mesh of `jax.sharding.set_mesh`; as it is where there is no such mesh.

    Args:
      x: any array.
      names: per dimension "batch" (examples, or anything that is ordered by example), "tensor" (heads, hidden units,
        vocabulary), mesh axes as `split` gives them, or None for whole; dimensions beyond the names are whole. A
        dimension that the mesh does not divide is left to the compiler.
    """
    automatic = automatic_axes()

    def placed(size: int, name: Place) -> object:
        axes = tuple(axis for axis in (AXES[name] if isinstance(name, str) else name or ()) if axis in automatic)
        ways = 1
        for axis in axes:
            ways *= automatic[axis]
        return (axes or None) if size % ways == 0 else PartitionSpec.UNCONSTRAINED

    if not automatic:
        return x
    spec = [placed(size, name) for size, name in zip(x.shape, names, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
