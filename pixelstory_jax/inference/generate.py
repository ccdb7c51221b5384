"""Answers of PixelLM: prefill and cached decoding in one compiled function, and the codebook tokens in what comes out.

B images, Q questions per image, R = B * Q rows, T tokens of a prompt (image placeholders expanded, right-padded),
M new tokens, D width of the language model, G codebook tokens of a target, S target slots of an image, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.models.llama import Cache, empty_cache
from pixelstory_jax.models.pixellm import ImageFeatures, PixelLM

PAD_ID = 0
SLOT_STEP = 4  # target slots are counted in this step, so that few shapes are compiled


class Generated(NamedTuple):
    """An answer per row.

    `tokens` [R, M], PAD_ID after the end; `length` [R], the stop token counted; `states` [R, M, D], the hidden state
    from which each token was chosen.
    """

    tokens: jax.Array
    length: jax.Array
    states: jax.Array


def generate(
    model: PixelLM,
    params: Any,
    features: ImageFeatures,
    tokens: jax.Array | np.ndarray,
    token_valid: jax.Array | np.ndarray,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: jax.Array | None = None,
) -> Generated:
    """Continue prompts of different lengths.

    Args:
      model, params: the network and its parameters.
      features: of the B images, from `PixelLM.encode_image`.
      tokens: int [B, Q, T] prompts, padded on the right. token_valid: bool [B, Q, T], False in that padding.
      max_new_tokens: M. stop_ids: ids that end an answer.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature), of which
        the likeliest that together reach `top_p` are kept. `rng` is needed then.

    Raises:
      ValueError: a temperature without a key, or limits that make no sense.
    """
    check_limits(max_new_tokens, temperature, top_p)
    if temperature > 0 and rng is None:
        raise ValueError("A temperature above 0 needs a random key.")
    return _generate(
        model,
        params,
        features,
        jnp.asarray(tokens),
        jnp.asarray(token_valid),
        jax.random.key(0) if rng is None else rng,
        jnp.float32(temperature),
        jnp.float32(top_p),
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(int(stop) for stop in stop_ids),
        sampled=temperature > 0,
    )


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
    tokens: jax.Array
    states: jax.Array
    length: jax.Array
    running: jax.Array
    cache: Cache


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "stop_ids", "sampled"))
def _generate(
    model: PixelLM,
    params: Any,
    features: ImageFeatures,
    tokens: jax.Array,
    token_valid: jax.Array,
    rng: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    sampled: bool,
) -> Generated:
    def call(method: Any, *arguments: Any) -> Any:
        return model.apply({"params": params}, *arguments, method=method)

    rows, prompt = tokens.shape[0] * tokens.shape[1], tokens.shape[2]
    embeddings, key_valid = call(PixelLM.embed, tokens, token_valid, features)
    embeddings, key_valid = embeddings.reshape(rows, prompt, -1), key_valid.reshape(rows, prompt)
    # New tokens take the slots after the longest prompt; what lies between a short prompt and them is no valid key.
    key_valid = jnp.pad(key_valid, ((0, 0), (0, max_new_tokens)), constant_values=True)
    lengths = token_valid.reshape(rows, prompt).sum(-1)
    cache = empty_cache(model.config.llama, rows, prompt + max_new_tokens)
    positions = jnp.broadcast_to(jnp.arange(prompt), (rows, prompt))
    prompt_states, cache = call(PixelLM.step, embeddings, key_valid, positions, cache, jnp.int32(0))

    def extend(loop: _Loop, state: jax.Array) -> _Loop:
        """Choose the next token of each row from its state [R, D]."""
        step_rng = jax.random.fold_in(rng, loop.chosen)
        token = choose(call(PixelLM.logits, state), step_rng, temperature, top_p, sampled)
        token = jnp.where(loop.running, token, PAD_ID)
        stopped = jnp.isin(token, jnp.array(stop_ids, jnp.int32))
        return _Loop(
            loop.chosen + 1,
            loop.tokens.at[:, loop.chosen].set(token),
            loop.states.at[:, loop.chosen].set(jnp.where(loop.running[:, None], state, 0)),
            loop.length + loop.running,
            loop.running & ~stopped,
            loop.cache,
        )

    def step(loop: _Loop) -> _Loop:
        newest = loop.tokens[:, loop.chosen - 1, None]
        position = (lengths + loop.chosen - 1)[:, None]
        slot = prompt + loop.chosen - 1
        state, cache = call(PixelLM.step, call(PixelLM.embed_text, newest), key_valid, position, loop.cache, slot)
        return extend(loop._replace(cache=cache), state[:, 0])

    loop = _Loop(
        jnp.int32(0),
        jnp.full((rows, max_new_tokens), PAD_ID, jnp.int32),
        jnp.zeros((rows, max_new_tokens, prompt_states.shape[-1]), prompt_states.dtype),
        jnp.zeros(rows, jnp.int32),
        lengths > 0,
        cache,
    )
    last = jnp.take_along_axis(prompt_states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    loop = extend(loop, last)
    loop = jax.lax.while_loop(lambda loop: (loop.chosen < max_new_tokens) & loop.running.any(), step, loop)
    return Generated(loop.tokens, loop.length, loop.states)


class TargetSlots(NamedTuple):
    """Targets of images in slots: `states` [B, S, G, D], `question` int [B, S], `valid` bool [B, S]."""

    states: np.ndarray
    question: np.ndarray
    valid: np.ndarray


def fill_slots(states: np.ndarray, groups: Sequence[np.ndarray], images: int, slots: int | None = None) -> TargetSlots:
    """The states of every target, in reading order per image, for `PixelLM.decode_masks`.

    Args:
      states: [R, M, D] the states from which tokens were chosen; rows of an image follow one another.
      groups: per row the positions [K, G] of its targets' tokens.
      images: B. slots: S; default the largest number of targets of an image, rounded up to a multiple of SLOT_STEP.

    Raises:
      ValueError: more targets than slots.
    """
    states = np.asarray(states)
    questions = len(groups) // images
    counts = [sum(len(g) for g in groups[b * questions : (b + 1) * questions]) for b in range(images)]
    needed = max(counts, default=0)
    if slots is None:
        slots = max(-(-needed // SLOT_STEP) * SLOT_STEP, SLOT_STEP)
    if needed > slots:
        raise ValueError(f"An image has {needed} targets, but there are {slots} slots.")
    size = groups[0].shape[1] if groups else 0
    filled = np.zeros((images, slots, size, states.shape[-1]), states.dtype)
    question = np.zeros((images, slots), np.int32)
    valid = np.zeros((images, slots), bool)
    for image in range(images):
        slot = 0
        for number in range(questions):
            row = image * questions + number
            for positions in groups[row]:
                filled[image, slot], question[image, slot], valid[image, slot] = states[row, positions], number, True
                slot += 1
    return TargetSlots(filled, question, valid)
