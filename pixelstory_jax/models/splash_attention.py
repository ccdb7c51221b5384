"""JAX's splash attention, a Pallas kernel for TPUs: scores never leave a chip's fast memory, forward or backward.

G groups (or images), A panels of a group with the same keys (1 in plain attention), T queries, S keys, N query heads,
K key-value heads (N a multiple of K), H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import PartitionSpec

from pixelstory_jax.models.partitioning import automatic_axes, split, target_device

LANES = 128  # of a TPU's vector unit; lengths are padded to multiples
# A block of queries reads all keys from HBM once, so its length is the operations per byte: 512 is twice what a v5e
# needs to be bound by its matrix unit (197 TFLOP/s over 819 GB/s), and more would only pad short sequences further.
# Longer blocks of keys mean fewer passes over the queries in the backward pass.
QUERY_BLOCK, KEY_BLOCK = 512, 1024
WIDE = 256  # head width from which (the autoencoder has one head of 512) only blocks of half the length fit beside it
FUSED_UP_TO = 12  # blocks of keys: a story of four panels of 1024 px that share half their tokens
ATTENTION = "attention"  # name of what a remat policy may keep: the result, and the normaliser of the backward pass


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None = None, causal: bool = False
) -> jax.Array:
    """Attention of queries over those keys of their group that are valid for their panel. Differentiable.

    A Pallas call is opaque to the compiler's partitioner. Under a mesh each chip therefore runs the kernel on its own
    part: groups and panels over the batch axes and heads over `tensor`, as far as they divide.

    Args:
      query: [G, A, T, N, H]. key, value: [G, S, K, H].
      valid: bool [G, A, S]; None for all keys.
      causal: the last query sees up to the last key; needs T <= S.

    Returns:
      [G, A, T, N, H]. Rows that see no key are finite and mean nothing.
    """
    return _on_each_chip(query, key, value, valid, causal, with_normaliser=False)


def splash_attention_with_normaliser(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None = None, causal: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same and the logarithm of the sums of exponentials, float32 [G, A, T, N]; the kernel has no gradient here."""
    return _on_each_chip(query, key, value, valid, causal, with_normaliser=True)


def _on_each_chip(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None, causal: bool, with_normaliser: bool
) -> Any:
    run = partial(_run, causal=causal, with_normaliser=with_normaliser)
    if not automatic_axes():
        return run(query, key, value, valid)
    groups, panels = split(query.shape[:2])
    (heads,) = split(key.shape[2:3], "tensor")
    queries, keys = PartitionSpec(groups, panels, None, heads), PartitionSpec(groups, None, heads)
    return jax.shard_map(
        run,
        in_specs=(queries, keys, keys, PartitionSpec(groups, panels)),
        out_specs=queries,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )(query, key, value, valid)


def _run(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array | None, causal: bool, with_normaliser: bool
) -> Any:
    """The kernel on one chip, on padded arrays with the heads in front of the tokens."""
    queries, keys, heads, width = query.shape[2], key.shape[1], *query.shape[3:]
    smaller = 2 if width > WIDE else 1
    query_block, key_block = block(queries, QUERY_BLOCK // smaller), block(keys, KEY_BLOCK // smaller)
    more_queries, more_keys = -queries % query_block, -keys % key_block
    kernel = _kernel(heads, queries, keys, query_block, key_block, causal, with_normaliser)
    if valid is None and more_keys and not causal:  # a causal mask hides the padding, which comes last
        valid = jnp.ones((*query.shape[:2], keys), bool)

    def one_panel(query: jax.Array, key: jax.Array, value: jax.Array, segment: jax.Array | None) -> Any:
        """[N, T, H], [K, S, H] and [S]. Queries are of segment 1, hidden keys of segment 0."""
        ones = jnp.ones(queries + more_queries, jnp.int32)
        return kernel(query, key, value, None if segment is None else SegmentIds(ones, segment))

    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    by_head = jnp.pad(rearrange(scaled, "g a t n h -> g a n t h"), (*((0, 0),) * 3, (0, more_queries), (0, 0)))
    key, value = (
        jnp.pad(rearrange(x, "g s k h -> g k s h"), ((0, 0), (0, 0), (0, more_keys), (0, 0))) for x in (key, value)
    )
    segment = None if valid is None else jnp.pad(valid.astype(jnp.int32), ((0, 0), (0, 0), (0, more_keys)))
    # The keys of a group have no panel axis: they are not copied for each panel.
    result = jax.vmap(jax.vmap(one_panel, (0, None, None, 0)))(by_head, key, value, segment)
    out = result[0] if with_normaliser else result
    out = rearrange(out[..., :queries, :], "g a n t h -> g a t n h").astype(value.dtype)
    if not with_normaliser:
        return out
    return out, rearrange(result[1][0][..., :queries], "g a n t -> g a t n")


def _kernel(
    heads: int, queries: int, keys: int, query_block: int, key_block: int, causal: bool, with_normaliser: bool
) -> Callable[..., Any]:
    """The kernel for [heads, padded queries, H]; it skips blocks that lie wholly after the causal diagonal."""
    shape = (queries + -queries % query_block, keys + -keys % key_block)
    mask = CausalMask(shape, keys - queries) if causal else FullMask(shape)
    # One backward pass for all three gradients has five products of scores instead of seven, but keeps a gradient of
    # the queries for each block of keys.
    fused = shape[1] // key_block <= FUSED_UP_TO
    sizes = BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_q_dq=None if fused else query_block,
        block_kv_dq=None if fused else key_block,
        use_fused_bwd_kernel=fused,
    )
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        save_residuals=with_normaliser,
        residual_checkpoint_name=ATTENTION,
        interpret=target_device() != "tpu",
    )


def block(length: int, largest: int) -> int:
    """Tokens of a block: the multiple of 128 up to `largest` that pads `length` least; of equals, the longest."""
    units = -(-length // LANES)
    sizes = range(max(1, largest // LANES // 4), largest // LANES + 1)
    return LANES * min(sizes, key=lambda size: (-(-units // size) * size, -size))
