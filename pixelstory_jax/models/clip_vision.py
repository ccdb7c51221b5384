"""CLIP's vision transformer with padding masks and tables of any grid (arXiv 2103.00020; spec of PixelLM, section 1.3).

B images, C canvas side in pixels, p patch side, g = C / p grid side, P = g * g patches, D width, F asked states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.layers import REMATS, LayerNorm, Linear, embedding_init, gelu, rematerialised
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.resize import resize_bilinear
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a tower.

    Attributes:
      canvas: side of the square input in pixels, a multiple of `patch_size`.
      layers: PixelLM reads no state after layer 23, so its tower has 23 of CLIP's 24 layers and no final norm.
      activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (exact).
      has_final_norm: whether the norm of the pooled class state exists.
      dtype: compute dtype. Parameters, norms and softmax are float32.
      remat: "none" or a name of `layers.REMAT_POLICIES`.
    """

    canvas: int = 448
    patch_size: int = 14
    width: int = 1024
    layers: int = 23
    heads: int = 16
    mlp_width: int = 4096
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    has_final_norm: bool = False
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self, "canvas", "patch_size", "width", "layers", "heads", "mlp_width")
        if self.canvas % self.patch_size:
            raise ValueError(f"canvas {self.canvas} is not a multiple of patch_size {self.patch_size}.")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}.")
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "remat", REMATS)

    @property
    def grid(self) -> int:
        return self.canvas // self.patch_size

    @classmethod
    def clip_large_336(cls, **changes: Any) -> ClipVisionConfig:
        """openai/clip-vit-large-patch14-336, complete."""
        return cls(**{"canvas": 336, "layers": 24, "has_final_norm": True, **changes})


def activate(x: jax.Array, name: str) -> jax.Array:
    """The activation called `name` in `ClipVisionConfig`."""
    return x * jax.nn.sigmoid(1.702 * x) if name == "quick_gelu" else gelu(x)


def patch_validity(image_size: jax.Array, patch: int, grid: int) -> jax.Array:
    """[B, P] bool: whether the top left pixel of each patch lies in the picture.

    Args:
      image_size: [B, 2] (height, width) of the picture inside the canvas.
      patch: side of a patch in pixels. grid: patches per side.
    """
    start = jnp.arange(grid) * patch
    rows, columns = start < image_size[:, :1], start < image_size[:, 1:]  # [B, g]
    return rearrange(rows[:, :, None] & columns[:, None, :], "b r c -> b (r c)")


def resize_position_table(table: jax.Array | np.ndarray, new_grid: int, faithful: bool) -> jax.Array:
    """A position table for another grid, [new_grid ** 2 + 1, D] from [g * g + 1, D].

    `faithful` repeats the slip that the released PixelLM weights were trained with: all rows but the last are taken
    as the grid, so the class row becomes its first cell and the last row stays at the end. Otherwise the first row is
    the class row and the others the grid.

    Raises:
      ValueError: a table that is not a square grid plus one row.
    """
    table = jnp.asarray(table)
    old_grid = round((table.shape[0] - 1) ** 0.5)
    if old_grid**2 + 1 != table.shape[0]:
        raise ValueError(f"A position table has a square number of rows plus one, not {table.shape[0]}.")
    grid, kept = (table[:-1], table[-1:]) if faithful else (table[1:], table[:1])
    grid = rearrange(grid, "(r c) d -> r c d", r=old_grid)
    grid = rearrange(resize_bilinear(grid, new_grid, new_grid, axes=(0, 1)), "r c d -> (r c) d")
    return jnp.concatenate([grid, kept] if faithful else [kept, grid])


class VisionAttention(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        config = self.config
        query, key, value = (
            rearrange(Linear(config.width, dtype=config.dtype, name=name)(x), "b t (n h) -> b t n h", n=config.heads)
            for name in ("query", "key", "value")
        )
        query, key, value = (constrain(heads, "batch", None, "tensor") for heads in (query, key, value))
        out = rearrange(attend(query, key, value, mask=mask), "b t n h -> b t (n h)")
        return Linear(config.width, dtype=config.dtype, name="out")(out)


class VisionMlp(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        hidden = activate(Linear(config.mlp_width, dtype=config.dtype, name="up")(x), config.activation)
        hidden = constrain(hidden, "batch", None, "tensor")
        return Linear(config.width, dtype=config.dtype, name="down")(hidden)


class VisionLayer(nn.Module):
    """One pre-norm block, as a step of the scan over layers."""

    config: ClipVisionConfig

    def setup(self) -> None:
        self.attention_norm = LayerNorm(self.config.norm_eps)
        self.attention = VisionAttention(self.config)
        self.mlp_norm = LayerNorm(self.config.norm_eps)
        self.mlp = VisionMlp(self.config)

    def block(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = constrain(x + self.attention(self.attention_norm(x), mask), "batch")
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch")

    def __call__(
        self, carry: tuple[jax.Array, jax.Array], number: jax.Array, wanted: jax.Array, mask: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """`carry` is the state and what was captured; the result is copied into the slots that want this layer."""
        x, captured = carry
        x = rematerialised(VisionLayer.block, self.config.remat)(self, x, mask)
        asked = (wanted == number)[:, None, None, None]
        return (x, jnp.where(asked, x[None], captured)), None


class ClipVision(nn.Module):
    """The tower. Pixels in, chosen hidden states out."""

    config: ClipVisionConfig

    def setup(self) -> None:
        config = self.config
        self.patch_kernel = self.param(
            "patch_kernel",
            nn.initializers.normal((config.patch_size**2 * 3) ** -0.5),
            (config.patch_size, config.patch_size, 3, config.width),
        )
        self.class_embedding = self.param("class_embedding", embedding_init, (config.width,))
        self.position_embedding = self.param("position_embedding", embedding_init, (config.grid**2 + 1, config.width))
        self.pre_norm = LayerNorm(config.norm_eps)
        self.layers = nn.scan(
            VisionLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=config.layers,
        )(config)
        if config.has_final_norm:
            self.final_norm = LayerNorm(config.norm_eps)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, C, C, 3] to tokens [B, P + 1, D], class token first, after the pre-norm."""
        config = self.config
        if pixels.shape[1:] != (config.canvas, config.canvas, 3):
            raise ValueError(
                f"Pixels of shape {pixels.shape}; this tower takes [B, {config.canvas}, {config.canvas}, 3]."
            )
        patches = rearrange(
            pixels.astype(config.dtype), "b (r i) (c j) d -> b (r c) (i j d)", i=config.patch_size, j=config.patch_size
        )
        tokens = patches @ rearrange(self.patch_kernel, "i j d w -> (i j d) w").astype(config.dtype)
        first = jnp.broadcast_to(self.class_embedding.astype(config.dtype), (len(tokens), 1, config.width))
        tokens = jnp.concatenate([first, tokens], axis=1) + self.position_embedding.astype(config.dtype)
        return constrain(self.pre_norm(tokens), "batch")

    def __call__(self, pixels: jax.Array, patch_valid: jax.Array | None, feature_layers: tuple[int, ...]) -> jax.Array:
        """Hidden states of the asked layers.

        Args:
          pixels: [B, C, C, 3] normalised.
          patch_valid: [B, P] bool, patches that may be attended to; None for all.
          feature_layers: 0 for the state after the pre-norm, i for the state after layer i.

        Returns:
          [F, B, P + 1, D] in the order asked, class token first.
        """
        config = self.config
        bad = [layer for layer in feature_layers if not 0 <= layer <= config.layers]
        if bad:
            raise ValueError(f"Feature layers {bad} are not among 0..{config.layers}.")
        x = self.embed(pixels)
        mask = None
        if patch_valid is not None:
            mask = jnp.pad(patch_valid, ((0, 0), (1, 0)), constant_values=True)[:, None, None, :]  # [B, 1, 1, P + 1]
        captured = jnp.broadcast_to(x, (len(feature_layers), *x.shape))  # right for state 0; later ones overwrite
        numbers = jnp.arange(1, config.layers + 1)
        (_, captured), _ = self.layers((x, captured), numbers, jnp.asarray(feature_layers), mask)
        if config.has_final_norm and self.is_initializing():
            self.pool(x)
        return captured

    def pool(self, state: jax.Array) -> jax.Array:
        """The normed class state [B, D] of a last hidden state [B, P + 1, D]."""
        return self.final_norm(state[:, 0])
