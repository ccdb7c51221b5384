"""The image autoencoder of latent diffusion: pictures to latents of an eighth of their side, and back.

The network of SD 1.5 and SDXL (AutoencoderKL of diffusers; "High-Resolution Image Synthesis with Latent Diffusion
Models", arXiv 2112.10752). The encoder gives a normal distribution per latent value; the decoder takes one draw of it.

Letters: B batch, H, W height and width in pixels, h, w height and width of the latents, C channels, L latent channels,
T = h * w positions of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.convolution import BOTTOM_RIGHT, Conv, Downsample, GroupNorm, Upsample
from pixelstory_jax.models.layers import Linear
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

LOGVAR_LIMITS = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder.

    Attributes:
      block_channels: channels per level, from full resolution down; every level but the last halves the picture.
      layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
      latent_channels: L.
      groups: of the group norms; a divisor of every entry of `block_channels`.
      norm_eps: added to the variance in group norms.
      scaling_factor: what latents are multiplied by to have unit standard deviation, as diffusion expects.
      dtype: compute dtype. Parameters, norms, softmax and results are float32. SDXL's decoder overflows in float16.
    """

    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.18215
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_sizes(self, "layers_per_block", "latent_channels", "groups")
        if not self.block_channels or min(self.block_channels) < 1:
            raise ValueError(f"block_channels is {self.block_channels}; at least one level of at least 1 is needed.")
        uneven = [channels for channels in self.block_channels if channels % self.groups]
        if uneven:
            raise ValueError(f"block_channels {uneven} are not multiples of groups {self.groups}.")
        if self.scaling_factor <= 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor}; it must be above 0.")
        check_choice(self, "dtype", DTYPES)

    @property
    def reduction(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.block_channels) - 1)

    @classmethod
    def sd15(cls, **changes: Any) -> AutoencoderConfig:
        """The autoencoder of Stable Diffusion 1.5."""
        return cls(**changes)

    @classmethod
    def sdxl(cls, **changes: Any) -> AutoencoderConfig:
        """The autoencoder of SDXL: the same sizes, trained anew, latents of another scale."""
        return cls(**{"scaling_factor": 0.13025, **changes})

    @classmethod
    def tiny(cls, **changes: Any) -> AutoencoderConfig:
        """Panels of 96 x 96 pixels to 24 x 24 latents of 4 channels, in milliseconds on a CPU."""
        sizes = {"block_channels": (16, 32, 64), "layers_per_block": 1, "latent_channels": 4, "groups": 8}
        return cls(**{**sizes, "scaling_factor": 1.0, **changes})


def signed_pixels(images: jax.Array) -> jax.Array:
    """Pixels 0..255 of any dtype to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def byte_pixels(images: jax.Array) -> jax.Array:
    """Decoded pictures in about [-1, 1] to uint8, clipped and rounded."""
    return jnp.round(jnp.clip(images / 2 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)


def posterior_sample(mean: jax.Array, logvar: jax.Array, noise: jax.Array) -> jax.Array:
    """A draw from the encoder's distribution by standard normal `noise`; all of one shape."""
    return mean + jnp.exp(0.5 * logvar) * noise


def scale_latents(latents: jax.Array, config: AutoencoderConfig) -> jax.Array:
    """From the autoencoder's latents to those that diffusion works on."""
    return latents * config.scaling_factor


def unscale_latents(latents: jax.Array, config: AutoencoderConfig) -> jax.Array:
    """The inverse of `scale_latents`, before `Autoencoder.decode`."""
    return latents / config.scaling_factor


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, H, W, C] to [B, H, W, `channels`]."""

    config: AutoencoderConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        hidden = x
        for number in (1, 2):
            hidden = jax.nn.silu(GroupNorm(config.groups, config.norm_eps, name=f"norm_{number}")(hidden))
            hidden = Conv(self.channels, dtype=config.dtype, name=f"conv_{number}")(hidden)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, kernel=1, dtype=config.dtype, name="shortcut")(x)
        return constrain(x + hidden, "batch")


class SpatialAttention(nn.Module):
    """Self-attention of one head between all positions, with its norm and residual: [B, h, w, C] to the same."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, (height, _, channels) = self.config, x.shape[1:]
        tokens = rearrange(GroupNorm(config.groups, config.norm_eps, name="norm")(x), "b h w c -> b (h w) c")
        query, key, value = (
            rearrange(Linear(channels, dtype=config.dtype, name=name)(tokens), "b t c -> b t 1 c")
            for name in ("query", "key", "value")
        )
        out = rearrange(attend(query, key, value), "b t 1 c -> b t c")
        out = Linear(channels, dtype=config.dtype, name="out")(out)
        return constrain(x + rearrange(out, "b (h w) c -> b h w c", h=height), "batch")


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the smallest resolution."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = ResidualBlock(self.config, channels, name="resnet_0")(x)
        x = SpatialAttention(self.config, name="attention")(x)
        return ResidualBlock(self.config, channels, name="resnet_1")(x)


class Head(nn.Module):
    """Norm, SiLU and a convolution to the channels of the result."""

    config: AutoencoderConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(GroupNorm(self.config.groups, self.config.norm_eps, name="norm")(x))
        return Conv(self.channels, dtype=self.config.dtype, name="conv")(x)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] to [B, h, w, 2 L]."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        x = Conv(config.block_channels[0], dtype=config.dtype, name="conv_in")(images)
        last = len(config.block_channels) - 1
        for level, channels in enumerate(config.block_channels):
            for number in range(config.layers_per_block):
                x = ResidualBlock(config, channels, name=f"level_{level}_resnet_{number}")(x)
            if level != last:
                x = Downsample(channels, BOTTOM_RIGHT, config.dtype, name=f"level_{level}_downsample")(x)
        x = MiddleBlock(config, name="middle")(x)
        return Head(config, 2 * config.latent_channels, name="head")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, L] to pictures [B, H, W, 3]. Levels are counted from the latents up."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        config = self.config
        x = Conv(config.block_channels[-1], dtype=config.dtype, name="conv_in")(latents)
        x = MiddleBlock(config, name="middle")(x)
        last = len(config.block_channels) - 1
        for level, channels in enumerate(reversed(config.block_channels)):
            for number in range(config.layers_per_block + 1):
                x = ResidualBlock(config, channels, name=f"level_{level}_resnet_{number}")(x)
            if level != last:
                x = Upsample(channels, config.dtype, name=f"level_{level}_upsample")(x)
        return Head(config, 3, name="head")(x)


class Autoencoder(nn.Module):
    """Encoder, decoder and the two pointwise maps around the latents, which are not scaled here."""

    config: AutoencoderConfig

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.moments = Conv(2 * config.latent_channels, kernel=1, dtype=config.dtype)
        self.from_latents = Conv(config.latent_channels, kernel=1, dtype=config.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latents, float32 [B, h, w, L] each, of pictures [B, H, W, 3] in [-1, 1].

        Raises:
          ValueError: the sides are not multiples of `config.reduction`, or there are not three channels.
        """
        side = self.config.reduction
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % side or images.shape[2] % side:
            raise ValueError(
                f"Pictures of shape {images.shape}; expected [B, H, W, 3] with sides in multiples of {side}."
            )
        moments = self.moments(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_LIMITS)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures, float32 [B, H, W, 3] in about [-1, 1] (not clipped), of unscaled latents [B, h, w, L].

        Raises:
          ValueError: another number of channels than L.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise ValueError(f"Latents of shape {latents.shape}; expected [B, h, w, {channels}].")
        return self.decoder(self.from_latents(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(Reconstruction, mean, log-variance) of pictures in [-1, 1], by the draw that `noise` [B, h, w, L] gives."""
        mean, logvar = self.encode(images)
        return self.decode(posterior_sample(mean, logvar, noise)), mean, logvar
