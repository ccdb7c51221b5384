"""Attention on a CPU: some heads and some of their queries at a time.

With the heads in front, XLA hands products, mask (as an addend) and softmax to a library of fused CPU kernels; and as
long as the scores made at a time are few, they stay in the cache. So a large attention is a loop over heads, and in it
over parts of the queries. Scores are not kept: the backward pass makes them again (flash attention, arXiv 2205.14135).
There they lie with keys in front, because then none of its five products needs a transposed copy of them.

B images, K key-value heads, G query heads of each, N = K G, T queries, S keys, H head width; P = B K heads in all with
R = T G rows of queries each; p of them at a time, r rows of a part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

SCORES = 1 << 20  # scores made at a time: 4 MB of float32
ROWS = 128  # of a part, at least
CAUSAL_PARTS = 8  # of a causal attention, at most: each is a part of the program, with its own number of keys
HIDDEN = jnp.finfo(jnp.float32).min / 2  # added to a score it is itself, and two of them are finite

Arrays = tuple[jax.Array, ...]
Order = tuple[int, int] | None  # of causal attention: see `_in_order`
Part = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]  # rows, keys and values, masks: results by row, sums


def attend_chunked(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention part by part, in float32.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H].
      mask: bool [B or 1, N or 1, T or 1, S].
      causal: queries attend only to keys up to their own index (the last query to the last key).

    Returns:
      out [B, T, N, H] in the dtype of `value`, and the logarithm of each sum of exponentials, float32 [B, T, N].
    """
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    groups, dtype = heads // key_heads, value.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    query = rearrange(query * width**-0.5, "b t (k g) h -> (b k) (t g) h", k=key_heads)
    key, value = (rearrange(x, "b s k h -> (b k) s h") for x in (key, value))
    masks = () if mask is None else (_by_row(mask, batch, queries, key_heads, groups),)
    order = (keys - queries, groups) if causal else None
    out, normaliser = _attend(order, query, key, value, masks)
    if causal:  # a query that sees nothing gets the mean of all values, not of those that its part has
        out = jnp.where((normaliser <= HIDDEN)[..., None], value.mean(1, keepdims=True), out)
    out = rearrange(out, "(b k) (t g) h -> b t (k g) h", b=batch, g=groups)
    return out.astype(dtype), rearrange(normaliser, "(b k) (t g) -> b t (k g)", b=batch, g=groups)


def _by_row(mask: jax.Array, batch: int, queries: int, key_heads: int, groups: int) -> jax.Array:
    """[B or 1, N or 1, T or 1, S] as [P or 1, R or 1, S]: a mask of padding is not repeated for every row."""
    images, heads, length, keys = mask.shape
    mask = mask[:, :, None] if heads == 1 else rearrange(mask, "b (k g) t s -> b k g t s", k=key_heads)
    by_head, by_row = images > 1 or heads > 1, length > 1 or mask.shape[2] > 1
    shape = (batch, key_heads) if by_head else (1, 1), (groups, queries) if by_row else (1, 1)
    return rearrange(jnp.broadcast_to(mask, (*shape[0], *shape[1], keys)), "b k g t s -> (b k) (t g) s")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    order: Order, query: jax.Array, key: jax.Array, value: jax.Array, masks: Arrays
) -> tuple[jax.Array, jax.Array]:
    """query [P, R, H], scaled; key, value [P, S, H]; masks [P or 1, R or 1, S], all of which must be True."""
    out, top, total = _forward(order, query, key, value, masks)
    return out, top + jnp.log(total)


def _forward(order: Order, query: jax.Array, key: jax.Array, value: jax.Array, masks: Arrays) -> tuple[jax.Array, ...]:
    """The result, and for each row its largest score and the sum of exponentials relative to that."""

    def part(rows: Arrays, key_value: Arrays, masks: Arrays) -> tuple[Arrays, Arrays]:
        (query,), (key, value) = rows, key_value
        scores = jnp.einsum("prh,psh->prs", query, key)
        for mask in masks:
            scores += jnp.where(mask, 0, HIDDEN)
        top = scores.max(-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        return (jnp.einsum("prs,psh->prh", weights, value) / total[..., None], top, total), ()

    return _by_heads(part, order, (query,), (key, value), masks)[0]


def _attend_forward(order: Order, query: jax.Array, key: jax.Array, value: jax.Array, masks: Arrays) -> tuple[Any, Any]:
    out, top, total = _forward(order, query, key, value, masks)
    return (out, top + jnp.log(total)), (query, key, value, masks, out, top, total)


def _attend_backward(order: Order, kept: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """With weights P: dV = P' dO, dS = P * (dO V' - rows(dO * O) + d normaliser), dQ = dS K, dK = dS' Q."""
    query, key, value, masks, out, top, total = kept
    d_out, d_normaliser = gradients
    shift = (d_normaliser - (d_out * out).sum(-1)) / total
    d_out = d_out / total[..., None]  # then exponentials serve as P
    sees = (top > HIDDEN).astype(jnp.float32)[..., None]  # 0 where there is no key: the scores do not matter

    def part(rows: Arrays, key_value: Arrays, masks: Arrays) -> tuple[Arrays, Arrays]:
        (query, query_seeing, top, shift, d_out), (key, value) = rows, key_value
        scores = jnp.einsum("psh,prh->psr", key, query)
        for mask in masks:
            scores += jnp.where(jnp.swapaxes(mask, 1, 2), 0, HIDDEN)
        weights = jnp.exp(scores - top[:, None])
        d_scores = weights * (jnp.einsum("psh,prh->psr", value, d_out) + shift[:, None])
        d_query = jnp.einsum("phs,psr->phr", jnp.swapaxes(key, 1, 2), d_scores)
        d_key = jnp.einsum("psr,prh->psh", d_scores, query_seeing)
        return (jnp.swapaxes(d_query, 1, 2),), (d_key, jnp.einsum("psr,prh->psh", weights, d_out))

    rows = (query, query * sees, top, shift, d_out)
    (d_query,), (d_key, d_value) = _by_heads(part, order, rows, (key, value), masks)
    return d_query * sees, d_key, d_value, None


_attend.defvjp(_attend_forward, _attend_backward)


def _by_heads(part: Part, order: Order, rows: Arrays, key_value: Arrays, masks: Arrays) -> tuple[Arrays, Arrays]:
    """`part` on as many heads at a time as have SCORES scores together, but on two at least: results and sums.

    Alone, a head's axis of 1 is dropped by XLA, and with it what fuses a product and its softmax.
    """
    heads, scores = len(rows[0]), rows[0].shape[1] * key_value[0].shape[1]
    size = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(2, SCORES // scores))
    by_part = _by_part if order is None else partial(_in_order, *order)
    if size == heads:
        return by_part(part, rows, key_value, masks)

    def some(start: jax.Array) -> tuple[Arrays, Arrays]:
        def at(array: jax.Array) -> jax.Array:
            return array if len(array) == 1 else jax.lax.dynamic_slice_in_dim(array, start, size)

        return by_part(part, *jax.tree.map(at, (rows, key_value, masks)))

    results = jax.lax.map(some, jnp.arange(0, heads, size))
    return jax.tree.map(lambda result: result.reshape(heads, *result.shape[2:]), results)


def _by_part(part: Part, rows: Arrays, key_value: Arrays, masks: Arrays) -> tuple[Arrays, Arrays]:
    """`part` on some rows of arrays [p, R, ...] at a time: what it gives for them, and the total of its sums."""
    length = rows[0].shape[1]
    parts = -(-length // max(ROWS, SCORES // (len(rows[0]) * key_value[0].shape[1])))
    if parts == 1:
        return part(rows, key_value, masks)
    size = -(-length // parts)  # parts of equal size, so that hardly any padding is computed

    def split(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, parts * size - length)] + [(0, 0)] * (array.ndim - 2)
        return rearrange(jnp.pad(array, padding), "p (c r) ... -> c p r ...", c=parts)

    fixed = tuple(mask for mask in masks if mask.shape[1] == 1)
    moving = tuple(split(mask) for mask in masks if mask.shape[1] > 1)

    def add(sums: Arrays, some: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
        results, more = part(some[0], key_value, fixed + some[1])
        return jax.tree.map(jnp.add, sums, more), results

    some = (tuple(map(split, rows)), moving)
    first = jax.eval_shape(lambda some: part(some[0], key_value, fixed + some[1]), jax.tree.map(lambda x: x[0], some))
    sums, results = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, first[1]), some)
    return jax.tree.map(lambda x: rearrange(x, "c p r ... -> p (c r) ...")[:, :length], results), sums


def _in_order(
    lead: int, groups: int, part: Part, rows: Arrays, key_value: Arrays, masks: Arrays
) -> tuple[Arrays, Arrays]:
    """`_by_part` of a causal attention: row i sees keys up to i // groups + lead, and no part multiplies others."""
    length, keys = rows[0].shape[1], key_value[0].shape[1]
    size = -(-length // max(1, min(CAUSAL_PARTS, length // ROWS)))
    results, sums = [], []
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = max(1, (stop - 1) // groups + lead + 1)
        order = jnp.arange(seen) <= jnp.arange(start, stop)[:, None] // groups + lead
        some = [mask[:, start:stop, :seen] if mask.shape[1] > 1 else mask[:, :, :seen] for mask in masks]
        result, more = part(
            tuple(x[:, start:stop] for x in rows), tuple(x[:, :seen] for x in key_value), (order[None], *some)
        )
        results.append(result)
        sums.append(tuple(jnp.pad(x, ((0, 0), (0, keys - seen), (0, 0))) for x in more))
    return (
        tuple(jnp.concatenate(parts, axis=1) for parts in zip(*results, strict=True)),
        tuple(sum(parts) for parts in zip(*sums, strict=True)),
    )
