"""Counts what a compiled function of ours has to do, for the roofline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from experiments.benchmarks.row import Side, Stage
from pixelstory_jax.models.attention import attention_backend
from pixelstory_jax.models.layers import without_rematerialisation
from pixelstory_jax.models.llama import Llama, LlamaConfig, empty_cache
from pixelstory_jax.objectives.flops import flops_by_kind


def our_side(function: Callable[..., Any], *arguments: Any, outputs: Callable[[Any], Any] = lambda x: x) -> Side:
    """A side that calls the compiled `function` and hands on `outputs` of its result."""
    compiled = jax.jit(function)
    return Side(
        run=lambda: outputs(jax.block_until_ready(compiled(*arguments))),
        stages=lambda: [stage_of(function, *arguments)],
    )


def stage_of(function: Callable[..., Any], *arguments: Any, times: int = 1, unread: float = 0.0) -> Stage:
    """The work of a call. `unread`: bytes of the arguments that it does not read, as most rows of an embedding."""
    with attention_backend("xla"), without_rematerialisation():  # what has to be done, however it is
        closed = jax.make_jaxpr(function)(*arguments)
    flops: dict[str, float] = defaultdict(float)
    for label, count in flops_by_kind(closed).items():
        flops[kind_of(label)] += count
    moved = sum(_bytes(variable.aval) for variable in (*closed.jaxpr.invars, *closed.jaxpr.outvars))
    return Stage(dict(flops), moved - unread, times)


def kind_of(label: str) -> str:
    """One of `machine.KINDS`, of a label of `flops_by_kind`."""
    if label.endswith("bfloat16"):
        return "bfloat16"
    return "convolution" if label.startswith("conv") else "float32"


def _bytes(aval: Any) -> float:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)


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
