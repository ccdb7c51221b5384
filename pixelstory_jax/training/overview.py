"""Parameter table and floating point operations per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def flops_summary(compiled: Any, batch_size: int, flops_per_example: float | None) -> str:
    """One line: the objective's own count if it gives one, else XLA's, which counts the body of a scan once."""
    if flops_per_example is not None:
        return f"{count(flops_per_example * batch_size)}FLOPs per step (counted by the objective)"
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis
    flops = float((analysis or {}).get("flops", 0.0)) * jax.device_count()
    if flops <= 0:
        return "FLOPs per step: this device's compiler gives no count"
    return f"{count(flops)}FLOPs per step (XLA's count; a scanned stack of layers is counted as one layer)"
