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

from pixelstory_jax.inference.decoding import check_limits, decode
from pixelstory_jax.models.llama import Llama, LlamaConfig


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


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "stop_ids", "sampled"))
def _continue(
    config: LlamaConfig,
    params: Any,
    tokens: jax.Array,
    token_valid: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    **limits: Any,
) -> Continuation:
    embeddings: Any = Llama(config).apply({"params": params}, tokens, method=Llama.embed)
    lengths = token_valid.sum(-1)
    decoded = decode(config, params, embeddings, token_valid, lengths, rng, temperature, top_p, **limits)
    return Continuation(decoded.tokens, decoded.length)
