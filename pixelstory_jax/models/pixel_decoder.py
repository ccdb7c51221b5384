"""The lightweight pixel decoder of PixelLM (arXiv 2312.02228, section 3.2) on SAM's two-way transformer (2304.02643).

B images, S targets of an image, L feature scales, g grid side, h = w = side of a scale, X = h * w, W decoder width,
M mask tokens (4, of which the first makes the mask), T = M + 2 tokens per target, D width of the incoming features.
Targets that share an image keep their axis S apart, so that whatever depends on the image alone has S = 1 and is
computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.layers import LayerNorm, Linear, gelu, torch_uniform
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.resize import resize_bilinear
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

LAYER_NORM_2D_EPS = 1e-6
unit_normal = nn.initializers.normal(1.0)


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes of neck, prompt encoder and mask decoder.

    Attributes:
      width: a multiple of 8 and of 2 * heads; the upscaled features and hypernetworks have width / 8 channels.
      cross_downsample: cross-attention works at width / cross_downsample.
      mask_tokens: 4 in SAM. Only the first gives the mask, but all take part in attention.
      scales: L. Scale l works on a grid 2 ** l times as fine.
      fused_size: side of the fused mask; None for that of the finest scale. Released weights: 128.
      position_dtype: dtype in which the position codes are computed; None leaves it to `PixelLMConfig.mode`, and is
        float32 where the decoder stands alone.
    """

    width: int = 256
    heads: int = 8
    mlp_width: int = 2048
    depth: int = 2
    cross_downsample: int = 2
    mask_tokens: int = 4
    iou_width: int = 256
    scales: int = 2
    fused_size: int | None = None
    dtype: str = "float32"
    position_dtype: str | None = None

    def __post_init__(self) -> None:
        names = ("width", "heads", "mlp_width", "depth", "cross_downsample", "mask_tokens", "iou_width", "scales")
        check_sizes(self, *names, *(() if self.fused_size is None else ("fused_size",)))
        check_choice(self, "dtype", DTYPES)
        if self.position_dtype is not None:
            check_choice(self, "position_dtype", DTYPES)
        inner = self.width // self.cross_downsample
        if self.width % 8 or self.width % self.heads or inner % self.heads:
            raise ValueError(
                f"Decoder width {self.width} must be a multiple of 8, and width and width / {self.cross_downsample} "
                f"multiples of the {self.heads} heads."
            )


def position_code(matrix: jax.Array, height: int, width: int, dtype: str | None = None) -> jax.Array:
    """Random Fourier position code [height, width, W] of cell centres, from a Gaussian `matrix` [2, W / 2].

    Computed in `dtype`, None for float32.
    """
    dtype = dtype or "float32"
    x = (jnp.arange(width, dtype=dtype) + 0.5) / width
    y = (jnp.arange(height, dtype=dtype) + 0.5) / height
    points = jnp.stack(jnp.meshgrid(x, y), axis=-1) * 2 - 1  # [height, width, 2], x first
    # A TPU would otherwise multiply float32 in bfloat16, and the angles go round many times.
    angle = 2 * jnp.pi * jnp.matmul(points, matrix.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class DoublingConvolution(nn.Module):
    """Transposed convolution, kernel 2 and stride 2: [..., h, w, C] to [..., 2h, 2w, features]."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = torch_uniform(self.features * 4)  # what torch takes for the fan-in of a transposed convolution
        kernel = self.param("kernel", init, (x.shape[-1], 2, 2, self.features))
        bias = self.param("bias", init, (self.features,))
        y = jnp.einsum("...hwc,cijo->...hiwjo", x.astype(self.dtype), kernel.astype(self.dtype))
        return rearrange(y, "... h i w j o -> ... (h i) (w j) o") + bias.astype(self.dtype)


class Neck(nn.Module):
    """`image_feature_neck`: [..., g, g, D] to [..., g, g, W]. The released script never trains it."""

    config: PixelDecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        lead = x.shape[:-3]
        x = Linear(config.width, use_bias=False, dtype=config.dtype, torch_init=True, name="reduce")(x)
        x = LayerNorm(LAYER_NORM_2D_EPS, name="reduce_norm")(x)
        kernel = self.param("kernel", torch_uniform(config.width * 9), (3, 3, config.width, config.width))
        x = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[-3:]),
            kernel.astype(config.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return constrain(LayerNorm(LAYER_NORM_2D_EPS, name="norm")(x.reshape(*lead, *x.shape[1:])), "batch")


class PromptEncoder(nn.Module):
    """SAM's prompt encoder, of which PixelLM reads the position code and the embedding for "no mask prompt".

    The parameters for points and mask prompts are part of the released layout and are carried through unread.
    """

    config: PixelDecoderConfig
    mask_channels: int = 16

    def setup(self) -> None:
        width, channels = self.config.width, self.mask_channels
        few = channels // 4
        self.position_matrix = self.param("position_matrix", unit_normal, (2, width // 2))
        self.no_mask = self.param("no_mask", unit_normal, (width,))
        self.points = self.param("points", unit_normal, (4, width))
        self.not_a_point = self.param("not_a_point", unit_normal, (width,))
        for number, (size, source, target) in enumerate([(2, 1, few), (2, few, channels), (1, channels, width)]):
            init = torch_uniform(source * size**2)
            self.param(f"mask_{number}_kernel", init, (size, size, source, target))
            self.param(f"mask_{number}_bias", init, (target,))
            if size == 2:
                self.param(f"mask_{number}_norm_scale", nn.initializers.ones, (target,))
                self.param(f"mask_{number}_norm_bias", nn.initializers.zeros, (target,))

    def __call__(self, grid: int) -> tuple[jax.Array, jax.Array]:
        """The dense prompt [W], equal in every cell, and the position code [grid, grid, W]."""
        matrix = jax.lax.stop_gradient(self.position_matrix)
        return self.no_mask, position_code(matrix, grid, grid, self.config.position_dtype)


class DecoderAttention(nn.Module):
    """Multi-head attention over [B, S, T, W]; queries or keys with S = 1 are shared by all targets."""

    config: PixelDecoderConfig
    downsample: int

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        config = self.config
        inner = config.width // self.downsample
        query, key, value = (
            rearrange(
                Linear(inner, dtype=config.dtype, torch_init=True, name=name)(x),
                "b s t (n h) -> b s t n h",
                n=config.heads,
            )
            for name, x in (("query", query), ("key", key), ("value", value))
        )
        (batch, queries), keys, length = query.shape[:2], key.shape[1], query.shape[2]
        if keys == 1:  # all targets look at the same keys: one long row of queries
            flat = query.reshape(batch, queries * length, *query.shape[3:])
            out = attend(flat, key[:, 0], value[:, 0])
        else:
            query = jnp.broadcast_to(query, (batch, keys, *query.shape[2:]))
            out = attend(*(x.reshape(batch * keys, *x.shape[2:]) for x in (query, key, value)))
        out = out.reshape(batch, queries if keys == 1 else keys, length, inner)
        return Linear(config.width, dtype=config.dtype, torch_init=True, name="out")(out)


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image to the tokens."""

    config: PixelDecoderConfig
    first: bool

    @nn.compact
    def __call__(
        self, tokens: jax.Array, image: jax.Array, token_code: jax.Array, image_code: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        config = self.config
        self_attention = DecoderAttention(config, 1, name="self_attention")
        if self.first:  # the tokens still equal their code, so the reference adds neither code nor residual here
            tokens = self_attention(tokens, tokens, tokens)
        else:
            coded = tokens + token_code
            tokens = tokens + self_attention(coded, coded, tokens)
        tokens = LayerNorm(name="norm_1")(tokens)
        cross = DecoderAttention(config, config.cross_downsample, name="token_to_image")
        tokens = LayerNorm(name="norm_2")(tokens + cross(tokens + token_code, image + image_code, image))
        hidden = jax.nn.relu(Linear(config.mlp_width, dtype=config.dtype, torch_init=True, name="mlp_in")(tokens))
        hidden = Linear(config.width, dtype=config.dtype, torch_init=True, name="mlp_out")(hidden)
        tokens = constrain(LayerNorm(name="norm_3")(tokens + hidden), "batch")
        cross = DecoderAttention(config, config.cross_downsample, name="image_to_token")
        image = LayerNorm(name="norm_4")(image + cross(image + image_code, tokens + token_code, tokens))
        return tokens, constrain(image, "batch")


class TwoWayTransformer(nn.Module):
    """[B, S, T, W] tokens and [B, S or 1, X, W] image cells, each updated by the other."""

    config: PixelDecoderConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, image: jax.Array, image_code: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        token_code = tokens
        for number in range(config.depth):
            block = TwoWayBlock(config, number == 0, name=f"block_{number}")
            tokens, image = block(tokens, image, token_code, image_code)
        final = DecoderAttention(config, config.cross_downsample, name="final_attention")
        tokens = LayerNorm(name="final_norm")(tokens + final(tokens + token_code, image + image_code, image))
        return tokens, image


class StackedMlp(nn.Module):
    """`count` separate three-layer MLPs with ReLU, one per token: [..., count, W] to [..., count, features].

    Only the first `inputs.shape[-2]` of them are evaluated.
    """

    count: int
    hidden: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        used = x.shape[-2]
        for number, features in enumerate((self.hidden, self.hidden, self.features)):
            init = torch_uniform(x.shape[-1])
            kernel = self.param(f"kernel_{number}", init, (self.count, x.shape[-1], features))
            bias = self.param(f"bias_{number}", init, (self.count, features))
            x = jnp.einsum("...md,mdo->...mo", x.astype(self.dtype), kernel[:used].astype(self.dtype))
            x = x + bias[:used].astype(self.dtype)
            x = jax.nn.relu(x) if number < 2 else x
        return x


class ScaleMasks(NamedTuple):
    """Results of one scale: `masks` [B, S, 1 or M, h, w] logits, `quality` [B, S, M] (None unless all were asked)."""

    masks: jax.Array
    quality: jax.Array | None


class MaskDecoder(nn.Module):
    """`MaskDecoderMultiScale`: from the coarsest scale to the finest, each guided by the mask of the last."""

    config: PixelDecoderConfig

    def setup(self) -> None:
        config = self.config
        width = config.width
        self.iou_token = self.param("iou_token", unit_normal, (1, width))
        self.mask_tokens = self.param("mask_tokens", unit_normal, (config.mask_tokens, width))
        self.level_embedding = self.param("level_embedding", unit_normal, (config.scales, width))
        self.transformers = [TwoWayTransformer(config, name=f"transformer_{n}") for n in range(config.scales)]
        self.position_matrices = [
            self.param(f"position_matrix_{n}", unit_normal, (2, width // 2)) for n in range(1, config.scales)
        ]
        if config.scales > 1:
            self.upsample = DoublingConvolution(width, config.dtype)
            self.upsample_norm = LayerNorm(LAYER_NORM_2D_EPS)
        self.upscale = DoublingConvolution(width // 8, config.dtype)
        self.upscale_norm = LayerNorm(LAYER_NORM_2D_EPS)
        self.hypernetworks = StackedMlp(config.mask_tokens, width, width // 8, config.dtype)
        self.iou_head = StackedMlp(1, config.iou_width, config.mask_tokens, config.dtype)

    def __call__(
        self,
        features: jax.Array,
        prompts: jax.Array,
        dense_prompt: jax.Array,
        image_code: jax.Array,
        all_masks: bool = False,
    ) -> tuple[ScaleMasks, ...]:
        """Mask logits of every scale.

        Args:
          features: [B, L, g, g, W] after the neck, high-level features first.
          prompts: [B, S, L, W], one fused embedding per target and scale.
          dense_prompt: [W]. image_code: [g, g, W] of the coarsest scale; both from `PromptEncoder`.
          all_masks: also return the masks of the other mask tokens and the predicted qualities.

        Returns:
          One `ScaleMasks` per scale; scale l has masks of side g * 2 ** (l + 1). The first mask is the one that counts.
        """
        config = self.config
        dense_prompt, image_code = dense_prompt.astype(config.dtype), image_code.astype(config.dtype)
        results: list[ScaleMasks] = []
        for scale in range(config.scales):
            image = features[:, scale, None].astype(config.dtype)  # [B, 1, g, g, W]
            if scale > 0:
                for _ in range(scale):  # each scale is twice as fine as the one before
                    image = gelu(self.upsample_norm(self.upsample(image)))
                found = jax.nn.sigmoid(results[-1].masks[:, :, 0].astype(jnp.float32))
                image = image * (1 + found[..., None]).astype(config.dtype)  # [B, S, h, w, W]
                matrix = jax.lax.stop_gradient(self.position_matrices[scale - 1])
                side = image.shape[2]
                image_code = position_code(matrix, side, side, config.position_dtype).astype(config.dtype)
            masks, quality = self._one_scale(scale, image + dense_prompt, prompts[:, :, scale], image_code, all_masks)
            results.append(ScaleMasks(masks, quality))
        return tuple(results)

    def _one_scale(
        self, scale: int, image: jax.Array, prompt: jax.Array, image_code: jax.Array, all_masks: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """image [B, S or 1, h, w, W], prompt [B, S, W]."""
        config = self.config
        height, width = image.shape[2:4]
        own = jnp.concatenate([self.iou_token, self.mask_tokens]).astype(config.dtype)
        own = jnp.broadcast_to(own, (*prompt.shape[:2], *own.shape))
        tokens = jnp.concatenate([own, prompt[:, :, None].astype(config.dtype)], axis=2)  # [B, S, T, W]
        tokens = tokens + self.level_embedding[scale].astype(config.dtype)
        flat_code = rearrange(image_code, "h w d -> (h w) d")
        flat = constrain(rearrange(image, "b s h w d -> b s (h w) d"), "batch")
        tokens, flat = self.transformers[scale](tokens, flat, flat_code)
        image = rearrange(flat, "b s (h w) d -> b s h w d", h=height, w=width)
        upscaled = gelu(self.upscale_norm(self.upscale(image)))  # [B, S, 2h, 2w, W / 8]
        count = config.mask_tokens if all_masks else 1
        hyper = self.hypernetworks(tokens[:, :, 1 : 1 + count])
        masks = jnp.einsum("bsmc,bshwc->bsmhw", hyper, upscaled, preferred_element_type=jnp.float32)
        quality = None
        if all_masks or self.is_initializing():
            quality = self.iou_head(tokens[:, :, :1])[:, :, 0].astype(jnp.float32)
        return masks, quality


def fuse_scales(masks: list[jax.Array], weights: jax.Array, size: int) -> jax.Array:
    """Weighted sum over scales of masks [..., h, w], each resized to size x size."""
    resized = jnp.stack([resize_bilinear(mask.astype(jnp.float32), size, size) for mask in masks])
    return jnp.einsum("l...,l->...", resized, weights.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
