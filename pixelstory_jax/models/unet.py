"""The U-Net of Stable Diffusion 1.5 and SDXL (arXiv 2112.10752, 2307.01952), whose up blocks can share between panels.

B images, H x W latent grid, N = H W tokens, C channels, T text tokens, D text width, E width of the time embedding.
Latents are NHWC. Sharing between panels is explained in `consistent_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.consistent_attention import SelfAttention, Sharing
from pixelstory_jax.models.convolution import Conv, Downsample, GroupNorm, Upsample
from pixelstory_jax.models.layers import REMATS, LayerNorm, Linear, gelu, rematerialised
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

TRANSFORMER_NORM_EPS = 1e-6  # the group norm before a stack of transformer blocks; all other group norms have norm_eps
Carry = tuple[jax.Array, Any]


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net. Tuples have one entry per resolution, finest first.

    Attributes:
      channels: C.
      depths: transformer blocks behind each resnet; 0 for none.
      heads: attention heads.
      layers_per_block: resnets of a down block; an up block has one more.
      context_width: D. linear_projection: whether torch keeps `proj_in` as linear maps (SDXL) or as 1x1 convolutions;
        the arithmetic is the same, only the layout of files differs.
      pooled_width: width of the pooled text vector; 0 for a network without it and without time ids (SD 1.5).
      time_id_width: width of the sinusoids of each of the six time ids.
      groups, norm_eps: of the group norms.
      lora_rank, lora_alpha: low-rank additions to the attention maps; rank 0 for none.
      dtype: compute dtype; parameters, norms and softmax are float32. remat: "none" or of `layers.REMAT_POLICIES`.
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    depths: tuple[int, ...] = (0, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    layers_per_block: int = 2
    in_channels: int = 4
    out_channels: int = 4
    context_width: int = 2048
    linear_projection: bool = True
    pooled_width: int = 1280
    time_id_width: int = 256
    groups: int = 32
    norm_eps: float = 1e-5
    lora_rank: int = 0
    lora_alpha: float = 1.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self, "layers_per_block", "in_channels", "out_channels", "context_width", "groups")
        for name in ("depths", "heads"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, channels has {len(self.channels)}.")
        for channels, heads in zip(self.channels, self.heads, strict=True):
            if channels % self.groups or channels % heads:
                raise ValueError(
                    f"channels {channels} must be a multiple of groups {self.groups} and of heads {heads}."
                )
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "remat", REMATS)

    @classmethod
    def sdxl(cls, **changes: Any) -> UNetConfig:
        """stabilityai/stable-diffusion-xl-base-1.0."""
        return cls(**changes)

    @classmethod
    def sd15(cls, **changes: Any) -> UNetConfig:
        """Stable Diffusion 1.5."""
        sizes: dict[str, Any] = {
            "channels": (320, 640, 1280, 1280),
            "depths": (1, 1, 1, 0),
            "heads": (8, 8, 8, 8),
            "context_width": 768,
            "linear_projection": False,
            "pooled_width": 0,
        }
        return cls(**{**sizes, **changes})

    @classmethod
    def tiny(cls, **changes: Any) -> UNetConfig:
        """For 24 x 24 latents of 4 channels, on two CPU cores. Attention at 6 x 6 alone, where it costs little."""
        sizes: dict[str, Any] = {
            "channels": (32, 64, 128),
            "depths": (0, 0, 2),
            "heads": (1, 2, 4),
            "layers_per_block": 1,
            "in_channels": 4,
            "out_channels": 4,
            "context_width": 64,
            "pooled_width": 0,
            "groups": 16,
        }
        return cls(**{**sizes, **changes})

    @property
    def levels(self) -> int:
        return len(self.channels)

    @property
    def mid_depth(self) -> int:
        """Blocks of the middle transformer: as at the coarsest resolution that has any."""
        return next(depth for depth in (*reversed(self.depths), 1) if depth)

    @property
    def time_width(self) -> int:
        return 4 * self.channels[0]

    def up_stacks(self) -> tuple[tuple[str, int, int], ...]:
        """(name, level, blocks) of every attention stack that can share, in the order of calls."""
        return tuple(
            (f"up_{number}/attention_{layer}", level, self.depths[level])
            for number, level in enumerate(reversed(range(self.levels)))
            if self.depths[level]
            for layer in range(self.layers_per_block + 1)
        )

    @property
    def sharing_layers(self) -> int:
        """L: 36 in SDXL, 9 in SD 1.5."""
        return sum(blocks for _, _, blocks in self.up_stacks())

    def grid(self, level: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens at a resolution, for latents of height x width."""
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def sharing_grids(self, height: int, width: int) -> tuple[int, ...]:
        """Tokens per image (N) of the sharing layers, without repetitions, coarsest first."""
        return tuple(dict.fromkeys(math.prod(self.grid(level, height, width)) for _, level, _ in self.up_stacks()))


@dataclass(frozen=True)
class FreeU:
    """Re-weighting of backbone and skips in the first two up blocks (arXiv 2309.11497); defaults as StoryDiffusion.

    backbone: factors of the first half of the backbone's channels. skip: factors of the skips' lowest frequencies.
    """

    backbone: tuple[float, float] = (1.1, 1.2)
    skip: tuple[float, float] = (0.6, 0.4)

    def apply(self, up_block: int, x: jax.Array, skip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Backbone and skip [B, H, W, C] as they enter the resnets of an up block."""
        if up_block >= len(self.backbone):
            return x, skip
        factors = jnp.where(jnp.arange(x.shape[-1]) < x.shape[-1] // 2, self.backbone[up_block], 1.0)
        return x * factors.astype(x.dtype), scale_low_frequencies(skip, self.skip[up_block])


def scale_low_frequencies(x: jax.Array, factor: float) -> jax.Array:
    """FreeU's Fourier filter of [B, H, W, C]: the modes with frequencies -1 and 0 on both axes times `factor`.

    The real part of the filtered inverse transform, written as a projection on four modes: no FFT is needed.
    """
    height, width = x.shape[1:3]
    rows = np.outer([-1, 0][-min(height, 2) :], np.arange(height)) / height  # one row has no frequency -1
    columns = np.outer([-1, 0][-min(width, 2) :], np.arange(width)) / width
    angle = 2 * np.pi * (rows[:, None, :, None] + columns[None, :, None, :])
    modes = rearrange(np.stack([np.cos(angle), np.sin(angle)]), "p u v h w -> (p u v) h w").astype(np.float32)
    wide = x.astype(jnp.float32)
    low = jnp.einsum("mhw,bhwc->bmc", modes, wide) / (height * width)
    return (wide + (factor - 1) * jnp.einsum("mhw,bmc->bhwc", modes, low)).astype(x.dtype)


def sinusoids(values: jax.Array, width: int) -> jax.Array:
    """[...] to [..., width]: cosines, then sines, of frequencies from 1 down to nearly 1 / 10000."""
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class EmbeddingMlp(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Linear(self.width, dtype=self.dtype, name="first")(x))
        return Linear(self.width, dtype=self.dtype, name="second")(x)


class Resnet(nn.Module):
    """Two convolutions with the time embedding between them, plus the input (through a 1x1 where channels change)."""

    config: UNetConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        config, dtype = self.config, self.config.dtype
        hidden = nn.silu(GroupNorm(config.groups, config.norm_eps, name="norm_1")(x))
        hidden = Conv(self.channels, dtype=dtype, name="conv_1")(hidden)
        hidden = hidden + Linear(self.channels, dtype=dtype, name="time")(nn.silu(time))[:, None, None, :]
        hidden = nn.silu(GroupNorm(config.groups, config.norm_eps, name="norm_2")(hidden))
        hidden = Conv(self.channels, dtype=dtype, name="conv_2")(hidden)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, kernel=1, dtype=dtype, name="shortcut")(x)
        return constrain(x + hidden, "batch")


class CrossAttention(nn.Module):
    """Image tokens attend to the text."""

    config: UNetConfig
    width: int
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        config = self.config

        def linear(name: str, use_bias: bool = False) -> Linear:
            return Linear(
                self.width, use_bias, config.dtype, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha, name=name
            )

        query, key, value = (
            rearrange(linear(name)(source), "b t (h d) -> b t h d", h=self.heads)
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        query, key, value = (constrain(heads, "batch", None, "tensor") for heads in (query, key, value))
        return linear("out", use_bias=True)(rearrange(attend(query, key, value), "b t h d -> b t (h d)"))


class FeedForward(nn.Module):
    """GEGLU: value times the exact (erf) GELU of the gate, hidden width 4 C."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(Linear(8 * self.width, dtype=self.dtype, name="up")(x), 2, axis=-1)
        hidden = constrain(value * gelu(gate), "batch", None, "tensor")
        return Linear(self.width, dtype=self.dtype, name="down")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on normed tokens; a step of the scan over equal blocks."""

    config: UNetConfig
    width: int
    heads: int

    def setup(self) -> None:
        config = self.config
        self.norm_1, self.norm_2, self.norm_3 = LayerNorm(), LayerNorm(), LayerNorm()
        self.self_attention = SelfAttention(
            self.width, self.heads, config.dtype, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha
        )
        self.cross_attention = CrossAttention(config, self.width, self.heads)
        self.feed_forward = FeedForward(self.width, config.dtype)

    def block(
        self, x: jax.Array, context: jax.Array, sharing: Sharing | None, gate: jax.Array | None, bank: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        attended, kept = self.self_attention(self.norm_1(x), sharing, gate, bank)
        x = constrain(x + attended, "batch")
        x = constrain(x + self.cross_attention(self.norm_2(x), context), "batch")
        return constrain(x + self.feed_forward(self.norm_3(x)), "batch"), kept

    def __call__(
        self, x: jax.Array, per_layer: tuple[Any, Any], context: jax.Array, sharing: Sharing | None
    ) -> tuple[jax.Array, jax.Array | None]:
        gate, bank = per_layer
        return rematerialised(TransformerBlock.block, self.config.remat)(self, x, context, sharing, gate, bank)


class TransformerStack(nn.Module):
    """Group norm, projection, scanned blocks, projection, plus the input."""

    config: UNetConfig
    width: int
    heads: int
    depth: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        sharing: Sharing | None = None,
        per_layer: tuple[Any, Any] = (None, None),
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, H, W, C] to the same, and the kept tokens [depth, G, A, K, C] or None."""
        config = self.config
        rows = x.shape[1]
        tokens = rearrange(GroupNorm(config.groups, TRANSFORMER_NORM_EPS, name="norm")(x), "b h w c -> b (h w) c")
        tokens = Linear(self.width, dtype=config.dtype, name="proj_in")(tokens)
        blocks = nn.scan(
            TransformerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(config, self.width, self.heads, name="blocks")
        tokens, kept = blocks(tokens, per_layer, context, sharing)
        tokens = Linear(self.width, dtype=config.dtype, name="proj_out")(tokens)
        return x + rearrange(tokens, "b (h w) c -> b h w c", h=rows), kept


class DownBlock(nn.Module):
    """Resnets and transformer stacks of one resolution, then half the grid (but at the last)."""

    config: UNetConfig
    level: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The hidden state, and the skips in the order made."""
        config, level = self.config, self.level
        channels, depth, heads = config.channels[level], config.depths[level], config.heads[level]
        skips = []
        for layer in range(config.layers_per_block):
            x = Resnet(config, channels, name=f"resnet_{layer}")(x, time)
            if depth:
                x, _ = TransformerStack(config, channels, heads, depth, name=f"attention_{layer}")(x, context)
            skips.append(x)
        if level < config.levels - 1:
            x = Downsample(channels, dtype=config.dtype, name="downsample")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """Resnet, transformer stack, resnet."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, context: jax.Array) -> jax.Array:
        config = self.config
        channels = config.channels[-1]
        x = Resnet(config, channels, name="resnet_0")(x, time)
        x, _ = TransformerStack(config, channels, config.heads[-1], config.mid_depth, name="attention")(x, context)
        return Resnet(config, channels, name="resnet_1")(x, time)


class UpBlock(nn.Module):
    """Resnets on the hidden state beside the skips, transformer stacks that may share, then twice the grid."""

    config: UNetConfig
    number: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        time: jax.Array,
        context: jax.Array,
        sharing: Sharing | None,
        freeu: FreeU | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The hidden state, and what the stacks keep for a bank by their names. `skips` are consumed from the end."""
        config, level = self.config, self.config.levels - 1 - self.number
        channels, depth, heads = config.channels[level], config.depths[level], config.heads[level]
        stacks = config.up_stacks()
        bank = {}
        for layer in range(config.layers_per_block + 1):
            skip = skips.pop()
            if freeu is not None:
                x, skip = freeu.apply(self.number, x, skip)
            x = Resnet(config, channels, name=f"resnet_{layer}")(jnp.concatenate([x, skip], axis=-1), time)
            if depth:
                name = f"up_{self.number}/attention_{layer}"
                first = sum(blocks for _, _, blocks in stacks[: [stack[0] for stack in stacks].index(name)])
                per_layer = (None, None) if sharing is None else sharing.stack(name, first, depth)
                stack = TransformerStack(config, channels, heads, depth, name=f"attention_{layer}")
                x, kept = stack(x, context, sharing, per_layer)
                if kept is not None:
                    bank[name] = kept
        if level > 0:
            size = (
                skips[-1].shape[1],
                skips[-1].shape[2],
            )  # of the next resolution, which an odd grid does not simply double to
            x = Upsample(channels, dtype=config.dtype, name="upsample")(x, size)
        return x, bank


class UNet(nn.Module):
    """Predicts noise (or velocity) from noisy latents, a time and text states."""

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        context: jax.Array,
        added: Mapping[str, jax.Array] | None = None,
        sharing: Sharing | None = None,
        freeu: FreeU | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One prediction.

        Args:
          latents: [B, H, W, in_channels].
          timesteps: [B] or scalar, in training steps (0..999), any real number.
          context: [B, T, D] text states.
          added: "pooled" [B, pooled_width] text vector and "time_ids" [B, 6] (original height and width, top and left
            of the crop, target height and width, in pixels); None for a network without them.
          sharing: who sees whom between panels; None for independent images.
          freeu: re-weighting of the first two up blocks (static).

        Returns:
          [B, H, W, out_channels] float32, and the bank that `sharing.store` asks for (else empty): name of the stack ->
          [blocks, G, A, K or N, C].

        Raises:
          ValueError: `added` is missing or not wanted.
        """
        config = self.config
        if (added is None) == bool(config.pooled_width):
            raise ValueError(
                f"This U-Net {'needs' if config.pooled_width else 'takes no'} pooled text vectors and time ids."
            )
        timesteps = jnp.broadcast_to(timesteps, latents.shape[:1])
        time = EmbeddingMlp(config.time_width, config.dtype, name="time_embedding")(
            sinusoids(timesteps, config.channels[0])
        )
        if added is not None:
            ids = rearrange(sinusoids(added["time_ids"], config.time_id_width), "b i d -> b (i d)")
            vector = jnp.concatenate([added["pooled"].astype(jnp.float32), ids], axis=-1)
            time = time + EmbeddingMlp(config.time_width, config.dtype, name="added_embedding")(vector)
        context = constrain(context.astype(config.dtype), "batch")
        x = Conv(config.channels[0], dtype=config.dtype, name="conv_in")(latents.astype(config.dtype))
        x = constrain(x, "batch")
        skips = [x]
        for level in range(config.levels):
            x, more = DownBlock(config, level, name=f"down_{level}")(x, time, context)
            skips += more
        x = MidBlock(config, name="mid")(x, time, context)
        bank: dict[str, jax.Array] = {}
        for number in range(config.levels):
            x, kept = UpBlock(config, number, name=f"up_{number}")(x, skips, time, context, sharing, freeu)
            bank.update(kept)
        x = nn.silu(GroupNorm(config.groups, config.norm_eps, name="norm_out")(x))
        x = Conv(config.out_channels, dtype=config.dtype, name="conv_out")(x)
        return x.astype(jnp.float32), bank
