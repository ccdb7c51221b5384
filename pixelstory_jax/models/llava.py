"""LLaVA (arXiv 2304.08485, 2310.03744): a CLIP tower, a projector and a LLaMA. PixelLM starts from its weights.

B sequences, T tokens with image placeholders expanded, P patches (one token each), D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig
from pixelstory_jax.models.layers import Linear, gelu
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.pixellm import IMAGE_TOKEN
from pixelstory_jax.models.sizes import check_choice

PROJECTORS = ("linear", "mlp2x_gelu")


@dataclass(frozen=True)
class LlavaConfig:
    """Sizes.

    Attributes:
      feature_layer: state of the tower that the language model sees; its class token is dropped.
      projector: "linear" (LLaVA 1) or "mlp2x_gelu" (LLaVA 1.5).
      image_token: id that stands for a patch in files of transformers; ours is `IMAGE_TOKEN`, which no vocabulary has.
    """

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig.clip_large_336)
    llama: LlamaConfig = field(default_factory=LlamaConfig.llama_7b)
    feature_layer: int = 23
    projector: str = "mlp2x_gelu"
    image_token: int = 32000

    def __post_init__(self) -> None:
        check_choice(self, "projector", PROJECTORS)
        if not 0 <= self.feature_layer <= self.vision.layers:
            raise ValueError(f"feature_layer is {self.feature_layer}; the tower has 0..{self.vision.layers}.")


class Projector(nn.Module):
    """From the width of the tower to that of the language model."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, dtype = self.config.llama.width, self.config.llama.dtype
        x = Linear(width, dtype=dtype, name="first")(x)
        if self.config.projector == "linear":
            return x
        return Linear(width, dtype=dtype, name="second")(gelu(x))


class Llava(nn.Module):
    config: LlavaConfig

    def setup(self) -> None:
        self.vision = ClipVision(self.config.vision)
        self.llama = Llama(self.config.llama)
        self.mm_projector = Projector(self.config)

    def image_tokens(self, pixels: jax.Array) -> jax.Array:
        """[B, P, D] of normalised pixels [B, C, C, 3]."""
        return self.mm_projector(self.vision(pixels, None, (self.config.feature_layer,))[0, :, 1:])

    def __call__(self, tokens: jax.Array, token_valid: jax.Array, pixels: jax.Array) -> jax.Array:
        """Logits [B, T, V] of tokens [B, T] with P placeholders (`IMAGE_TOKEN`) in each row."""
        image = self.image_tokens(pixels)
        is_image = tokens == IMAGE_TOKEN
        place = jnp.clip(jnp.cumsum(is_image, axis=-1) - 1, 0, image.shape[1] - 1)  # [B, T]
        text = self.llama.embed(jnp.where(is_image, 0, tokens))
        seen = jnp.take_along_axis(image, place[:, :, None], axis=1).astype(text.dtype)
        hidden, _ = self.llama(jnp.where(is_image[..., None], seen, text), token_valid)
        return self.llama.logits(hidden)

    @staticmethod
    def shapes(config: LlavaConfig) -> dict[str, Any]:
        """The parameters as `jax.ShapeDtypeStruct`s; computes nothing."""
        side = config.vision.canvas
        tokens, pixels = jnp.zeros((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

        def init(pixels: Any) -> Any:
            return Llava(config).init(jax.random.key(0), tokens, tokens == 0, pixels)

        return jax.eval_shape(init, pixels)["params"]
