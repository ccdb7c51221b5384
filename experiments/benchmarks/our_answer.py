"""Our way to answer a question about a picture, with the steps and the paddings of `inference.segmenter`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.random_weights import Draw, our_params
from experiments.benchmarks.row import Side, Stage
from experiments.benchmarks.work import generation_stages, stage_of
from pixelstory_jax.inference.generate import fill_slots, generate
from pixelstory_jax.inference.segmenter import BUCKET
from pixelstory_jax.interop.pixellm_folder import pixellm_shapes
from pixelstory_jax.interop.tables import pixellm
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig, normalise_pixels


def our_pixellm(config: PixelLMConfig, draw: Draw) -> Any:
    """Parameters; the fusion weights, which no PyTorch layout has, are the constants that they start from."""
    params = our_params(pixellm(config.scales, config.decoder.depth, tower=True), pixellm_shapes(config), draw=draw)
    token_weights = jnp.full((config.scales, config.codebook_tokens), 1 / config.group)
    return {**params, "token_weights": token_weights, "scale_weights": jnp.full(config.scales, 1 / config.scales)}


def our_answer(
    config: PixelLMConfig, draw: Draw, canvas: np.ndarray, tokens: np.ndarray, groups: np.ndarray, new: int
) -> Side:
    """Ids [1, M] and mask logits [K, m, m].

    Args:
      canvas: uint8 [1, C, C, 3]. tokens: int [1, T], image placeholders expanded.
      groups: [K, G] where the answer has the targets' tokens.
    """
    model, params = PixelLM(config), our_pixellm(config, draw)
    length = -(-tokens.shape[1] // BUCKET) * BUCKET
    prompt = np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
    valid = np.arange(length)[None] < tokens.shape[1]
    sizes = jnp.full((1, 2), config.vision.canvas)

    def encode(params: Any, canvas: Any) -> Any:
        pixels = normalise_pixels(canvas, sizes)
        return model.apply({"params": params}, pixels, sizes, method=PixelLM.encode_image)

    def decode(params: Any, features: Any, states: Any) -> Any:
        masks: Any = model.apply({"params": params}, features, states, method=PixelLM.decode_masks)
        return masks.logits

    encode_once, decode_once = jax.jit(encode), jax.jit(decode)

    def answer() -> Any:
        features = encode_once(params, canvas)
        generated = generate(model, params, features, prompt[:, None], valid[:, None], max_new_tokens=new, stop_ids=())
        slots = fill_slots(np.asarray(generated.states), [groups], images=1)
        masks = decode_once(params, features, slots.states)
        return np.asarray(generated.tokens), np.asarray(masks)[0, : len(groups)]

    def stages() -> list[Stage]:
        features = jax.eval_shape(encode, params, canvas)
        states = jnp.zeros((1, 4, config.group, config.llama.width))
        vision = {name: params[name] for name in ("vision", "mm_projector", "out_mm_projector", "neck")}
        decoder = {name: value for name, value in params.items() if name not in (*vision, "llama")}
        return [
            stage_of(encode, params, canvas, unread=_size(params) - _size(vision)),
            *generation_stages(config.llama, params["llama"], 1, length, new),
            stage_of(decode, params, features, states, unread=_size(params) - _size(decoder)),
        ]

    return Side(answer, stages)


def _size(tree: Any) -> float:
    return float(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
