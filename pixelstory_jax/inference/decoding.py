"""The loop over new tokens: prefill and cached decoding, to be called within a compiled function.

R rows, T tokens of the longest prompt, M new tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pixelstory_jax.models.llama import Cache, Llama, LlamaConfig, empty_cache, for_decoding

PAD_ID = 0


class Decoded(NamedTuple):
    """What was written.

    `tokens` int [R, M], PAD_ID after the end; `length` [R], the stop token counted; `states` [R, M, D], the hidden
    state from which each token was chosen.
    """

    tokens: jax.Array
    length: jax.Array
    states: jax.Array


def check_limits(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises ValueError where one of them makes no sense."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed.")
    if not (0 <= temperature < math.inf and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must not be negative and top_p {top_p} must be in (0, 1].")


def choose(logits: jax.Array, rng: jax.Array, temperature: jax.Array, top_p: jax.Array, sampled: bool) -> jax.Array:
    """The next token [R] from logits [R, V]."""
    if not sampled:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    last = (before < top_p).sum(-1) - 1  # the first token is always kept
    threshold = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    return jax.random.categorical(rng, jnp.where(logits < threshold, -jnp.inf, logits)).astype(jnp.int32)


class _Loop(NamedTuple):
    """Where the decoding stands: `chosen` tokens of each row are there."""

    chosen: jax.Array
    decoded: Decoded
    running: jax.Array
    cache: Cache


def decode(
    config: LlamaConfig,
    params: Any,
    embeddings: jax.Array,
    key_valid: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampled: bool,
) -> Decoded:
    """Continue rows of different lengths until each has stopped.

    Args:
      config, params: of the language model.
      embeddings: [R, T, D] of the prompts, padded on the right. key_valid: bool [R, T], what may be attended to.
      lengths: int [R], tokens of each prompt; a row without any is not continued.
      rng, temperature, top_p: of the drawing, where `sampled`; otherwise the likeliest token is taken.
      max_new_tokens: M. stop_ids: ids that end a row.
    """
    rows, prompt = key_valid.shape
    # New tokens take the slots after the longest prompt; what lies between a short prompt and them is no valid key.
    key_valid = jnp.pad(key_valid, ((0, 0), (0, max_new_tokens)), constant_values=True)
    cache = empty_cache(config, rows, prompt + max_new_tokens)
    prompt_states, cache = Llama(config).apply({"params": params}, embeddings, key_valid, None, cache, 0)
    model, params, cache = for_decoding(config, params, cache)

    def call(method: Any, *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    def extend(loop: _Loop, state: jax.Array) -> _Loop:
        """Choose the next token of each row from its state [R, D]."""
        step_rng = jax.random.fold_in(rng, loop.chosen)
        token = choose(call(Llama.logits, state), step_rng, temperature, top_p, sampled)
        token = jnp.where(loop.running, token, PAD_ID)
        stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
        decoded = Decoded(
            loop.decoded.tokens.at[:, loop.chosen].set(token),
            loop.decoded.length + loop.running,
            loop.decoded.states.at[:, loop.chosen].set(jnp.where(loop.running[:, None], state, 0)),
        )
        return _Loop(loop.chosen + 1, decoded, loop.running & ~stopped, loop.cache)

    def step(loop: _Loop) -> _Loop:
        newest = call(Llama.embed, loop.decoded.tokens[:, loop.chosen - 1, None])
        position, slot = (lengths + loop.chosen - 1)[:, None], prompt + loop.chosen - 1
        state, cache = call(Llama.__call__, newest, key_valid, position, loop.cache, slot)
        return extend(loop._replace(cache=cache), state[:, 0])

    nothing = Decoded(
        jnp.full((rows, max_new_tokens), PAD_ID, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, max_new_tokens, config.width), prompt_states.dtype),
    )
    last = jnp.take_along_axis(prompt_states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    loop = extend(_Loop(jnp.int32(0), nothing, lengths > 0, cache), last)
    loop = jax.lax.while_loop(lambda loop: (loop.chosen < max_new_tokens) & loop.running.any(), step, loop)
    return loop.decoded
