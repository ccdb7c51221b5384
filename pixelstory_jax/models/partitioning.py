"""Where activations lie on the mesh: the one helper through which models tell the compiler.

Parameters have shardings of their own (the tables beside the objectives). Left to itself the compiler may follow them
and cut activations along their width, which costs a sum over all devices after every product; `constrain` keeps the
batch where the batch was.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType, PartitionSpec

AXES = {"batch": ("data", "fsdp"), "tensor": ("tensor",)}  # name of a dimension -> mesh axes that it may lie over


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, its dimensions sharded over the mesh of `jax.sharding.set_mesh`; as it is where there is no such mesh.

    Args:
      x: any array.
      names: per dimension "batch" (examples, or anything that is ordered by example), "tensor" (heads, hidden units,
        vocabulary) or None for whole; dimensions beyond the names are whole. A dimension that the mesh does not divide
        is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]

    def placed(size: int, name: str | None) -> object:
        axes = tuple(axis for axis in AXES.get(name or "", ()) if axis in automatic)
        ways = 1
        for axis in axes:
            ways *= mesh.shape[axis]
        return (axes or None) if size % ways == 0 else PartitionSpec.UNCONSTRAINED

    if not automatic or mesh.size == 1:
        return x
    spec = [placed(size, name) for size, name in zip(x.shape, names, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
