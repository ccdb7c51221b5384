"""CLIP's text transformer: the text encoders of Stable Diffusion 1.5 and SDXL (arXiv 2103.00020; spec of
StoryDiffusion, section 2).

B texts, T tokens, V ids, D width, N heads, H = D / N head width, F asked states, P projected width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.clip_vision import ACTIVATIONS, activate
from pixelstory_jax.models.layers import REMATS, LayerNorm, Linear, embedding_init, rematerialised
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

LARGEST_ID = 2  # released configs say that the end token is 2, which it is not: the largest id of a text is meant


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a text encoder.

    Attributes:
      vocab: number of token ids.
      length: number of positions, the longest text in tokens.
      activation: "quick_gelu" (OpenAI's CLIP) or "gelu" (exact; OpenCLIP).
      projection: width of the projected pooled state; 0 for no projection.
      eos_id: id of the end token, where a text is pooled: its first position. `LARGEST_ID` (2) pools at the first
        position of the text's largest id instead, as released configs mean it.
      dtype: compute dtype. Parameters, norms and softmax are float32.
      remat: "none" or a name of `layers.REMAT_POLICIES`.
    """

    vocab: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projection: int = 0
    eos_id: int = LARGEST_ID
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab", "length", "width", "layers", "heads", "mlp_width")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}.")
        if self.projection < 0:
            raise ValueError(f"projection is {self.projection}; a width is needed, or 0 for no projection.")
        if not 0 <= self.eos_id < max(self.vocab, LARGEST_ID + 1):
            raise ValueError(f"eos_id is {self.eos_id}; it must be one of the {self.vocab} ids, or {LARGEST_ID}.")
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "remat", REMATS)

    @classmethod
    def clip_large(cls, **changes: Any) -> ClipTextConfig:
        """Text encoder of CLIP ViT-L/14: Stable Diffusion 1.5, and the first encoder of SDXL."""
        return cls(**changes)

    @classmethod
    def open_clip_bigg(cls, **changes: Any) -> ClipTextConfig:
        """Text encoder of OpenCLIP ViT-bigG/14 with its projection: the second encoder of SDXL."""
        sizes = {"width": 1280, "layers": 32, "heads": 20, "mlp_width": 5120, "activation": "gelu", "projection": 1280}
        return cls(**{**sizes, **changes})

    @classmethod
    def tiny(cls, **changes: Any) -> ClipTextConfig:
        """For the vocabulary that ships with the package (`data.clip_tokenizer.small_clip_tokenizer`)."""
        sizes = {"vocab": 1024, "length": 24, "width": 64, "layers": 2, "heads": 4, "mlp_width": 256, "eos_id": 1023}
        return cls(**{**sizes, **changes})


class TextFeatures(NamedTuple):
    """What `ClipText` returns.

    Attributes:
      states: [B, T, D] of the layer asked for.
      pooled: [B, D] normed last state at the end token, or [B, P] its projection.
      captured: [F, B, T, D] of the feature layers, in the order asked.
    """

    states: jax.Array
    pooled: jax.Array
    captured: jax.Array


class TextAttention(nn.Module):
    config: ClipTextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        query, key, value = (
            rearrange(Linear(config.width, dtype=config.dtype, name=name)(x), "b t (n h) -> b t n h", n=config.heads)
            for name in ("query", "key", "value")
        )
        query, key, value = (constrain(heads, "batch", None, "tensor") for heads in (query, key, value))
        out = rearrange(attend(query, key, value, causal=True), "b t n h -> b t (n h)")
        return Linear(config.width, dtype=config.dtype, name="out")(out)


class TextMlp(nn.Module):
    config: ClipTextConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        hidden = activate(Linear(config.mlp_width, dtype=config.dtype, name="up")(x), config.activation)
        hidden = constrain(hidden, "batch", None, "tensor")
        return Linear(config.width, dtype=config.dtype, name="down")(hidden)


class TextLayer(nn.Module):
    """One pre-norm block, as a step of the scan over layers."""

    config: ClipTextConfig

    def setup(self) -> None:
        self.attention_norm = LayerNorm(self.config.norm_eps)
        self.attention = TextAttention(self.config)
        self.mlp_norm = LayerNorm(self.config.norm_eps)
        self.mlp = TextMlp(self.config)

    def block(self, x: jax.Array) -> jax.Array:
        x = constrain(x + self.attention(self.attention_norm(x)), "batch")
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch")

    def __call__(
        self, carry: tuple[jax.Array, jax.Array], number: jax.Array, wanted: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """`carry` is the state and what was captured; the result is copied into the slots that want this layer."""
        x, captured = carry
        x = rematerialised(TextLayer.block, self.config.remat)(self, x)
        asked = (wanted == number)[:, None, None, None]
        return (x, jnp.where(asked, x[None], captured)), None


class ClipText(nn.Module):
    """The encoder. Token ids in, states and a pooled vector out."""

    config: ClipTextConfig

    def setup(self) -> None:
        config = self.config
        self.token_embedding = self.param("token_embedding", embedding_init, (config.vocab, config.width))
        self.position_embedding = self.param("position_embedding", embedding_init, (config.length, config.width))
        self.layers = nn.scan(
            TextLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=config.layers,
        )(config)
        self.final_norm = LayerNorm(config.norm_eps)
        if config.projection:
            self.projection = Linear(config.projection, use_bias=False, dtype=config.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Ids [B, T] to the sum of token and position embeddings [B, T, D]; ids beyond the vocabulary give NaN."""
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] > config.length:
            raise ValueError(f"Tokens of shape {tokens.shape}; this encoder takes [B, T] with T up to {config.length}.")
        x = jnp.take(self.token_embedding, tokens, axis=0) + self.position_embedding[: tokens.shape[1]]
        return constrain(x.astype(config.dtype), "batch")

    def end_positions(self, tokens: jax.Array) -> jax.Array:
        """Where each text is pooled, [B]; the first position where the end token is absent (as in transformers)."""
        if self.config.eos_id == LARGEST_ID:
            return tokens.argmax(axis=1)
        return (tokens == self.config.eos_id).argmax(axis=1)

    def __call__(self, tokens: jax.Array, layer: int = -1, feature_layers: tuple[int, ...] = ()) -> TextFeatures:
        """States of one layer, the pooled vector, and the states of any further layers.

        Every token sees itself and the tokens before it; padding is not masked, as in the released encoders.

        Args:
          tokens: [B, T] ids.
          layer: which states to return, counted from the end: -1 for all layers and the final norm (Stable Diffusion
            1.5), -2 for the last but one layer without norm (SDXL), and so on.
          feature_layers: what to capture, counted from the start: 0 for the embeddings, i for the state after layer i;
            no norm.

        Raises:
          ValueError: tokens of another shape, or layers that the encoder does not have.
        """
        config = self.config
        if not -config.layers - 1 <= layer <= -1:
            raise ValueError(f"Layer {layer} is not among {-config.layers - 1}..-1.")
        bad = [number for number in feature_layers if not 0 <= number <= config.layers]
        if bad:
            raise ValueError(f"Feature layers {bad} are not among 0..{config.layers}.")
        x = self.embed(tokens)
        wanted = jnp.asarray([config.layers + 1 + layer, *feature_layers])
        captured = jnp.broadcast_to(x, (len(wanted), *x.shape))  # right for state 0; later ones overwrite
        (x, captured), _ = self.layers((x, captured), jnp.arange(1, config.layers + 1), wanted)
        last = self.final_norm(x)
        pooled = jnp.take_along_axis(last, self.end_positions(tokens)[:, None, None], axis=1)[:, 0]
        if config.projection:
            pooled = self.projection(pooled)
        return TextFeatures(last if layer == -1 else captured[0], pooled, captured[1:])
