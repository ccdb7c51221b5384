"""Parameter table and floating point operations per step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.state import TrainState


def count(number: float) -> str:
    """1234567 -> "1.23 M", to be followed by a unit."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def parameter_table(shapes: TrainState, shardings: TrainState, trainable: Callable[[str], bool]) -> tuple[str, str]:
    """(table, one-line summary) of all parameters: name, shape, type, count, trained or frozen, partition."""
    flat, where = flatten(shapes.params), flatten(shardings.params)
    rows = [("name", "shape", "type", "count", "", "partition")]
    totals = {"trained": 0, "frozen": 0}
    for path, leaf in flat.items():
        status = "trained" if trainable(path) else "frozen"
        number = int(np.prod(leaf.shape))
        totals[status] += number
        spec = "(" + ", ".join("-" if axis is None else str(axis) for axis in where[path].spec) + ")"
        rows.append((path, str(list(leaf.shape)), str(leaf.dtype), f"{number:,}", status, spec))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    moments = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.opt_state))
    summary = (
        f"{count(sum(totals.values()))} parameters in {len(flat)} arrays: {count(totals['trained'])} trained, "
        f"{count(totals['frozen'])} frozen; {count(moments)} numbers of optimizer state"
    )
    return "\n".join([*lines, "", summary]), summary


def flops_summary(flops: float, batch_size: int) -> str:
    """One line on the operations of a step."""
    return f"{count(flops)}FLOPs per step for loss and gradients, {count(flops / batch_size)}FLOPs per example"
