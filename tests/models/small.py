"""A PixelLM that compiles in seconds, with parameters that are nowhere zero, and a batch for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PixelLM, PixelLMConfig

CODEBOOK = tuple(range(40, 46))
STOP = 2


def small_config(**changes: Any) -> PixelLMConfig:
    """4 x 4 patches, 4 image tokens, 2 scales of 2 codebook tokens, 50 words."""
    sizes: dict[str, Any] = {
        "vision": ClipVisionConfig(canvas=32, patch_size=8, width=16, layers=3, heads=2, mlp_width=32),
        "llama": LlamaConfig(vocab=50, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32),
        "decoder": PixelDecoderConfig(width=16, heads=2, mlp_width=32, iou_width=16),
        "feature_layers": (3, 1),
        "codebook_tokens": 2,
        "image_tokens_side": 2,
    }
    return PixelLMConfig(**{**sizes, **changes})


def small_batch(config: PixelLMConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Two pictures, the second not square, with two questions each; the last target slot is empty."""
    rng = np.random.default_rng(seed)
    canvas, length = config.vision.canvas, config.image_tokens + 12
    tokens = rng.integers(3, 40, (2, 2, length)).astype(np.int32)
    tokens[:, :, 2 : 2 + config.image_tokens] = IMAGE_TOKEN
    positions = np.zeros((2, 3, config.group), np.int32)
    for slot in range(2):  # one target per question
        positions[:, slot] = slot * length + config.image_tokens + 5 + np.arange(config.group)
        tokens[:, slot, positions[0, slot] - slot * length] = CODEBOOK[: config.group]
    valid = np.ones(tokens.shape, bool)
    valid[1, 1, -2:] = False
    return {
        "image": rng.integers(0, 256, (2, canvas, canvas, 3)).astype(np.uint8),
        "image_size": np.array([[canvas, canvas], [canvas // 2, canvas]], np.int32),
        "tokens": tokens,
        "token_valid": valid,
        "target_positions": positions,
    }


def random_like(tree: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """Parameters of the shapes of `tree`, all of them random, norm scales around 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    rng = np.random.default_rng(seed)
    filled = []
    for path, leaf in leaves:
        centre = 1.0 if str(path[-1]).find("scale") >= 0 else 0.0
        filled.append(jnp.asarray(centre + scale * rng.standard_normal(leaf.shape), jnp.float32))
    return jax.tree_util.tree_unflatten(structure, filled)


def small_model(**changes: Any) -> tuple[PixelLM, Any]:
    model = PixelLM(small_config(**changes))
    batch = small_batch(model.config)
    return model, random_like(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
