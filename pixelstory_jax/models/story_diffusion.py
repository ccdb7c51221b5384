"""StoryDiffusion as a whole: text encoders, U-Net and autoencoder with their sizes (arXiv 2405.01434).

B prompts or pictures, T text tokens, D text width, P pooled width, H x W pixels, h x w latents, L latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp

from pixelstory_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    posterior_sample,
    scale_latents,
    signed_pixels,
    unscale_latents,
)
from pixelstory_jax.models.clip_text import ClipText, ClipTextConfig
from pixelstory_jax.models.unet import UNet, UNetConfig

Params = dict[str, Any]


@dataclass(frozen=True)
class StoryDiffusionConfig:
    """Sizes of the parts.

    Attributes:
      text_2: second text encoder (SDXL): states of both are put side by side, its pooled state conditions the U-Net.
      text_layer: which states the U-Net sees, see `ClipText`: -1 in SD 1.5, -2 in SDXL.
    """

    unet: UNetConfig = field(default_factory=UNetConfig.sdxl)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig.sdxl)
    text: ClipTextConfig = field(default_factory=ClipTextConfig.clip_large)
    text_2: ClipTextConfig | None = None
    text_layer: int = -1

    def __post_init__(self) -> None:
        width = self.text.width + (self.text_2.width if self.text_2 else 0)
        if width != self.unet.context_width:
            raise ValueError(f"The text states are {width} wide, unet.context_width is {self.unet.context_width}.")
        pooled = self.text_2.projection if self.text_2 else 0
        if pooled != self.unet.pooled_width:
            raise ValueError(f"The pooled text is {pooled} wide, unet.pooled_width is {self.unet.pooled_width}.")
        if self.autoencoder.latent_channels != self.unet.in_channels:
            raise ValueError(
                f"autoencoder.latent_channels is {self.autoencoder.latent_channels}, unet.in_channels is "
                f"{self.unet.in_channels}."
            )

    @classmethod
    def sdxl(cls, **unet: Any) -> StoryDiffusionConfig:
        """stabilityai/stable-diffusion-xl-base-1.0; `unet` changes its U-Net (LoRA, dtype)."""
        return cls(
            UNetConfig.sdxl(**unet),
            AutoencoderConfig.sdxl(),
            ClipTextConfig.clip_large(),
            ClipTextConfig.open_clip_bigg(),
            text_layer=-2,
        )

    @classmethod
    def sd15(cls, **unet: Any) -> StoryDiffusionConfig:
        """Stable Diffusion 1.5."""
        return cls(UNetConfig.sd15(**unet), AutoencoderConfig.sd15(), ClipTextConfig.clip_large())

    @classmethod
    def tiny(cls, **unet: Any) -> StoryDiffusionConfig:
        """Panels of 96 x 96 pixels, for two CPU cores."""
        return cls(UNetConfig.tiny(**unet), AutoencoderConfig.tiny(), ClipTextConfig.tiny())

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of pictures of so many pixels.

        Raises:
          ValueError: sides that the autoencoder cannot halve often enough.
        """
        reduction = self.autoencoder.reduction
        if height % reduction or width % reduction:
            raise ValueError(f"Pictures of {height} x {width} pixels: sides must be multiples of {reduction}.")
        return height // reduction, width // reduction


class StoryDiffusion:
    """The networks as pure functions of one tree of parameters: unet, autoencoder, text and, in SDXL, text_2."""

    def __init__(self, config: StoryDiffusionConfig) -> None:
        self.config = config
        self.unet = UNet(config.unet)
        self.autoencoder = Autoencoder(config.autoencoder)
        self.encoders = {"text": ClipText(config.text)}
        if config.text_2:
            self.encoders["text_2"] = ClipText(config.text_2)

    def init(self, rng: jax.Array) -> Params:
        """Random parameters, float32."""
        config = self.config
        side = config.autoencoder.reduction * 2 ** (config.unet.levels - 1)
        images = jnp.zeros((1, side, side, 3))
        latents = jnp.zeros((1, *config.latent_size(side, side), config.unet.in_channels))
        context = jnp.zeros((1, 2, config.unet.context_width))
        added = None
        if config.unet.pooled_width:
            added = {"pooled": jnp.zeros((1, config.unet.pooled_width)), "time_ids": jnp.zeros((1, 6))}
        keys = jax.random.split(rng, 2 + len(self.encoders))
        params = {
            "unet": self.unet.init(keys[0], latents, jnp.float32(0), context, added),
            "autoencoder": self.autoencoder.init(keys[1], images, latents),
        }
        for key, (name, encoder) in zip(keys[2:], self.encoders.items(), strict=True):
            params[name] = encoder.init(key, jnp.zeros((1, encoder.config.length), jnp.int32))
        return {name: tree["params"] for name, tree in params.items()}

    def encode_text(self, params: Params, tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """Ids by encoder name, [B, T] each, to the context [B, T, D] and the pooled vector [B, P] (SDXL) or None."""
        features: dict[str, Any] = {
            name: encoder.apply({"params": params[name]}, tokens[name], layer=self.config.text_layer)
            for name, encoder in self.encoders.items()
        }
        context = jnp.concatenate([feature.states for feature in features.values()], axis=-1)
        return context, features["text_2"].pooled if "text_2" in features else None

    def encode_images(self, params: Params, images: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Pixels 0..255 [B, H, W, 3] to scaled latents [B, h, w, L]: a draw by normal `noise`, or the mean."""
        variables = {"params": params["autoencoder"]}
        mean, logvar = cast(Any, self.autoencoder.apply(variables, signed_pixels(images), method=Autoencoder.encode))
        latents = mean if noise is None else posterior_sample(mean, logvar, noise)
        return scale_latents(latents, self.config.autoencoder)

    def decode_latents(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, L] to pictures [B, H, W, 3] in about [-1, 1]."""
        variables = {"params": params["autoencoder"]}
        latents = unscale_latents(latents, self.config.autoencoder)
        return cast(jax.Array, self.autoencoder.apply(variables, latents, method=Autoencoder.decode))
