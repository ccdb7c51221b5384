"""Continuation of plain text by a bare language model: prefill and cached decoding in one compiled function.

B texts, T tokens of the longest one, M new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference.generate import PAD_ID, check_limits, choose
from pixelstory_jax.models.llama import Cache, Llama, LlamaConfig, empty_cache


class Continuation(NamedTuple):
    """`tokens` int [B, M], PAD_ID after the end; `length` [B], the stop token counted."""

    tokens: jax.Array
    length: jax.Array


def continue_tokens(
    config: LlamaConfig,
    params: Any,
    tokens: jax.Array | np.ndarray,
    token_valid: jax.Array | np.ndarray,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: jax.Array | None = None,
) -> Continuation:
    """Continue texts of different lengths.

    Args:
      config, params: the language model and the tree of its parameters.
      tokens: int [B, T], padded on the right. token_valid: bool [B, T], False in that padding; a text without any token
        is not continued.
      max_new_tokens: M. stop_ids: ids that end a text.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature), of which
        the likeliest that together reach `top_p` are kept. `rng` is needed then.

    Raises:
      ValueError: padding elsewhere, a temperature without a key, or limits that make no sense.
    """
    check_limits(max_new_tokens, temperature, top_p)
    if temperature > 0 and rng is None:
        raise ValueError("A temperature above 0 needs a random key.")
    valid = np.asarray(token_valid, bool)
    if np.any(valid[:, 1:] > valid[:, :-1]):
        raise ValueError("Texts must be padded on the right alone: token_valid has a True after a False.")
    return _continue(
        config,
        params,
        jnp.asarray(tokens),
        jnp.asarray(valid),
        jax.random.key(0) if rng is None else rng,
        jnp.float32(temperature),
        jnp.float32(top_p),
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(int(stop) for stop in stop_ids),
        sampled=temperature > 0,
    )


class _Loop(NamedTuple):
    """Where the decoding stands: `chosen` tokens of each text are there."""

    chosen: jax.Array
    tokens: jax.Array
    length: jax.Array
    running: jax.Array
    cache: Cache


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "stop_ids", "sampled"))
def _continue(
    config: LlamaConfig,
    params: Any,
    tokens: jax.Array,
    token_valid: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampled: bool,
) -> Continuation:
    batch, prompt = tokens.shape
    lengths = token_valid.sum(-1)
    # New tokens take the slots after the longest text; what lies between a short text and them is no valid key.
    key_valid = jnp.pad(token_valid, ((0, 0), (0, max_new_tokens)), constant_values=True)

    def call(method: Any, *arguments: Any) -> Any:
        return Llama(config).apply({"params": params}, *arguments, method=method)

    def states(tokens: jax.Array, positions: jax.Array, cache: Cache, slot: Any) -> tuple[jax.Array, Cache]:
        return call(Llama.__call__, call(Llama.embed, tokens), key_valid, positions, cache, slot)

    def extend(loop: _Loop, state: jax.Array) -> _Loop:
        """Choose the next token of each text from its last state [B, D]."""
        step_rng = jax.random.fold_in(rng, loop.chosen)
        token = choose(call(Llama.logits, state), step_rng, temperature, top_p, sampled)
        token = jnp.where(loop.running, token, PAD_ID)
        stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
        tokens = loop.tokens.at[:, loop.chosen].set(token)
        return _Loop(loop.chosen + 1, tokens, loop.length + loop.running, loop.running & ~stopped, loop.cache)

    def step(loop: _Loop) -> _Loop:
        newest = loop.tokens[:, loop.chosen - 1, None]
        position, slot = (lengths + loop.chosen - 1)[:, None], prompt + loop.chosen - 1
        state, cache = states(newest, position, loop.cache, slot)
        return extend(loop._replace(cache=cache), state[:, 0])

    cache = empty_cache(config, batch, prompt + max_new_tokens)
    prompt_states, cache = states(tokens, jnp.arange(prompt)[None], cache, 0)
    last = jnp.take_along_axis(prompt_states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    new = jnp.full((batch, max_new_tokens), PAD_ID, jnp.int32)
    loop = extend(_Loop(jnp.int32(0), new, jnp.zeros(batch, jnp.int32), lengths > 0, cache), last)
    loop = jax.lax.while_loop(lambda loop: (loop.chosen < max_new_tokens) & loop.running.any(), step, loop)
    return Continuation(loop.tokens, loop.length)
