"""The denoising loop of latent diffusion, one compiled function for all steps, panels and both halves of guidance.

S steps, G stories, A panels of a story in this call, H x W latent grid, C latent channels, T text tokens, D text width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from pixelstory_jax.inference import schedulers
from pixelstory_jax.models.consistent_attention import Sharing
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.unet import FreeU, UNet

Bank = dict[str, jax.Array]


class TextStates(NamedTuple):
    """What the U-Net sees of prompts.

    context: [..., T, D]. pooled: [..., P], and time_ids: [..., 6], both None for networks without them (SD 1.5).
    """

    context: jax.Array
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None

    def added(self) -> dict[str, jax.Array] | None:
        if self.pooled is None or self.time_ids is None:
            return None
        return {"pooled": self.pooled, "time_ids": self.time_ids}


class Denoised(NamedTuple):
    """What the loop leaves.

    latents: [G, A, H, W, C] after the last step. bank: anchors by step, and trace: [S, G, A, H, W, C] after every step,
    if asked for.
    """

    latents: jax.Array
    bank: Bank
    trace: jax.Array | None


def denoise(
    unet: UNet,
    params: Any,
    rows: schedulers.Row,
    latents: jax.Array,
    positive: TextStates,
    negative: TextStates,
    guidance: jax.Array | float,
    sharing: Sharing | None = None,
    freeu: FreeU | None = None,
    guidance_rescale: float = 0.0,
    guide_sharing: bool = False,
    with_trace: bool = False,
) -> Denoised:
    """Denoises stories with classifier-free guidance; both halves are one batch and never mix.

    A sampler that adds noise draws it from keys that the starting latents give (`panel_keys`).

    Args:
      rows: of `schedulers.plan`, the steps as leading axis.
      latents: [G, A, H, W, C], already times the plan's `init_sigma`.
      positive, negative: text states [G, A, ...].
      guidance: 1 is no guidance.
      sharing: of `sharing.share_steps`: `sees` [G or 1, A, R] for all steps, the rest with the steps as leading axis
        (a bank too: [S, blocks, 2 G, R, K, C]); None for independent panels.
      guide_sharing: the half without captions does not share either, so that guidance strengthens what panels tell
        each other as it strengthens what captions say. The released code shares in both halves.
      freeu, guidance_rescale, guide_sharing, with_trace: static.
    """
    stories, panels = latents.shape[:2]

    def both_halves(first: jax.Array, second: jax.Array) -> jax.Array:
        return constrain(rearrange(jnp.stack([first, second]), "f g a ... -> (f g a) ..."), "batch")

    text = jax.tree.map(both_halves, negative, positive)
    if sharing is not None:
        sees = jnp.asarray(sharing.sees)
        if guide_sharing or len(sees) > 1:
            sees = jnp.broadcast_to(sees, (stories, *sees.shape[1:]))
            sees = jnp.concatenate([sees & (not guide_sharing), sees])

    keys = panel_keys(latents)

    def one_step(carry: Any, per_step: Any) -> tuple[Any, Any]:
        x, state = carry
        number, row, shared = per_step
        model_input = schedulers.scale_input(row, x)
        now = None if sharing is None else dataclasses.replace(sharing, sees=sees, **shared)
        output, bank = unet.apply(
            {"params": params},
            both_halves(model_input, model_input),
            row.timestep,
            text.context,
            text.added(),
            now,
            freeu,
        )
        unconditional, conditional = rearrange(output, "(f g a) ... -> f (g a) ...", f=2, g=stories)
        guided = schedulers.guide(unconditional, conditional, guidance, guidance_rescale)
        added = None if row.of_noise is None else added_noise(keys, number, x.shape[2:])
        x, state = schedulers.step(row, state, x, rearrange(guided, "(g a) ... -> g a ...", a=panels), added)
        return (x, state), (bank, x if with_trace else None)

    shared = None if sharing is None else {name: getattr(sharing, name) for name in ("samples", "gates", "bank")}
    steps = jnp.arange(len(rows.timestep))
    (latents, _), (bank, trace) = jax.lax.scan(one_step, (latents, schedulers.init(latents)), (steps, rows, shared))
    return Denoised(latents, bank, trace)


def panel_keys(latents: jax.Array) -> jax.Array:
    """Random keys [G, A] out of starting latents [G, A, H, W, C]: a picture depends on nothing but its own seed."""
    bits = jax.lax.bitcast_convert_type(latents[:, :, 0, 0, 0].astype(jnp.float32), jnp.uint32)
    return jax.vmap(jax.vmap(jax.random.key))(bits)


def added_noise(keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """What a sampler that adds noise adds at a step, standard normal [G, A, *shape]."""
    draw = jax.vmap(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape)))
    return draw(keys)


def broadcast_text(states: TextStates, stories: int, panels: int) -> TextStates:
    """One prompt's states (no leading axes) for every panel."""
    return jax.tree.map(lambda x: repeat(x, "... -> g a ...", g=stories, a=panels), states)
