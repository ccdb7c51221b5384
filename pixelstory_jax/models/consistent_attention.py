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
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from pixelstory_jax.models.attention import attend, attend_with_normaliser, choose_backend, merge
from pixelstory_jax.models.layers import Linear
from pixelstory_jax.models.partitioning import constrain, split
from pixelstory_jax.models.splash_attention import splash_attention, splash_attention_with_normaliser

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


def attend_to_own_and_shown(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shown_key: jax.Array,
    shown_value: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """Attention of every panel over its own tokens and those that it may see of the shared ones.

    Args:
      query, key, value: [G, A, N, H, D]. shown_key, shown_value: [G, S, H, D]. visible: bool [G or 1, A, S].

    Returns:
      [G, A, N, H, D]. No mask of panels times tokens is built and no shared key is copied for each panel.
    """
    groups, panels, tokens, heads = query.shape[:4]
    shown = shown_key.shape[1]
    backend = choose_backend(groups * panels * heads * tokens * shown, tokens, shown)
    if backend == "splash":
        visible = jnp.broadcast_to(visible, (groups, panels, shown))
        return _splash_own_and_shown(query, key, value, shown_key, shown_value, visible)
    if backend == "chunked":
        return _panel_by_panel(query, key, value, shown_key, shown_value, visible)
    own = attend_within_panels(query, key, value)
    return merge([own, attend_to_shown(query, shown_key, shown_value, visible)])


def attend_within_panels(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Plain self-attention of [G, A, N, H, D]: out of the same shape, and normaliser [G, A, N, H]."""
    flat = (rearrange(x, "g a n h d -> (g a) n h d") for x in (query, key, value))
    out, normaliser = attend_with_normaliser(*flat)
    return out.reshape(query.shape), normaliser.reshape(query.shape[:-1])


def attend_to_shown(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of every panel over the same shared keys, each panel with its own mask.

    Args:
      query: [G, A, N, H, D]. key, value: [G, S, H, D]. visible: bool [G or 1, A, S].

    Returns:
      out [G, A, N, H, D] and normaliser [G, A, N, H], as `attend_with_normaliser`.
    """
    groups, panels, tokens, heads = query.shape[:4]
    shown = key.shape[1]
    backend = choose_backend(groups * panels * heads * tokens * shown, tokens, shown)
    if backend == "splash":
        visible = jnp.broadcast_to(visible, (groups, panels, shown))
        return splash_attention_with_normaliser(query, key, value, visible)

    def one_panel(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return attend_with_normaliser(part[0], key, value, mask=part[1][:, None, None, :])

    by_panel = (jnp.swapaxes(query, 0, 1), jnp.swapaxes(visible, 0, 1))
    out, normaliser = jax.lax.map(one_panel, by_panel) if backend == "chunked" else jax.vmap(one_panel)(by_panel)
    return jnp.swapaxes(out, 0, 1), jnp.swapaxes(normaliser, 0, 1)


def _panel_by_panel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shown_key: jax.Array,
    shown_value: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """`attend_to_own_and_shown` on a CPU: one attention for each panel, to its own keys and then the shared ones.

    The keys of one panel at a time are laid side by side, so that there is nothing to merge.
    """

    def one_panel(panel: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, visible = panel
        keys, values = (jnp.concatenate(x, axis=1) for x in ((key, shown_key), (value, shown_value)))
        seen = jnp.pad(visible, ((0, 0), (key.shape[1], 0)), constant_values=True)  # [G or 1, N + S]
        return attend(query, keys, values, mask=seen[:, None, None], backend="chunked")

    by_panel = tuple(jnp.swapaxes(x, 0, 1) for x in (query, key, value, visible))
    return jnp.swapaxes(jax.lax.map(one_panel, by_panel), 0, 1)


@jax.custom_vjp
def _splash_own_and_shown(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shown_key: jax.Array,
    shown_value: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    """`attend_to_own_and_shown` with the TPU kernel, which gives either normalisers or gradients.

    Without gradients the two attentions are merged and shared keys stay uncopied, however many panels there are. With
    gradients each panel's own keys and the shared ones are laid side by side: B (N + S) keys and values beside the
    B N that there are anyway, 2 A N of each for a story of four panels that share half their tokens.
    """
    own = attend_within_panels(query, key, value)
    return merge([own, splash_attention_with_normaliser(query, shown_key, shown_value, visible)])


def _splash_side_by_side(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shown_key: jax.Array,
    shown_value: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    def beside(own: jax.Array, shown: jax.Array) -> jax.Array:
        for_each_panel = jnp.broadcast_to(shown[:, None], (*own.shape[:2], *shown.shape[1:]))
        return rearrange(jnp.concatenate([own, for_each_panel], axis=2), "g a s h d -> (g a) s h d")

    valid = jnp.concatenate([jnp.ones(query.shape[:3], bool), visible], axis=2)
    flat = rearrange(query, "g a n h d -> (g a) 1 n h d"), beside(key, shown_key), beside(value, shown_value)
    return splash_attention(*flat, rearrange(valid, "g a s -> (g a) 1 s")).reshape(query.shape)


def _splash_forward(*arguments: Any) -> tuple[jax.Array, Any]:
    *differentiable, visible = arguments
    return jax.vjp(partial(_splash_side_by_side, visible=visible), *differentiable)


def _splash_backward(pull_back: Any, of_out: jax.Array) -> tuple[jax.Array | None, ...]:
    return *pull_back(of_out), None


_splash_own_and_shown.defvjp(_splash_forward, _splash_backward)


def visible_keys(sees: jax.Array, sample: Sample, gate: jax.Array) -> jax.Array:
    """bool [G or 1, A, R * K]: which shown tokens each panel may attend to."""
    visible = sees[:, :, :, None] & sample.valid & gate  # [G, A, R, K]
    return rearrange(visible, "g a r k -> g a (r k)")


def windows_of_each_panel(panels: int, window: int) -> jax.Array:
    """int [A]: how many windows of so many panels, sliding by one, each panel lies in."""
    panel = jnp.arange(panels)
    return jnp.minimum(jnp.minimum(panel + 1, panels - panel), jnp.minimum(window, panels - window + 1))


def exchange(shown: jax.Array) -> jax.Array:
    """Keys or values of sampled tokens [G, R, K, C] for every chip of their group.

    They are taken on the chip of their panel, and only they travel: a chip receives R K of them, not R N. Keys and
    values are exchanged rather than the normed tokens that both are made of. That is twice the traffic, but tokens
    would have to be projected on every chip, which for SDXL takes about as long as sending them. The
    heads are not split yet: on a TPU rows of 64 would be padded to 128, in memory and on the way.
    """
    groups, panels = split(shown.shape[:2])
    return constrain(constrain(shown, groups, panels, None, "tensor"), groups, None, None, "tensor")


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
        if sharing is None or gate is None:
            return self.out(rearrange(attend(query, key, value), "b n h d -> b n (h d)")), None
        sample = sharing.samples[x.shape[1]]
        query, key, value, tokens = (
            rearrange(array, "(g a) ... -> g a ...", a=sharing.sees.shape[1]) for array in (query, key, value, x)
        )
        if sharing.window:
            out = self.windows(query, key, value, sharing, sample, gate)
        else:
            anchors = sharing.sees.shape[2]
            if bank is None:
                joined = (rearrange(part[:, :anchors], "g r n h d -> g r n (h d)") for part in (key, value))
                shown = [exchange(sample.take(part)) for part in joined]
            else:
                shown = [self.key(bank), self.value(bank)]
            shown_key, shown_value = (self.split(rearrange(part, "g r k c -> g (r k) c")) for part in shown)
            visible = visible_keys(jnp.asarray(sharing.sees), sample, gate)
            out = attend_to_own_and_shown(query, key, value, shown_key, shown_value, visible)
        kept = sample.take(tokens) if sharing.store else None
        return self.out(rearrange(out, "g a n h d -> (g a) n (h d)")), kept

    def windows(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        sharing: Sharing,
        sample: Sample,
        gate: jax.Array,
    ) -> jax.Array:
        """Algorithm 1 of the paper: windows slide over the panels by one, results are averaged where they overlap.

        Its two slips are mended: the loop runs over panels (not tokens), and a panel does not meet its own tokens a
        second time in the pool. Memory depends on the window, not on the number of panels.
        """
        if split(query.shape[:2])[1]:
            return self.windows_across_devices(query, key, value, sharing, sample, gate)
        panels = query.shape[1]
        window, sees = min(sharing.window, panels), jnp.asarray(sharing.sees)
        own = attend_within_panels(query, key, value)

        def add_window(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
            def part(array: Array, axis: int = 1) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), start, window, axis)

            inside = Sample(part(sample.valid, 0), None if sample.index is None else part(sample.index, 0))
            shown_key, shown_value = (
                rearrange(inside.take(part(array)), "g r k h d -> g (r k) h d") for array in (key, value)
            )
            visible = visible_keys(part(part(sees), 2), inside, gate)
            out = merge([(part(own[0]), part(own[1])), attend_to_shown(part(query), shown_key, shown_value, visible)])
            return jax.lax.dynamic_update_slice_in_dim(total, part(total) + out, start, 1), None

        total, _ = jax.lax.scan(add_window, jnp.zeros_like(query), jnp.arange(panels - window + 1))
        return total / windows_of_each_panel(panels, window)[:, None, None, None].astype(total.dtype)

    def windows_across_devices(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        sharing: Sharing,
        sample: Sample,
        gate: jax.Array,
    ) -> jax.Array:
        """`windows` where panels lie on several devices: all panels at once look into their first window, and so on.

        One window after another would leave the devices of all other panels idle. The price is a copy of the sampled
        tokens of a window for each panel of a device.
        """
        groups, panels = query.shape[:2]
        window, sees, panel = min(sharing.window, panels), jnp.asarray(sharing.sees), jnp.arange(panels)
        joined = (rearrange(part, "g r n h d -> g r n (h d)") for part in (key, value))
        shown = [exchange(sample.take(part)) for part in joined]
        own = attend_within_panels(query, key, value)

        def add_window(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            start = panel - number
            exists = (start >= 0) & (start <= panels - window)
            inside = jnp.clip(start, 0, panels - window)[:, None] + jnp.arange(window)  # [A, W]
            visible = sees[:, panel[:, None], inside, None] & jnp.asarray(sample.valid)[inside]  # [G or 1, A, W, K]
            visible = jnp.broadcast_to(visible & gate & exists[:, None, None], (groups, *visible.shape[1:]))
            near = (constrain(part[:, inside], *split((groups, panels))) for part in shown)
            out, normaliser = attend_with_normaliser(
                rearrange(query, "g a n h d -> (g a) n h d"),
                *(self.split(rearrange(part, "g a w k c -> (g a) (w k) c")) for part in near),
                mask=rearrange(visible, "g a w k -> (g a) 1 1 (w k)"),
            )
            merged = merge([own, (out.reshape(query.shape), normaliser.reshape(query.shape[:-1]))])
            return total + jnp.where(exists[:, None, None, None], merged, 0), None

        total, _ = jax.lax.scan(add_window, jnp.zeros_like(query), jnp.arange(window))
        return total / windows_of_each_panel(panels, window)[:, None, None, None].astype(total.dtype)
