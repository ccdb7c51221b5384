"""The denoising loop: equal to calling the network step by step, and the same stories in every grouping."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from pixelstory_jax.inference import schedulers
from pixelstory_jax.inference.diffusion import (
    Denoised,
    TextStates,
    added_noise,
    broadcast_text,
    denoise,
    panel_keys,
)
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.inference.sharing import Draws, SharingPlan, share_steps
from pixelstory_jax.models.consistent_attention import Sharing, see_each_other
from pixelstory_jax.models.unet import FreeU, UNet, UNetConfig
from tests.models.test_unet import quickly_compiled, random_unet

CONFIG = UNetConfig.sd15(channels=(8, 16), depths=(0, 1), heads=(2, 2), layers_per_block=1, context_width=6, groups=4)
UNET, SIZE, STEPS, STORIES, PANELS = UNet(CONFIG), (4, 6), 3, 2, 3
GRIDS = CONFIG.sharing_grids(*SIZE)
SAMPLERS = {
    "ddim": SamplerConfig(),
    "euler": SamplerConfig("euler"),
    "dpmpp_2m": SamplerConfig("dpmpp_2m", timestep_spacing="trailing", steps_offset=0),
    "sde": SamplerConfig("dpmpp_2m", timestep_spacing="trailing", steps_offset=0, algorithm_type="sde-dpmsolver++"),
}
GUIDANCE = 4.0


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


NOISE = normal(0, STORIES, PANELS, *SIZE, CONFIG.in_channels)
POSITIVE, NEGATIVE = (TextStates(normal(seed, STORIES, PANELS, 5, CONFIG.context_width)) for seed in (1, 2))
PARAMS = random_unet(CONFIG)


@functools.partial(quickly_compiled, static_argnames=("freeu", "rescale", "guided", "with_trace"))
def loop(
    rows, latents, positive, negative, guidance, sharing=None, freeu=None, rescale=0.0, guided=False, with_trace=True
):
    return denoise(
        UNET, PARAMS, rows, latents, positive, negative, guidance, sharing, freeu, rescale, guided, with_trace
    )


def run(kind: str, part: Any = slice(None), sharing: Sharing | None = None, **changes: Any) -> Denoised:
    """The loop on some panels, `part` being an index of stories and panels."""
    rows, init_sigma = schedulers.plan(SAMPLERS[kind], STEPS)
    positive, negative = (TextStates(text.context[part]) for text in (POSITIVE, changes.pop("negative", NEGATIVE)))
    guidance = np.float32(changes.pop("guidance", GUIDANCE))
    return loop(rows, NOISE[part] * np.float32(init_sigma), positive, negative, guidance, sharing, **changes)


def joint(anchors: int = PANELS, **changes: Any) -> Sharing:
    """Everybody sees everybody; some layers are off at some steps."""
    draws = Draws.from_seed(3, STEPS, CONFIG.sharing_layers, anchors, GRIDS)
    sharing = share_steps(SharingPlan("joint", window=0), draws, np.asarray(see_each_other(anchors)), reading=False)
    return dataclasses.replace(sharing, gates=np.array([[1, 0], [0, 0], [1, 1]], bool), **changes)


def at_step(sharing: Sharing, number: int) -> Sharing:
    samples, gates = jax.tree.map(lambda x: x[number], (sharing.samples, sharing.gates))
    return dataclasses.replace(sharing, samples=samples, gates=gates)


def assert_close(first: Any, second: Any) -> None:
    np.testing.assert_allclose(first, second, atol=1e-5 * float(np.abs(second).max()))


@pytest.mark.parametrize(("kind", "guided"), [*((kind, False) for kind in SAMPLERS), ("ddim", True)])
def test_the_loop_is_one_call_after_another(kind, guided):
    """With sharing, re-weighted skips and rescaled guidance; the two halves of guidance are calls of their own.

    Where guidance counts sharing, nobody sees anybody in the negative half.
    """
    sharing, rescale = joint(), 0.3
    done = run(kind, sharing=sharing, freeu=FreeU(), rescale=rescale, guided=guided)
    apply = _one_call()
    rows, init_sigma = schedulers.plan(SAMPLERS[kind], STEPS)
    x = jnp.asarray(NOISE * np.float32(init_sigma))
    state, keys = schedulers.init(x), panel_keys(x)
    for number in range(STEPS):
        row = jax.tree.map(lambda values, number=number: values[number], rows)
        scaled, now = schedulers.scale_input(row, x), at_step(sharing, number)
        blind = dataclasses.replace(now, sees=now.sees & (not guided))
        halves = ((NEGATIVE, blind), (POSITIVE, now))
        outputs = [apply(scaled, row.timestep, text.context, seen) for text, seen in halves]
        output = schedulers.guide(*map(_story, outputs), GUIDANCE)
        spread = [np.asarray(value).std((2, 3, 4), keepdims=True) for value in (_story(outputs[1]), output)]
        output = output * (rescale * spread[0] / spread[1] + 1 - rescale)  # per panel
        x, state = schedulers.step(row, state, x, output, added_noise(keys, number, x.shape[2:]))
        assert_close(done.trace[number], x)
    assert_close(done.latents, x)
    assert done.bank == {}


def test_added_noise_is_that_of_the_panel():
    """Standard normal, other numbers for every panel and step, the same in every grouping of the panels."""
    keys = panel_keys(NOISE)
    noise = np.stack([added_noise(keys, step, (40, 50)) for step in range(2)])
    assert noise.shape == (2, STORIES, PANELS, 40, 50)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    flat = noise.reshape(2 * STORIES * PANELS, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.1
    np.testing.assert_array_equal(added_noise(panel_keys(NOISE[1:, 2:]), 1, (40, 50)), noise[1, 1:, 2:])
    together = run("sde", sharing=joint())
    assert_close(run("sde", np.s_[1:], joint()).latents, together.latents[1:])


def _story(output: jax.Array) -> jax.Array:
    return rearrange(output, "(g a) ... -> g a ...", a=PANELS)


@functools.cache
def _one_call():
    """The network on all panels with one text each."""

    def apply(latents, time, context, sharing):
        batch = (rearrange(value, "g a ... -> (g a) ...") for value in (latents, context))
        latents, context = batch
        return UNET.apply({"params": PARAMS}, latents, time, context, None, sharing, FreeU())[0]

    return quickly_compiled(apply)


@pytest.mark.slow
def test_stories_of_a_batch_are_apart():
    """Each story alone, with and without sharing, is what it is beside another one."""
    for sharing in (None, joint()):
        together = run("ddim", sharing=sharing)
        for story in range(STORIES):
            alone = run("ddim", np.s_[story : story + 1], sharing)
            assert_close(alone.latents, together.latents[story : story + 1])
    assert np.abs(together.latents - run("ddim").latents).max() > 1e-2


def test_stories_with_patterns_of_their_own():
    """`sees` may differ between stories; both halves of guidance follow it."""
    sees = np.stack([np.asarray(see_each_other(PANELS))[0], np.zeros((PANELS, PANELS), bool)])
    latents = run("ddim", sharing=joint(sees=sees)).latents
    assert_close(latents[0], run("ddim", sharing=joint()).latents[0])
    assert_close(latents[1], run("ddim").latents[1])
    guided = run("ddim", sharing=joint(sees=sees), guided=True).latents
    assert_close(guided[0], run("ddim", sharing=joint(), guided=True).latents[0])
    assert_close(guided[1], latents[1])
    assert np.abs(guided[0] - latents[0]).max() > 1e-2


def test_guidance_of_one_is_none():
    """The negative prompt does nothing then, also where panels share."""
    other = TextStates(NEGATIVE.context + 1)
    for sharing in (None, joint()):
        first, second = (run("ddim", sharing=sharing, guidance=1, negative=text) for text in (NEGATIVE, other))
        assert_close(first.latents, second.latents)
        with_guidance = run("ddim", sharing=sharing, negative=other)
        assert np.abs(with_guidance.latents - run("ddim", sharing=sharing).latents).max() > 1e-2


@pytest.mark.parametrize("sampling", ["mask", "gathered"])
def test_bank_of_all_steps(sampling):
    """Anchors first and a later panel that reads their bank are what all three are in one call."""
    plan, anchors = SharingPlan("bank", anchors=2, sampling=sampling), 2
    draws = Draws.from_seed(4, STEPS, CONFIG.sharing_layers, anchors, GRIDS)
    mutual, reads = np.asarray(see_each_other(anchors)), np.ones((1, 1, anchors), bool)
    writing = share_steps(plan, draws, mutual, reading=False, store=True)
    written = run("dpmpp_2m", np.s_[:, :anchors], writing)
    kept = next(iter(writing.samples.values())).valid.shape[-1]
    assert {name: value.shape for name, value in written.bank.items()} == {
        name: (STEPS, blocks, 2 * STORIES, anchors, kept, CONFIG.channels[level])
        for name, level, blocks in CONFIG.up_stacks()
    }
    reading = dataclasses.replace(share_steps(plan, draws, reads, reading=True), bank=written.bank)
    read = run("dpmpp_2m", np.s_[:, anchors:], reading)
    replayed = run("dpmpp_2m", sharing=share_steps(plan, draws, np.concatenate([mutual, reads], 1), reading=False))
    assert_close(replayed.latents, jnp.concatenate([written.latents, read.latents], axis=1))
    assert np.abs(read.latents - run("dpmpp_2m", np.s_[:, anchors:]).latents).max() > 1e-2


def test_a_trace_only_if_asked():
    rows, _ = schedulers.plan(SAMPLERS["ddim"], STEPS)
    assert jax.eval_shape(lambda: denoise(UNET, PARAMS, rows, NOISE, POSITIVE, NEGATIVE, GUIDANCE)).trace is None
    done = run("ddim")
    assert done.trace.shape == (STEPS, *NOISE.shape)
    np.testing.assert_array_equal(done.trace[-1], done.latents)


def test_text_for_every_panel():
    states = TextStates(normal(0, 5, 4), normal(1, 3), normal(2, 6))
    spread = broadcast_text(states, 2, 3)
    assert [part.shape for part in spread] == [(2, 3, 5, 4), (2, 3, 3), (2, 3, 6)]
    np.testing.assert_array_equal(spread.pooled[1, 2], states.pooled)
    assert broadcast_text(TextStates(states.context), 2, 3).added() is None
    assert set(states.added()) == {"pooled", "time_ids"}
