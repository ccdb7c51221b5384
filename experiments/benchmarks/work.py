"""Counts what a compiled function of ours has to do, for the roofline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
from jax.extend import core

from experiments.benchmarks.row import Side, Stage
from pixelstory_jax.models.llama import Llama, LlamaConfig, empty_cache


def our_side(function: Callable[..., Any], *arguments: Any, outputs: Callable[[Any], Any] = lambda x: x) -> Side:
    """A side that calls the compiled `function` and hands on `outputs` of its result."""
    compiled = jax.jit(function)
    return Side(
        run=lambda: outputs(jax.block_until_ready(compiled(*arguments))),
        stages=lambda: [stage_of(function, *arguments)],
    )


def stage_of(function: Callable[..., Any], *arguments: Any, times: int = 1, unread: float = 0.0) -> Stage:
    """The work of a call. `unread`: bytes of the arguments that it does not read, as most rows of an embedding."""
    closed = jax.make_jaxpr(function)(*arguments)
    flops: dict[str, float] = defaultdict(float)
    for kind, count in _operations(closed.jaxpr):
        flops[kind] += count
    edges = [*closed.jaxpr.invars, *closed.jaxpr.outvars]
    moved = sum(_bytes(variable.aval) for variable in edges)
    return Stage(dict(flops), moved - unread, times)


def _bytes(aval: Any) -> float:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)


def _operations(jaxpr: Any, times: float = 1.0) -> Iterator[tuple[str, float]]:
    """(kind, operations) of every product and convolution; the body of a scan counts once per step."""
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        if kind == "dot_general":
            yield _product(equation, times)
        elif kind == "conv_general_dilated":
            yield _convolution(equation, times)
        steps = equation.params["length"] if kind == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            yield from _operations(inner, times * steps)


def _product(equation: Any, times: float) -> tuple[str, float]:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    kind = "bfloat16" if left.dtype == jax.numpy.bfloat16 else "float32"
    return kind, 2.0 * times * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[a] for a in contracted)


def _convolution(equation: Any, times: float) -> tuple[str, float]:
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval.shape
    channels = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    kind = "bfloat16" if kernel.dtype == jax.numpy.bfloat16 else "convolution"
    return kind, 2.0 * times * math.prod(out) * math.prod(kernel.shape) / channels


def generation_stages(config: LlamaConfig, params: Any, batch: int, prompt: int, new: int) -> list[Stage]:
    """Prefill, and a step for each new token but the first, with the cache that the last step has."""

    def forward(params: Any, embeddings: Any, cache: Any) -> Any:
        model, variables = Llama(config), {"params": params}
        valid = jax.numpy.ones((batch, prompt + new), bool)
        hidden: Any = model.apply(variables, embeddings, valid, None, cache, 0)
        return model.apply(variables, hidden[0][:, -1], method=Llama.logits)

    cache, unread = empty_cache(config, batch, prompt + new), params["embedding"].nbytes
    widths = (jax.ShapeDtypeStruct((batch, tokens, config.width), config.dtype) for tokens in (prompt, 1))
    prefill, step = (stage_of(forward, params, width, cache, unread=unread) for width in widths)
    return [prefill, replace(step, times=new - 1)]
