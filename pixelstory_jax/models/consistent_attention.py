"""Consistent self-attention: panels of a story see tokens of each other (arXiv 2405.01434, section 3.1).

One mechanism serves every way of sharing. Each panel attends to all of its own tokens and to *sampled* tokens of those
anchors that it `sees`. Anchors are panels of the same call (joint generation, replay, training) or come from a bank
that an earlier call has stored. A panel that sees nobody, or a layer whose gate is off, does plain self-attention.
Nothing is drawn here: samples, gates and who sees whom are arguments.

B = G A images of a call: G groups (one story in one half of classifier-free guidance each) of A panels; R anchors of a
group, N tokens of an image, K sampled tokens of an anchor, C width, H heads, D head width, L sharing layers, W window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from pixelstory_jax.models.attention import CHUNKED_FROM, attend_with_normaliser, merge
from pixelstory_jax.models.layers import Linear

Array = jax.Array | np.ndarray


@struct.dataclass
class Sample:
    """Which tokens of each anchor are shown.

    Attributes:
      valid: bool, [R, K] beside `index` or [R, N] without it.
      index: int32 [R, K], positions of the sampled tokens; keys and values are gathered. None: nothing is gathered,
        and tokens that are not `valid` are masked.
    """

    valid: Array
    index: Array | None = None

    def take(self, tokens: jax.Array) -> jax.Array:
        """The shown tokens [G, R, K, ...] of anchors [G, R, N, ...]."""
        if self.index is None:
            return tokens
        extra = tokens.ndim - 3
        return jnp.take_along_axis(tokens, self.index.reshape(1, *self.index.shape, *(1,) * extra), axis=2)


@struct.dataclass
class Sharing:
    """How the panels of one call share.

    Attributes:
      sees: bool [G or 1, A, R], whether panel a may see the sampled tokens of anchor r. Where the anchors are panels
        of this call, a panel that "sees" itself would meet its own tokens twice: leave the diagonal False.
      samples: tokens per image of a layer (N) -> the sample that all layers of this grid use.
      gates: bool [L], by layer in the order of calls; None for always on.
      bank: anchors stored by an earlier call, by name of the attention stack; None: the anchors are the first R panels
        of this call.
      store: whether the call returns what is needed as `bank` later (static).
      window: W > 0 for windows of so many panels that slide over the story (static); needs R = A and no bank.
    """

    sees: Array
    samples: Mapping[int, Sample]
    gates: Array | None = None
    bank: Mapping[str, jax.Array] | None = None
    store: bool = struct.field(pytree_node=False, default=False)
    window: int = struct.field(pytree_node=False, default=0)

    def stack(self, name: str, first_layer: int, layers: int) -> tuple[Any, Any]:
        """(gates, bank) of `layers` equal layers from number `first_layer`, with the layer axis in front."""
        gates = jnp.ones(layers, bool) if self.gates is None else self.gates[first_layer : first_layer + layers]
        return gates, None if self.bank is None else self.bank[name]


def see_each_other(panels: int) -> jax.Array:
    """[1, A, A]: every panel sees every other one."""
    return ~jnp.eye(panels, dtype=bool)[None]


def attend_to_anchors(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of every panel over the same shared keys, each panel with its own mask.

    Args:
      query: [G, A, N, H, D]. key, value: [G, S, H, D]. visible: bool [G or 1, A, S].

    Returns:
      out [G, A, N, H, D] and normaliser [G, A, N, H], as `attend_with_normaliser`. No mask of panels times tokens is
      built and no key is copied; where the scores are many, a CPU takes the panels one after another.
    """

    def one_panel(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return attend_with_normaliser(part[0], key, value, mask=part[1][:, None, None, :])

    by_panel = (jnp.swapaxes(query, 0, 1), jnp.swapaxes(visible, 0, 1))
    large = query.size // query.shape[-1] * key.shape[1] >= CHUNKED_FROM and jax.default_backend() == "cpu"
    parts = jax.lax.map(one_panel, by_panel) if large else jax.vmap(one_panel)(by_panel)
    out, normaliser = parts
    return jnp.swapaxes(out, 0, 1), jnp.swapaxes(normaliser, 0, 1)


def visible_keys(sees: jax.Array, sample: Sample, gate: jax.Array) -> jax.Array:
    """bool [G or 1, A, R * K]: which shown tokens each panel may attend to."""
    visible = sees[:, :, :, None] & sample.valid & gate  # [G, A, R, K]
    return rearrange(visible, "g a r k -> g a (r k)")


class SelfAttention(nn.Module):
    """Self-attention of an image transformer, shared between panels on demand.

    Attributes:
      width: C. heads: H. dtype: compute dtype.
      lora_rank, lora_alpha: low-rank additions to the four linear maps, see `Linear`.
    """

    width: int
    heads: int
    dtype: Any = jnp.float32
    lora_rank: int = 0
    lora_alpha: float = 1.0

    def setup(self) -> None:
        def linear(use_bias: bool) -> Linear:
            return Linear(self.width, use_bias, self.dtype, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)

        self.query, self.key, self.value = linear(False), linear(False), linear(False)
        self.out = linear(True)

    def split(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "... (h d) -> ... h d", h=self.heads)

    def __call__(
        self,
        x: jax.Array,
        sharing: Sharing | None = None,
        gate: jax.Array | None = None,
        bank: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends.

        Args:
          x: [B, N, C], normed tokens; B = G A with the group first.
          sharing: who sees whom; None for plain self-attention.
          gate: bool scalar, whether this layer shares. Needed with `sharing`.
          bank: [G, R, K or N, C], the anchors' shown tokens at this layer; None: from this call.

        Returns:
          [B, N, C], and what a bank keeps of this call: the normed tokens [G, A, K or N, C], or None.
        """
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        own = attend_with_normaliser(query, key, value)
        if sharing is None or gate is None:
            return self.out(rearrange(own[0], "b n h d -> b n (h d)")), None
        panels = sharing.sees.shape[1]
        sample = sharing.samples[x.shape[1]]

        def grouped(array: jax.Array) -> jax.Array:
            return rearrange(array, "(g a) ... -> g a ...", a=panels)

        query, key, value, tokens = grouped(query), grouped(key), grouped(value), grouped(x)
        own = grouped(own[0]), grouped(own[1])
        if sharing.window:
            out = self.windows(query, key, value, own, sharing, sample, gate)
        else:
            anchors = sharing.sees.shape[2]
            if bank is None:
                shown = sample.take(key[:, :anchors]), sample.take(value[:, :anchors])
            else:
                shown = self.split(self.key(bank)), self.split(self.value(bank))
            shown_key, shown_value = (rearrange(part, "g r k h d -> g (r k) h d") for part in shown)
            visible = visible_keys(jnp.asarray(sharing.sees), sample, gate)
            out = merge([own, attend_to_anchors(query, shown_key, shown_value, visible)])
        kept = sample.take(tokens) if sharing.store else None
        return self.out(rearrange(out, "g a n h d -> (g a) n (h d)")), kept

    def windows(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        own: tuple[jax.Array, jax.Array],
        sharing: Sharing,
        sample: Sample,
        gate: jax.Array,
    ) -> jax.Array:
        """Algorithm 1 of the paper: windows slide over the panels by one, results are averaged where they overlap.

        Its two slips are mended: the loop runs over panels (not tokens), and a panel does not meet its own tokens a
        second time in the pool. Memory depends on the window, not on the number of panels.
        """
        panels = query.shape[1]
        window, sees = min(sharing.window, panels), jnp.asarray(sharing.sees)

        def add_window(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            def part(array: Array, axis: int = 1) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), start, window, axis)

            inside = Sample(part(sample.valid, 0), None if sample.index is None else part(sample.index, 0))
            shown_key, shown_value = (
                rearrange(inside.take(part(array)), "g r k h d -> g (r k) h d") for array in (key, value)
            )
            visible = visible_keys(part(part(sees), 2), inside, gate)
            out = merge([(part(own[0]), part(own[1])), attend_to_anchors(part(query), shown_key, shown_value, visible)])
            return jax.lax.dynamic_update_slice_in_dim(total, part(total) + out, start, 1), None

        total, _ = jax.lax.scan(add_window, jnp.zeros_like(query), jnp.arange(panels - window + 1))
        panel = jnp.arange(panels)
        covered = jnp.minimum(jnp.minimum(panel + 1, panels - panel), jnp.minimum(window, panels - window + 1))
        return total / covered[:, None, None, None].astype(total.dtype)
