"""Answers of PixelLM: prefill and cached decoding in one compiled function, and the codebook tokens in what comes out.

B images, Q questions per image, R = B * Q rows, T tokens of a prompt (image placeholders expanded, right-padded),
M new tokens, D width of the language model, G codebook tokens of a target, S target slots of an image, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.inference.decoding import Decoded, check_limits, decode
from pixelstory_jax.models.pixellm import ImageFeatures, PixelLM

SLOT_STEP = 4  # target slots are counted in this step, so that few shapes are compiled


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
) -> Decoded:
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
    **limits: Any,
) -> Decoded:
    embedded: Any = model.apply({"params": params}, tokens, token_valid, features, method=PixelLM.embed)
    embeddings, key_valid, valid = (rearrange(x, "b q t ... -> (b q) t ...") for x in (*embedded, token_valid))
    config, language = model.config.llama, params["llama"]
    return decode(config, language, embeddings, key_valid, valid.sum(-1), rng, temperature, top_p, **limits)


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
