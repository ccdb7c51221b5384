"""Floating-point operations of a traced computation, and those that a training example needs.

Counted are matrix products and convolutions, exactly: a multiplication and an addition are two. Element-wise work is
left out, as is usual. Attention counts all pairs of a query and a key, masked or not: its plain form computes them all.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from pixelstory_jax.models.attention import OTHER_ATTENTION, attention_backend
from pixelstory_jax.models.layers import without_rematerialisation
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives.objective import Batch, Objective

GRADIENTS = "loss_and_gradients"  # the scope of names around them in the training step
FlatParams = dict[str, Any]  # slash path -> array


def count_flops(jaxpr: Any) -> float:
    """Operations of a Jaxpr or ClosedJaxpr (as `jax.make_jaxpr` gives it), on all devices together.

    The body of a scan counts as often as it runs, that of a while loop once (how often it runs is not in the program),
    and of the branches of a condition the most expensive one. What is within `shard_map` counts once for each shard.

    Raises:
      ValueError: the computation holds a Pallas kernel, whose work no rule tells.
    """
    return sum(flops_by_scope(jaxpr).values())


def flops_by_scope(jaxpr: Any) -> dict[str, float]:
    """`count_flops` by the scope of names that the operations were traced in, forward and backward pass added up.

    A scope reads like "PixelLM/llama/layers"; Flax opens one for each module.
    """
    return _flops_by(jaxpr, _scope)


def flops_by_kind(jaxpr: Any) -> dict[str, float]:
    """`count_flops` by operation and dtype of its inputs: "dot_general float32", "conv_general_dilated bfloat16"."""
    return _flops_by(jaxpr, _kind)


def _flops_by(jaxpr: Any, label: Callable[[Any], str]) -> dict[str, float]:
    """Operations by the labels of their equations, those of outer equations first."""
    total: dict[str, float] = collections.defaultdict(float)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        here = label(equation)
        for within, flops in _equation_flops(equation, label).items():
            total["/".join(filter(None, (here, within)))] += flops
    return dict(total)


def training_flops(objective: Objective) -> float:
    """Operations of one training example: loss and gradients of the trained parameters, and nothing else.

    What the model needs, however it is computed: attention in its plain form, nothing rematerialised. Frozen parts have
    no gradients of their own, and no gradient passes through what no trained parameter comes before.
    """
    batch_size = next(iter(objective.batch_spec.values())).shape[0]
    return count_flops(training_jaxpr(objective)) / batch_size


def training_jaxpr(objective: Objective) -> Any:
    """The computation that `training_flops` counts, for a whole batch of the objective."""
    params = flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    trained = {path: leaf for path, leaf in params.items() if objective.trainable(path)}
    frozen = {path: leaf for path, leaf in params.items() if path not in trained}

    def loss_and_gradients(trained: FlatParams, frozen: FlatParams, batch: Batch) -> Any:
        def loss(trained: FlatParams) -> jax.Array:
            return objective.loss(unflatten({**frozen, **trained}), batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(trained)

    with without_rematerialisation(), attention_backend("xla"):
        closed = jax.make_jaxpr(loss_and_gradients)(trained, frozen, dict(objective.batch_spec))
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, True)
    return used


def flops_of_step(step: Any, objective: Objective) -> float:
    """`training_flops` times the batch size, read off the traced training step where that is as plain.

    That spares tracing the model a second time, which takes a tiny one longer than all else before its first step.

    Args:
      step: the Jaxpr of the step; loss and gradients were traced in the scope `GRADIENTS`.
    """
    used, _ = partial_eval.dce_jaxpr(step.jaxpr, True)
    if _is_plain(used):
        scopes = flops_by_scope(used).items()
        return sum(flops for scope, flops in scopes if scope.split("/")[0] == GRADIENTS)
    batch_size = next(iter(objective.batch_spec.values())).shape[0]
    return training_flops(objective) * batch_size


def _is_plain(jaxpr: Any) -> bool:
    """Whether nothing in it is rematerialised and all attention has its plain form."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, scope = equation.primitive.name, str(equation.source_info.name_stack)
        if name in (core.primitives.remat_p.name, "pallas_call") or OTHER_ATTENTION in scope:
            return False
        if not all(map(_is_plain, core.jaxprs_in_params(equation.params))):
            return False
    return True


def _scope(equation: Any) -> str:
    """ "transpose(jvp(PixelLM))/llama" -> "PixelLM/llama"."""
    return re.sub(r"\w+\(|\)", "", str(equation.source_info.name_stack))


def _kind(equation: Any) -> str:
    name = equation.primitive.name
    return f"{name} {equation.invars[0].aval.dtype}" if name in ("dot_general", "conv_general_dilated") else ""


def _equation_flops(equation: Any, label: Callable[[Any], str]) -> dict[str, float]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return {"": _dot_flops(equation)}
    if name == "conv_general_dilated":
        return {"": _convolution_flops(equation)}
    if name == "pallas_call":
        raise ValueError("The operations of a Pallas kernel cannot be counted; trace with the attention backend xla.")
    if name == "cond":
        return max((_flops_by(branch, label) for branch in params["branches"]), key=lambda part: sum(part.values()))
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    total: dict[str, float] = collections.defaultdict(float)
    for inner in core.jaxprs_in_params(params):
        for scope, flops in _flops_by(inner, label).items():
            total[scope] += times * flops
    return dict(total)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(equation: Any) -> float:
    """Products with padding, and with the zeros between the elements of a dilated input, are none.

    Forward pass, gradient of the input and gradient of the kernel are then the same number.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    (left, right), out = (variable.aval.shape for variable in equation.invars), equation.outvars[0].aval.shape
    pairs = [
        _window_pairs(left[a], right[b], out[c], stride, *padding, spread, dilation)
        for a, b, c, stride, padding, spread, dilation in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    ]
    batch, channels = (out[axis] for axis in numbers.out_spec[:2])
    return 2.0 * batch * channels * right[numbers.rhs_spec[1]] * math.prod(pairs)


@functools.lru_cache
def _window_pairs(
    size: int, kernel: int, out: int, stride: int, low: int, high: int, spread: int, dilation: int
) -> int:
    """Along one axis, pairs of an output and a kernel element that meet a true element of the input."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - low
    return int(np.count_nonzero((place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)))
