"""Attention: one function for every network of the package, and the sum of attentions over several sets of keys.

B batch, T queries, S keys, N query heads, K key-value heads (N a multiple of K), G = N / K, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from pixelstory_jax.models.chunked_attention import attend_chunked
from pixelstory_jax.models.partitioning import automatic_axes, target_device
from pixelstory_jax.models.splash_attention import ATTENTION, splash_attention, splash_attention_with_normaliser

BACKENDS = ("xla", "chunked", "splash")
CHUNKED_FROM = 1 << 16  # scores (B * N * T * S) from which a CPU takes the chunked backend; fewer take no time
SPLASH_FROM = 512  # queries, and keys, from which a TPU takes its kernel

OTHER_ATTENTION = "other_attention"  # the scope of names around "chunked", for who counts operations

_preferred: ContextVar[str | None] = ContextVar("attention_backend", default=None)


@contextmanager
def attention_backend(name: str | None) -> Iterator[None]:
    """Everything that is traced inside takes this backend where a call names none; None chooses by device and size.

    A function that `jax.jit` has traced before keeps the backends of that time.

    Raises:
      ValueError: an unknown backend.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f'Unknown attention backend "{name}"; known are {", ".join(BACKENDS)}.')
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention, grouped-query when there are fewer key than query heads.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H].
      mask: bool, broadcastable to [B, N, T, S]; True where a query may attend. A row without any True gets the mean
        of all values (in "splash" of some values) rather than NaN.
      causal: queries attend only to keys up to their own index (the last query to the last key).
      backend: "xla" (all scores at once), "chunked" (the CPU's: some heads and queries at a time),
        "splash" (the TPU kernel; elsewhere it is interpreted, which only tests want) or None to choose.

    Returns:
      [B, T, N, H] in the dtype of `value`. Scores and softmax are float32.

    Raises:
      ValueError: heads that do not divide, an unknown backend, or a mask that the named backend cannot serve.
    """
    if _chosen(query, key, mask, causal, backend) == "splash":
        return splash_attention(*_with_one_panel(query, key, value, mask), causal)[:, 0]
    out, _ = attend_with_normaliser(query, key, value, mask=mask, causal=causal, backend=backend)
    return checkpoint_name(out, ATTENTION)


def attend_with_normaliser(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attend`, and the logarithm of each query's sum of exponentials, float32 [B, T, N], for `merge`.

    The splash kernel has no gradient here.
    """
    queries, heads = query.shape[1:3]
    keys, key_heads = key.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads.")
    backend = _chosen(query, key, mask, causal, backend)
    if backend == "splash":
        out, normaliser = splash_attention_with_normaliser(*_with_one_panel(query, key, value, mask), causal)
        return out[:, 0], normaliser[:, 0]
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:3], keys))
    if backend == "chunked":
        with jax.named_scope(OTHER_ATTENTION):
            return attend_chunked(query, key, value, mask, causal)
    if causal:
        order = jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + (keys - queries)
        mask = order[None, None] if mask is None else mask & order[None, None]
    return _attend(query, key, value, mask)


def choose_backend(scores: int, queries: int, keys: int) -> str:
    """The backend for so many scores (B * N * T * S) on the target device, or the one that is preferred here.

    On a TPU, XLA's plain form is bound by writing and reading the scores in HBM, at any length. The kernel has no
    such traffic, but pads to multiples of 128 and pays for each block that it starts: 77 text tokens or a single new
    token are better off without it.
    """
    preferred = _preferred.get()
    if preferred is not None:
        return preferred
    device = target_device()
    if device == "tpu" and min(queries, keys) >= SPLASH_FROM:
        return "splash"
    return "chunked" if device == "cpu" and scores >= CHUNKED_FROM and not automatic_axes() else "xla"


def _chosen(query: jax.Array, key: jax.Array, mask: jax.Array | None, causal: bool, backend: str | None) -> str:
    """The backend of a call. The kernel serves keys that are valid or not, and causal order; other masks go to XLA."""
    batch, queries, heads = query.shape[:3]
    keys = key.shape[1]
    served = (mask is None or mask.shape[1:] == (1, 1, keys)) and (queries <= keys or not causal)
    if backend is None:
        backend = choose_backend(batch * heads * queries * keys, queries, keys)
        return "xla" if backend == "splash" and not served else backend
    if backend not in BACKENDS:
        raise ValueError(f'Unknown attention backend "{backend}"; known are {", ".join(BACKENDS)}.')
    if backend == "splash" and not served:
        raise ValueError("The splash kernel serves masks [B or 1, 1, 1, S], and causal order for at most S queries.")
    return backend


def _with_one_panel(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Arguments for the splash kernel: query [B, 1, T, N, H], and which keys are valid [B, 1, S]."""
    valid = None if mask is None else jnp.broadcast_to(mask[:, 0], (len(query), 1, key.shape[1]))
    return query[:, None], key, value, valid


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Attention over the union of several sets of keys, from the attention over each: (out, normaliser) pairs."""
    share = jax.nn.softmax(jnp.stack([normaliser for _, normaliser in parts]), axis=0)[..., None]
    out = jnp.stack([out for out, _ in parts])
    return (out * share).sum(0).astype(out.dtype)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    key_heads, scale = key.shape[2], query.shape[3] ** -0.5
    query = rearrange(query, "b t (k g) h -> b t k g h", k=key_heads)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32) * scale
    if mask is not None:
        grouped = mask[:, :, None] if mask.shape[1] == 1 else rearrange(mask, "b (k g) t s -> b k g t s", k=key_heads)
        scores = jnp.where(grouped, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = rearrange(jnp.einsum("bkgts,bskh->btkgh", weights, value), "b t k g h -> b t (k g) h")
    return out, rearrange(jax.nn.logsumexp(scores, axis=-1), "b k g t -> b t (k g)")
