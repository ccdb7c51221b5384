"""Consistent self-attention: one layer against sums written by hand, and all ways of sharing against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from pixelstory_jax.inference.sharing import sample_tokens
from pixelstory_jax.models import attention
from pixelstory_jax.models.consistent_attention import Sample, SelfAttention, Sharing, see_each_other
from pixelstory_jax.models.unet import UNet
from tests.models.small import random_like
from tests.models.test_unet import SMALLEST, quickly_compiled, random_unet, unet_inputs

WIDTH, HEADS, TOKENS, PANELS, GROUPS = 12, 3, 6, 4, 2
LAYER = SelfAttention(WIDTH, HEADS)
ON = np.bool_(True)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = normal(0, GROUPS * PANELS, TOKENS, WIDTH)
PARAMS = random_like(jax.eval_shape(LAYER.init, jax.random.key(0), X)["params"], scale=0.5)


@jax.jit
def run(x: Any, sharing: Any = None, gate: Any = ON, bank: Any = None) -> Any:
    return LAYER.apply({"params": PARAMS}, x, sharing, gate, bank)


def out(x: np.ndarray, sees: Any, sample: Sample, gate: Any = ON, bank: Any = None, window: int = 0) -> np.ndarray:
    """The layer's result on panels [B, N, C] for this sharing."""
    return np.asarray(run(x, Sharing(sees, {TOKENS: sample}, window=window), gate, bank)[0])


def samples(anchors: int = PANELS, rate: float = 0.5, seed: int = 1) -> tuple[Sample, Sample]:
    """The same tokens as a mask and as padded lists of positions."""
    draws = np.random.default_rng(seed).random((anchors, TOKENS), np.float32)
    return sample_tokens(draws, rate, "mask"), sample_tokens(draws, rate, "bernoulli")


def chosen(sample: Sample) -> list[np.ndarray]:
    """Positions of the shown tokens of each anchor."""
    if sample.index is None:
        return [np.flatnonzero(row) for row in np.asarray(sample.valid)]
    return [np.asarray(index)[np.asarray(valid)] for index, valid in zip(sample.index, sample.valid, strict=True)]


def attend_by_hand(queries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[N, C] attending to tokens [S, C], head by head, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
    query, key, value = (
        rearrange(source @ params[name]["kernel"], "n (h d) -> h n d", h=HEADS)
        for name, source in (("query", queries), ("key", tokens), ("value", tokens))
    )
    heads = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = np.exp(q @ k.T / np.sqrt(WIDTH // HEADS))
        heads.append(scores / scores.sum(1, keepdims=True) @ v)
    return np.concatenate(heads, axis=1) @ params["out"]["kernel"] + params["out"]["bias"]


def by_hand(x: np.ndarray, sees: np.ndarray, positions: Sequence[np.ndarray], anchors: Any = None) -> np.ndarray:
    """Panel by panel: all of its own tokens, and the chosen ones of each anchor that it sees.

    Args:
      x: [B, N, C]. sees: [G or 1, A, R]. anchors: [G, R, N, C]; None for the panels themselves.
    """
    groups = rearrange(x, "(g a) n c -> g a n c", a=sees.shape[1])
    anchors = groups if anchors is None else anchors
    rows = []
    for group, panels in enumerate(groups):
        for panel, who in zip(panels, sees[group % len(sees)], strict=True):
            seen = [anchors[group, r][positions[r]] for r in np.flatnonzero(who)]
            rows.append(attend_by_hand(panel, np.concatenate([panel, *seen])))
    return np.stack(rows)


EVERYBODY = np.asarray(see_each_other(PANELS))
NOBODY = np.zeros_like(EVERYBODY)


def assert_close(first: Any, second: Any) -> None:
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_plain_attention():
    assert_close(run(X)[0], [attend_by_hand(panel, panel) for panel in X])


@pytest.mark.parametrize("kind", [0, 1], ids=["mask", "gathered"])
def test_against_sums_by_hand(kind):
    """Any pattern of who sees whom, another one in each group."""
    sample = samples()[kind]
    sees = np.random.default_rng(2).random((GROUPS, PANELS, PANELS)) < 0.6
    sees &= ~np.eye(PANELS, dtype=bool)
    assert sees.any((1, 2)).all() and (sees[0] != sees[1]).any()
    assert_close(out(X, sees, sample), by_hand(X, sees, chosen(sample)))
    everybody = out(X, EVERYBODY, sample)
    assert_close(everybody, by_hand(X, EVERYBODY, chosen(sample)))
    assert np.abs(everybody - run(X)[0]).max() > 0.1


def test_the_samples_are_the_same_tokens():
    mask, gathered = samples()
    for first, second in zip(chosen(mask), chosen(gathered), strict=True):
        np.testing.assert_array_equal(first, second)
    assert {len(row) for row in chosen(mask)} != {TOKENS}


def test_rate_one_is_joint_attention():
    """Over all tokens of all panels of a group, each panel's own ones once."""
    expected = [
        attend_by_hand(panel, rearrange(group, "a n c -> (a n) c"))
        for group in rearrange(X, "(g a) n c -> g a n c", g=GROUPS)
        for panel in group
    ]
    for sample in samples(rate=1.0):
        assert_close(out(X, EVERYBODY, sample), expected)


def test_what_makes_it_plain():
    """Rate 0, a gate that is off, a panel that sees nobody, and a story of one panel."""
    plain = run(X)[0]
    for none, some in zip(samples(rate=0.0), samples(), strict=True):
        assert_close(out(X, EVERYBODY, none), plain)
        assert_close(out(X, EVERYBODY, some, gate=np.bool_(False)), plain)
        assert_close(out(X, NOBODY, some), plain)
    assert_close(out(X, np.asarray(see_each_other(1)), samples(1)[0]), plain)


def test_one_who_sees_nobody_among_others():
    """As a panel without a character: it alone is plain."""
    sees = EVERYBODY.copy()
    sees[:, 2] = False
    got = rearrange(out(X, sees, samples()[1]), "(g a) n c -> g a n c", g=GROUPS)
    plain = rearrange(np.asarray(run(X)[0]), "(g a) n c -> g a n c", g=GROUPS)
    assert_close(got[:, 2], plain[:, 2])
    assert all(np.abs(got[:, a] - plain[:, a]).max() > 0.05 for a in (0, 1, 3))


def test_tokens_that_are_not_shown_do_not_reach_others():
    for sample in samples():
        hidden = X.copy()
        rest = np.setdiff1d(np.arange(TOKENS), chosen(sample)[1])
        assert len(rest)
        hidden[1, rest] += 5  # panel 1 of the first group
        before, after = (out(x, EVERYBODY, sample) for x in (X, hidden))
        others = [number for number in range(len(X)) if number != 1]
        np.testing.assert_array_equal(before[others], after[others])
        assert np.abs(before[1] - after[1]).max() > 0.1


@pytest.mark.parametrize("kind", [0, 1], ids=["mask", "gathered"])
def test_bank_and_replay(kind):
    """Two anchors that see each other, two panels that see both and are seen by nobody."""
    anchors, sample = 2, samples(2)[kind]
    groups = rearrange(X, "(g a) n c -> g a n c", g=GROUPS)
    first, last = (rearrange(part, "g a n c -> (g a) n c") for part in (groups[:, :2], groups[:, 2:]))
    written, bank = run(first, Sharing(see_each_other(anchors), {TOKENS: sample}, store=True))
    assert bank.shape == (GROUPS, anchors, sample.valid.shape[1], WIDTH)
    for group in range(GROUPS):
        for anchor, positions in enumerate(chosen(sample)):
            valid = positions if sample.index is None else slice(len(positions))
            np.testing.assert_array_equal(bank[group, anchor][valid], groups[group, anchor][positions])
    reads = np.ones((1, 2, anchors), bool)
    read = out(last, reads, sample, bank=bank)
    assert_close(read, by_hand(last, reads, chosen(sample), groups[:, :2]))
    sees = np.concatenate([np.asarray(see_each_other(anchors)), reads], axis=1)
    replayed = rearrange(out(X, sees, sample), "(g a) n c -> g a n c", g=GROUPS)
    assert_close(replayed[:, :2], rearrange(np.asarray(written), "(g a) n c -> g a n c", g=GROUPS))
    assert_close(replayed[:, 2:], rearrange(read, "(g a) n c -> g a n c", g=GROUPS))


def test_several_characters():
    """Banks of two characters side by side: each panel sees one, the other, both or none of them."""
    sample = samples(3)[1]
    bank = normal(3, GROUPS, 3, TOKENS, WIDTH)  # one anchor of the first character, two of the second
    stored = np.take_along_axis(bank, sample.index[None, :, :, None], axis=2)
    sees = np.array([[[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]], bool)
    got = out(X, sees, sample, bank=stored)
    assert_close(got, by_hand(X, sees, chosen(sample), bank))
    alone = Sample(sample.valid[1:], sample.index[1:])
    assert_close(out(X, np.ones((1, PANELS, 2), bool), alone, bank=stored[:, 1:])[1::PANELS], got[1::PANELS])
    assert_close(got[3::PANELS], run(X)[0][3::PANELS])


def windows_by_hand(x: np.ndarray, sees: np.ndarray, positions: Sequence[np.ndarray], window: int) -> np.ndarray:
    """Algorithm 1 of the paper, the loop over panels and a panel's own tokens once."""
    total = np.zeros(x.shape)
    counts = np.zeros(len(x))
    for start in range(len(x) - window + 1):
        inside = slice(start, start + window)
        part = sees[:, inside, inside]
        total[inside] += by_hand(x[inside], part, positions[start : start + window])
        counts[inside] += 1
    return total / counts[:, None, None]


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_windows(window):
    """The sum of results is linear in the last projection, so averages before and after it agree."""
    story = normal(4, 5, TOKENS, WIDTH)
    sees = np.asarray(see_each_other(5)).copy()
    sees[:, 3, 2] = False
    for sample in samples(5):
        expected = windows_by_hand(story, sees, chosen(sample), window)
        assert_close(out(story, sees, sample, window=window), expected)
    assert_close(out(story, sees, sample, gate=np.bool_(False), window=window), run(story)[0])


def test_windows_of_all_panels_and_more():
    whole = out(X, EVERYBODY, samples()[1])
    for window in (PANELS, PANELS + 3):
        assert_close(out(X, EVERYBODY, samples()[1], window=window), whole)


def test_windows_keep_groups_apart():
    narrow = out(X, EVERYBODY, samples()[1], window=2)
    for group in range(GROUPS):
        part = slice(group * PANELS, (group + 1) * PANELS)
        assert_close(narrow[part], out(X[part], EVERYBODY, samples()[1], window=2))


@pytest.mark.parametrize("window", [0, 2])
def test_large_calls_take_the_panels_one_after_another(monkeypatch, window):
    expected = out(X, EVERYBODY, samples()[1], window=window)
    monkeypatch.setattr(attention, "CHUNKED_FROM", 1)
    sharing = Sharing(EVERYBODY, {TOKENS: samples()[1]}, window=window)
    one_by_one = jax.jit(lambda x: LAYER.apply({"params": PARAMS}, x, sharing, ON)[0])
    assert ("scan" in str(jax.make_jaxpr(one_by_one)(X))) and (window or "scan" not in str(jax.make_jaxpr(run)(X)))
    assert_close(one_by_one(X), expected)


def test_gradients():
    """Finite also where nothing is visible; an anchor feels the panels that see it, and only they feel it."""
    sees = np.zeros((1, PANELS, PANELS), bool)
    sees[0, 1, 0] = True  # panel 1 sees anchor 0

    @jax.jit
    def gradient(params, x, gate):
        def loss(params, x):
            sharing = Sharing(sees, {TOKENS: samples()[0]})
            return (LAYER.apply({"params": params}, x, sharing, gate)[0][1] ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    for gate in (True, False):
        of_params, of_x = gradient(PARAMS, X, np.bool_(gate))
        assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves((of_params, of_x)))
        shown = chosen(samples()[0])[0]
        assert np.all(np.any(of_x[0, shown], axis=-1)) if gate else not np.any(of_x[0])
        assert not np.any(of_x[0, np.setdiff1d(np.arange(TOKENS), shown)]) and not np.any(of_x[2:])
    expected = jax.grad(lambda x: (LAYER.apply({"params": PARAMS}, x)[0][1] ** 2).sum())(X)
    assert_close(of_x, expected)


def test_lora_is_a_low_rank_change_of_the_maps():
    layer = SelfAttention(WIDTH, HEADS, lora_rank=2, lora_alpha=3.0)
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), X)["params"], scale=0.5)
    merged = {
        name: {
            key: leaf + 1.5 * part["lora_a"] @ part["lora_b"] if key == "kernel" else leaf
            for key, leaf in part.items()
            if not key.startswith("lora")
        }
        for name, part in params.items()
    }
    sharing = Sharing(EVERYBODY, {TOKENS: samples()[1]})
    got, expected = (
        module.apply({"params": tree}, X, sharing, ON)[0] for module, tree in ((layer, params), (LAYER, merged))
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(got - out(X, EVERYBODY, samples()[1])).max() > 0.1


def test_half_precision():
    half = SelfAttention(WIDTH, HEADS, jnp.bfloat16)
    sharing = Sharing(EVERYBODY, {TOKENS: samples()[1]}, store=True)
    got, bank = jax.jit(lambda x: half.apply({"params": PARAMS}, x, sharing, ON))(X.astype(jnp.bfloat16))
    assert got.dtype == bank.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), out(X, EVERYBODY, samples()[1]), atol=0.1)


SIZE = (4, 6)  # latents; the network shares on grids of 6 and 24 tokens
GRIDS = SMALLEST.sharing_grids(*SIZE)
GATES = np.array([True, False, True, True])
INPUTS = unet_inputs(SMALLEST, SIZE, GROUPS * PANELS)  # the groups are as the halves of guidance
INPUTS["timesteps"] = np.float32(301)


@quickly_compiled
def run_unet(params: Any, inputs: Any, sharing: Any = None) -> Any:
    return UNet(SMALLEST).apply({"params": params}, **inputs, sharing=sharing)


def panels_of(values: Any, chosen: slice) -> Any:
    """These panels of both groups."""
    grouped = rearrange(np.asarray(values), "(g a) ... -> g a ...", g=GROUPS)
    return rearrange(grouped[:, chosen], "g a ... -> (g a) ...")


def unet_out(inputs: Any, sharing: Sharing | None = None, chosen: slice = slice(None)) -> tuple[np.ndarray, Any]:
    part = {**inputs, **{name: panels_of(inputs[name], chosen) for name in ("latents", "context")}}
    result, bank = run_unet(random_unet(SMALLEST), part, sharing)
    return np.asarray(result), bank


def unet_samples(sampling: str) -> dict[int, Sample]:
    rng = np.random.default_rng(5)
    return {grid: sample_tokens(rng.random((2, grid), np.float32), 0.5, sampling) for grid in GRIDS}


def replay(**changes: Any) -> Sharing:
    """Panels 0 and 1 are anchors of panels 2 and 3."""
    sees = np.array([[[0, 1], [1, 0], [1, 1], [1, 1]]], bool)
    return dataclasses.replace(Sharing(sees, unet_samples("mask"), GATES), **changes)


@pytest.mark.slow
def test_whole_network_in_every_way():
    """Masked and gathered banks and replay agree; layers that are gated stay plain in each of them."""
    assert SMALLEST.sharing_layers == len(GATES) and GRIDS == (6, 24)
    replayed, _ = unet_out(INPUTS, replay())
    first, last = slice(0, 2), slice(2, 4)
    for sampling in ("mask", "bernoulli"):
        drawn = unet_samples(sampling)
        written, bank = unet_out(INPUTS, Sharing(see_each_other(2), drawn, GATES, store=True), first)
        read, nothing = unet_out(INPUTS, Sharing(np.ones((1, 2, 2), bool), drawn, GATES, bank), last)
        assert set(bank) == {name for name, _, _ in SMALLEST.up_stacks()} and nothing == {}
        assert_close(written, panels_of(replayed, first))
        assert_close(read, panels_of(replayed, last))
    plain, _ = unet_out(INPUTS)
    for panel in range(PANELS):
        one = slice(panel, panel + 1)
        assert np.abs(panels_of(replayed, one) - panels_of(plain, one)).max() > 1e-2


def test_whole_network_without_sharing():
    plain, _ = unet_out(INPUTS)
    off = {grid: Sample(np.zeros((2, grid), bool)) for grid in GRIDS}
    for sharing in (replay(gates=np.zeros(4, bool)), replay(samples=off), replay(sees=np.zeros((1, 4, 2), bool))):
        assert_close(unet_out(INPUTS, sharing)[0], plain)


def test_every_layer_has_its_gate():
    """One gate on at a time gives four different pictures."""
    results = [unet_out(INPUTS, replay(gates=np.arange(4) == number))[0] for number in range(4)]
    for number, result in enumerate([unet_out(INPUTS)[0], *results]):
        for other in results[number:]:
            assert np.abs(result - other).max() > 1e-4


def test_readers_touch_neither_anchors_nor_each_other():
    changed = {**INPUTS, "latents": INPUTS["latents"].copy(), "context": INPUTS["context"].copy()}
    for name in ("latents", "context"):
        changed[name][3] += 1  # the last panel of the first group
    before, after = (unet_out(inputs, replay())[0] for inputs in (INPUTS, changed))
    others = [number for number in range(GROUPS * PANELS) if number != 3]
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before[3] - after[3]).max() > 0.1
