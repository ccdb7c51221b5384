"""Which tensor was not finite: flags that each step computes on its way, and that are looked at only in need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Tensors = Mapping[str, jax.Array]


def finite_flags(tensors: Tensors) -> jax.Array:
    """bool [N]: for each of N tensors, in the order of their names, whether all of its numbers are finite."""
    return jnp.stack([jnp.isfinite(tensors[name]).all() for name in sorted(tensors)])


def step_flags(gradients: Tensors, updated: Tensors) -> jax.Array:
    """bool [2, N]: `finite_flags` of the gradients of N parameters, and of the parameters after the update.

    Both are in the making where this reads them, so that the compiler joins it to what makes them.
    """
    return jnp.stack([finite_flags(gradients), finite_flags(updated)])


def explain(scalars: Mapping[str, float], flags: np.ndarray, batch: Tensors, trained: Tensors, frozen: Tensors) -> str:
    """What of a step was not finite, its first cause as the subject.

    Args:
      scalars: of the step. flags: its `step_flags`. batch: what it was given.
      trained, frozen: parameters by slash path; numbers are read of the frozen ones only, which no step changes.
    """
    values = [f"{name} {value}" for name, value in scalars.items() if not math.isfinite(value)]
    names = sorted(trained)
    gradients, updated = ([name for name, finite in zip(names, row, strict=True) if not finite] for row in flags)
    causes = [
        _listed("the batch field", not_finite_tensors(batch)),
        _listed("the frozen parameter", not_finite_tensors(frozen)),
        "" if math.isfinite(scalars["loss"]) else "the loss",
        _listed("the gradient of", gradients),
        _listed("the updated parameter", updated) if not gradients else "",
        *(value.split()[0] for value in values),
    ]
    first, *others = [cause for cause in causes if cause]
    shown = [*values, *(cause for cause in others if cause.startswith("the ") and cause != "the loss")]
    return f"{first} is not finite" + (f" ({', '.join(shown)})" if shown else "")


def not_finite_tensors(tensors: Tensors) -> list[str]:
    """The names of those that hold a number that is not finite. All processes call this together, under their mesh."""
    if not tensors:
        return []
    flags = np.asarray(jax.jit(finite_flags, out_shardings=PartitionSpec())(dict(tensors)))
    return [name for name, finite in zip(sorted(tensors), flags, strict=True) if not finite]


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{kind} {names[0]}{more}" if names else ""
