"""LLaMA (arXiv 2302.13971, 2307.09288): RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional LoRA.

B sequences, T positions, M slots of the cache, D width, N query heads, K key-value heads, H head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.layers import REMATS, Linear, RMSNorm, embedding_init, rematerialised, wide_times
from pixelstory_jax.models.partitioning import constrain, target_device
from pixelstory_jax.models.sizes import DTYPES, check_choice, check_sizes

Cache = Any  # "key" and "value", each [layers, B, K, M, H]; of a model that is not stacked [B, K, M, H] for each layer
PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank additions: rank 0 for none, scale alpha / rank, on the projections named in `targets`."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; 0 is the least, for no LoRA.")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown:
            raise ValueError(f"Unknown LoRA targets {unknown}; known are {list(PROJECTIONS)}.")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a language model. `kv_heads` below `heads` is grouped-query attention.

    `max_length` is the longest sequence that the model is meant for; rotary positions have no table, so it only guides
    data and caches. `dtype` is the compute dtype (parameters, norms, softmax and logits are float32), `remat` is
    "none" or a name of `layers.REMAT_POLICIES`.
    """

    vocab: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_width: int = 11008
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_length: int = 2048
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        check_sizes(self, "vocab", "width", "layers", "heads", "kv_heads", "mlp_width", "max_length")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} do not divide one another."
            )
        check_choice(self, "dtype", DTYPES)
        check_choice(self, "remat", REMATS)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @classmethod
    def llama_7b(cls, **changes: Any) -> LlamaConfig:
        """LLaMA 7B, the first version: eps 1e-6, 2048 tokens."""
        return cls(**{"dtype": "bfloat16", "remat": "full", **changes})

    @classmethod
    def llama_13b(cls, **changes: Any) -> LlamaConfig:
        """Llama 2 13B, which PixelLM-13B is made of: eps 1e-5, 4096 tokens."""
        sizes: dict[str, Any] = {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp_width": 13824}
        sizes |= {"norm_eps": 1e-5, "max_length": 4096}
        return cls.llama_7b(**{**sizes, **changes})


def empty_cache(config: LlamaConfig, batch: int, slots: int) -> Cache:
    """A cache of zeros for `batch` sequences of at most `slots` tokens, for a stacked model."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_width)
    return {"key": jnp.zeros(shape, config.dtype), "value": jnp.zeros(shape, config.dtype)}


def for_decoding(config: LlamaConfig, params: Any, cache: Cache) -> tuple[Llama, Any, Cache]:
    """Model, parameters and cache for a loop over new tokens, to be made before it within the compiled function.

    On a CPU the layers are taken apart: a scan over them would copy the weights of each from the stack for every token,
    which takes longer than to multiply by them. It costs the memory of the layers once more.
    """
    if target_device() != "cpu":
        return Llama(config), params, cache

    def apart(stack: Any) -> list[Any]:
        return [jax.tree.map(itemgetter(number), stack) for number in range(config.layers)]

    layers = {f"layers_{number}": layer for number, layer in enumerate(apart(params["layers"]))}
    rest = {name: values for name, values in params.items() if name != "layers"}
    return Llama(config, stacked=False), rest | layers, apart(cache)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions, half-split convention: x [B, T, N, H], positions [B, T]. Angles in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def projection(config: LlamaConfig, name: str, features: int) -> Linear:
    lora = config.lora
    return Linear(
        features,
        use_bias=False,
        dtype=config.dtype,
        lora_rank=lora.rank if name in lora.targets else 0,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
    )


def fold(rng: jax.Array | None, number: int) -> jax.Array | None:
    return None if rng is None else jax.random.fold_in(rng, number)


class LlamaAttention(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.query = projection(config, "query", config.heads * config.head_width)
        self.key = projection(config, "key", config.kv_heads * config.head_width)
        self.value = projection(config, "value", config.kv_heads * config.head_width)
        self.out = projection(config, "out", config.width)

    def project(
        self, x: jax.Array, positions: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H] of x [B, T, D]; queries and keys rotated."""
        theta, width = self.config.rope_theta, self.config.head_width
        query = rearrange(self.query(x, fold(rng, 0)), "b t (n h) -> b t n h", h=width)
        key = rearrange(self.key(x, fold(rng, 1)), "b t (k h) -> b t k h", h=width)
        value = rearrange(self.value(x, fold(rng, 2)), "b t (k h) -> b t k h", h=width)
        query, key, value = (constrain(heads, "batch", None, "tensor") for heads in (query, key, value))
        return rotate(query, positions, theta), rotate(key, positions, theta), value

    def finish(self, attended: jax.Array, rng: jax.Array | None) -> jax.Array:
        return self.out(rearrange(attended, "b t n h -> b t (n h)"), fold(rng, 3))


class LlamaMlp(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        self.gate = projection(self.config, "gate", self.config.mlp_width)
        self.up = projection(self.config, "up", self.config.mlp_width)
        self.down = projection(self.config, "down", self.config.width)

    def __call__(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        hidden = jax.nn.silu(self.gate(x, fold(rng, 4))) * self.up(x, fold(rng, 5))
        return self.down(constrain(hidden, "batch", None, "tensor"), fold(rng, 6))


class LlamaLayer(nn.Module):
    """One block, as a step of the scan over layers."""

    config: LlamaConfig

    def setup(self) -> None:
        self.attention_norm = RMSNorm(self.config.norm_eps)
        self.attention = LlamaAttention(self.config)
        self.mlp_norm = RMSNorm(self.config.norm_eps)
        self.mlp = LlamaMlp(self.config)

    def block(self, x: jax.Array, key_valid: jax.Array, positions: jax.Array, rng: jax.Array | None) -> jax.Array:
        query, key, value = self.attention.project(self.attention_norm(x), positions, rng)
        attended = attend(query, key, value, mask=key_valid[:, None, None, :], causal=True)
        x = constrain(x + self.attention.finish(attended, rng), "batch")
        return constrain(x + self.mlp(self.mlp_norm(x), rng), "batch")

    def cached_block(
        self, x: jax.Array, cache: Cache, layer: jax.Array, index: jax.Array, key_valid: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The block, with its keys and values written to the cache of all layers."""
        query, key, value = self.attention.project(self.attention_norm(x), positions, None)
        rows = {name: rearrange(new, "b t k h -> 1 b k t h") for name, new in (("key", key), ("value", value))}
        cache = {name: jax.lax.dynamic_update_slice(cache[name], rows[name], (layer, 0, 0, index, 0)) for name in rows}
        slots = jnp.arange(key_valid.shape[1])
        past = slots[None, :] <= index + jnp.arange(x.shape[1])[:, None]  # [T, M]
        mask = key_valid[:, None, None, :] & past[None, None]
        keys, values = (rearrange(cache[name][layer], "b k m h -> b m k h") for name in ("key", "value"))
        x = constrain(x + self.attention.finish(attend(query, keys, values, mask=mask), None), "batch")
        return constrain(x + self.mlp(self.mlp_norm(x), None), "batch"), cache

    def own_cached_block(
        self, x: jax.Array, cache: Cache, index: jax.Array, key_valid: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """The block with a cache of its own."""
        stack = jax.tree.map(lambda leaf: leaf[None], cache)
        x, stack = self.cached_block(x, stack, jnp.int32(0), index, key_valid, positions)
        return x, jax.tree.map(lambda leaf: leaf[0], stack)

    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: jax.Array,
        rng: jax.Array | None,
        index: jax.Array | None,
        key_valid: jax.Array,
        positions: jax.Array,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x, cache = carry
        if cache is None or index is None:
            return (rematerialised(LlamaLayer.block, self.config.remat)(self, x, key_valid, positions, rng), None), None
        return self.cached_block(x, cache, layer, index, key_valid, positions), None


class Llama(nn.Module):
    """The language model. Its parts are separate methods, because images enter between `embed` and the layers.

    Parameters of the layers are stacked and scanned over. Without `stacked` each layer has its own ("layers_0", ...),
    and its own cache: see `for_decoding`.
    """

    config: LlamaConfig
    stacked: bool = True

    def setup(self) -> None:
        config = self.config
        self.embedding = self.param("embedding", embedding_init, (config.vocab, config.width))
        scan = nn.scan(
            LlamaLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.layers,
        )
        self.layers: Any = scan(config) if self.stacked else [LlamaLayer(config) for _ in range(config.layers)]
        self.final_norm = RMSNorm(config.norm_eps)
        self.head = self.param("head", embedding_init, (config.width, config.vocab))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Ids [...] of 0..V-1 to vectors [..., D] in the compute dtype."""
        vectors = jnp.take(self.embedding, tokens, axis=0, mode="clip").astype(self.config.dtype)
        return constrain(vectors, "batch")

    def __call__(
        self,
        embeddings: jax.Array,
        key_valid: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        cache_index: jax.Array | int | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The layers and the final norm, causal.

        Args:
          embeddings: [B, T, D].
          key_valid: bool, keys that may be attended to: [B, T], or with a cache [B, M] for all its slots.
          positions: int [B, T] for the rotation; default 0..T-1 (with a cache, counted from `cache_index`).
          cache: keys and values of earlier tokens; the new ones are written to slots cache_index..cache_index+T-1 and a
            token attends to slots up to its own.
          dropout_rng: key for LoRA dropout; None for none. Not used with a cache.

        Returns:
          Hidden states [B, T, D] after the final norm, and the new cache (None without one).
        """
        config = self.config
        batch, length = embeddings.shape[:2]
        index = None if cache is None else jnp.asarray(0 if cache_index is None else cache_index, jnp.int32)
        if positions is None:
            positions = jnp.arange(length)[None, :] + (0 if index is None else index)
        positions = jnp.broadcast_to(positions, (batch, length))
        if not self.stacked:
            return self._layer_by_layer(embeddings.astype(config.dtype), cache, index, key_valid, positions)
        rngs = None if dropout_rng is None else jax.random.split(dropout_rng, config.layers)
        carry = (constrain(embeddings.astype(config.dtype), "batch"), cache)
        (x, cache), _ = self.layers(carry, jnp.arange(config.layers), rngs, index, key_valid, positions)
        return self.final_norm(x), cache

    def _layer_by_layer(self, x: jax.Array, cache: Cache, *arguments: Any) -> tuple[jax.Array, Cache]:
        caches = []
        for layer, own in zip(self.layers, cache, strict=True):
            x, own = layer.own_cached_block(x, own, *arguments)
            caches.append(own)
        return self.final_norm(x), caches

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] to [..., V] float32."""
        logits = wide_times(hidden.astype(self.config.dtype), self.head.astype(self.config.dtype))
        return constrain(logits, "batch", *(None,) * (logits.ndim - 2), "tensor")

    def whole(self, tokens: jax.Array, key_valid: jax.Array) -> jax.Array:
        """Logits [B, T, V] of plain text: `embed`, the layers and `logits` in one call (also what `init` needs)."""
        return self.logits(self(self.embed(tokens), key_valid)[0])
