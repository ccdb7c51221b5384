"""Which layers and steps share, and which tokens are shown: the rules of the released apps and of the paper."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from pixelstory_jax.inference.sharing import (
    EVERYTHING,
    PLAIN,
    SAMPLED,
    Draws,
    SharingPlan,
    attention_path,
    sample_tokens,
    share_steps,
)
from pixelstory_jax.models.consistent_attention import see_each_other
from pixelstory_jax.models.unet import UNetConfig

APP = SharingPlan("bank", sampling="mask", schedule="app")
LOW_VRAM = SharingPlan("bank", sampling="bernoulli", schedule="low_vram")
GRIDS = (6, 24)


def draws_of(layers: np.ndarray, anchors: int = 2) -> Draws:
    """Given draws of the layers, drawn tokens."""
    drawn = Draws.from_seed(0, len(layers), layers.shape[1], anchors, GRIDS)
    return Draws(layers, drawn.tokens)


# (first step, what a layer does from there on: one of the three paths, or the gate of its draw)
TABLE = {
    ("app", False): [(0, PLAIN), (5, 0.3), (20, 0.1)],
    ("app", True): [(0, EVERYTHING), (5, 0.3), (20, 0.1)],
    ("low_vram", False): [(0, PLAIN), (1, 0.3), (20, 0.1)],
    ("low_vram", True): [(0, PLAIN), (1, 0.3), (20, 0.1)],
    ("always", False): [(0, SAMPLED)],
    ("always", True): [(0, SAMPLED)],
}


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize(("schedule", "reading"), TABLE)
def test_schedule(schedule, reading, steps):
    """The thresholds are numbers of steps, not shares of them; a draw that equals its gate does not pass."""
    for step in range(steps):
        [rule] = [value for first, value in TABLE[schedule, reading] if first <= step][-1:]
        for draw in (0.0, 0.05, 0.1, 0.1001, 0.2, 0.3, 0.3001, 0.9999):
            expected = rule if isinstance(rule, int) else SAMPLED if draw > rule else PLAIN
            assert attention_path(schedule, reading, step, draw) == expected, (step, draw)


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_how_often_layers_share(steps):
    """36 draws a step: seven tenths before step 20, nine tenths after it, from the first step with gates on."""
    layers = np.broadcast_to((np.arange(10) / 10 + 0.05).repeat(4)[None], (steps, 40))
    sees = np.ones((1, 1, 2), bool)
    counts = {
        (plan.schedule, reading): share_steps(plan, draws_of(layers), sees, reading).gates.mean(1)
        for plan, reading in itertools.product((APP, LOW_VRAM), (False, True))
    }
    gated = np.where(np.arange(steps) < 20, 0.7, 0.9)
    step = np.arange(steps)
    np.testing.assert_allclose(counts["app", False], np.where(step < 5, 0, gated))
    np.testing.assert_allclose(counts["app", True], np.where(step < 5, 1, gated))
    for reading in (False, True):
        np.testing.assert_allclose(counts["low_vram", reading], np.where(step < 1, 0, gated))


def test_the_app_reads_everything_first():
    """In the first five steps of reading all tokens are shown; then, and in writing, the sampled ones."""
    draws = Draws.from_seed(1, 7, 4, 2, GRIDS)
    reads, writes = (
        share_steps(APP, draws, sees, reading)
        for sees, reading in ((np.ones((1, 1, 2), bool), True), (np.asarray(see_each_other(2)), False))
    )
    for grid in GRIDS:
        assert reads.samples[grid].valid[:5].all() and reads.samples[grid].index is None
        np.testing.assert_array_equal(reads.samples[grid].valid[5:], draws.tokens[grid][5:] < np.float32(0.5))
        np.testing.assert_array_equal(writes.samples[grid].valid, draws.tokens[grid] < np.float32(0.5))


SDXL, SD15 = UNetConfig.sdxl(), UNetConfig.sd15()


def test_layers():
    """The self-attentions of the up blocks: 3 x 10 and 3 x 2 of the 70 of SDXL, 3 x 3 of SD 1.5."""
    assert SDXL.sharing_layers == 36 and SD15.sharing_layers == 9
    assert SDXL.up_stacks() == (
        *((f"up_0/attention_{layer}", 2, 10) for layer in range(3)),
        *((f"up_1/attention_{layer}", 1, 2) for layer in range(3)),
    )
    assert [name for name, _, _ in SD15.up_stacks()] == [f"up_{n}/attention_{i}" for n in (1, 2, 3) for i in range(3)]


@pytest.mark.parametrize(
    ("pixels", "sdxl", "sd15"),
    [
        ((1024, 1024), (1024, 4096), (1024, 4096, 16384)),
        ((768, 768), (576, 2304), (576, 2304, 9216)),
        ((512, 512), (256, 1024), (256, 1024, 4096)),
        ((512, 768), (16 * 24, 32 * 48), (16 * 24, 32 * 48, 64 * 96)),
    ],
)
def test_grids(pixels, sdxl, sd15):
    """A token of the first grid stands for 32 x 32 pixels, of the second for 16 x 16; SD 1.5 has one of 8 x 8 too."""
    latents = [side // 8 for side in pixels]
    assert SDXL.sharing_grids(*latents) == sdxl
    assert SD15.sharing_grids(*latents) == sd15
    rates = SharingPlan(rate=(0.3, 0.7)).rates(sd15)
    assert rates == dict(zip(sd15, (0.3, 0.7, 0.7), strict=True))
    assert SharingPlan(rate=0.4).rates(sdxl) == dict.fromkeys(sdxl, 0.4)


def test_grids_that_do_not_halve_evenly():
    assert SDXL.sharing_grids(10, 7) == (3 * 2, 5 * 4)
    assert SD15.sharing_grids(10, 7) == (3 * 2, 5 * 4, 10 * 7)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 0.5, 0.7, 1.0])
def test_fixed_number_of_tokens(rate):
    """round(rate N), at least one where the rate is not zero: those with the smallest draws, in order."""
    draws = np.random.default_rng(0).random((3, 2, 24), np.float32)
    sample = sample_tokens(draws, rate, "gathered")
    count = max(1, round(rate * 24))
    assert sample.index.shape == sample.valid.shape == (3, 2, count)
    assert sample.valid.all() if rate else not sample.valid.any()
    expected = np.sort(np.argsort(draws, axis=-1)[..., :count], axis=-1)
    np.testing.assert_array_equal(sample.index, expected)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_independent_tokens(rate):
    """Each by its own draw, as a mask or as padded positions of the same tokens."""
    draws = np.random.default_rng(0).random((3, 2, 24), np.float32)
    mask, padded = (sample_tokens(draws, rate, sampling) for sampling in ("mask", "bernoulli"))
    np.testing.assert_array_equal(mask.valid, draws < np.float32(rate))
    assert mask.index is None
    assert padded.index.shape[-1] == max(1, mask.valid.sum(-1).max())
    for where in np.ndindex(3, 2):
        np.testing.assert_array_equal(padded.index[where][padded.valid[where]], np.flatnonzero(mask.valid[where]))


def test_one_more_anchor_changes_no_other():
    two, three = (Draws.from_seed(7, 5, 4, anchors, GRIDS) for anchors in (2, 3))
    np.testing.assert_array_equal(two.layers, three.layers)
    for grid in GRIDS:
        assert two.tokens[grid].shape == (5, 2, grid) and two.tokens[grid].dtype == np.float32
        np.testing.assert_array_equal(two.tokens[grid], three.tokens[grid][:, :2])
    assert Draws.from_seed(7, 5, 4, 0, GRIDS).tokens[6].shape == (5, 0, 6)


def test_draws_follow_the_seed():
    """Steps, anchors and grids have numbers of their own; the same seed gives the same ones."""
    first, again, other = (Draws.from_seed(seed, 3, 4, 2, (64,)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens[64], again.tokens[64])
    np.testing.assert_array_equal(first.layers, again.layers)
    assert np.any(first.layers != other.layers)
    rows = [*first.tokens[64].reshape(-1, 64), *other.tokens[64].reshape(-1, 64)]
    assert len({row.tobytes() for row in rows}) == 12


@pytest.mark.parametrize("rate", [0.3, 0.5])
def test_what_is_passed_to_the_loop(rate):
    """Steps lead in gates and samples; a window is passed only where it is narrower than the story."""
    plan = SharingPlan("joint", window=3, rate=rate)
    draws = Draws.from_seed(0, 4, 9, 5, GRIDS)
    sharing = share_steps(plan, draws, np.asarray(see_each_other(5)), reading=False)
    assert sharing.gates.shape == (4, 9) and sharing.gates.all()
    assert {grid: sample.index.shape for grid, sample in sharing.samples.items()} == {
        grid: (4, 5, round(rate * grid)) for grid in GRIDS
    }
    assert sharing.window == 3 and not sharing.store and sharing.bank is None
    whole = share_steps(plan, Draws.from_seed(0, 4, 9, 3, GRIDS), np.asarray(see_each_other(3)), reading=False)
    banked = share_steps(
        SharingPlan("bank", rate=rate), draws, np.asarray(see_each_other(5)), reading=False, store=True
    )
    assert whole.window == banked.window == 0 and banked.store


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "all"}, "strategy is 'all'; known are bank, replay, joint."),
        ({"sampling": "grid"}, "sampling is 'grid'; known are mask, gathered, bernoulli."),
        ({"schedule": "never"}, "schedule is 'never'; known are always, app, low_vram."),
        ({"anchors": 0}, "anchors is 0; at least 1 is needed."),
        ({"window": 1}, "window is 1; 0 (all panels) or at least 2 is needed."),
        ({"window": -2}, "window is -2; 0 (all panels) or at least 2 is needed."),
        ({"rate": 1.5}, "rate is 1.5; shares lie between 0 and 1."),
        ({"rate": (0.5, -0.1)}, "rate is (0.5, -0.1); shares lie between 0 and 1."),
        ({"rate": ()}, "rate is (); one number is needed, or one per grid."),
        (
            {"schedule": "app"},
            "The app's schedule reads all tokens in its first steps; it needs sampling 'mask'.",
        ),
        (
            {"schedule": "app", "sampling": "mask", "strategy": "replay"},
            "The app's schedule reads where anchors are plain, but a replay makes both in one call; take 'bank'.",
        ),
    ],
)
def test_plans_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SharingPlan(**changes)
