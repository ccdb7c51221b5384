"""The StoryDiffusion objective: what its loss is made of, what is random about it, what it trains, that it falls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from einops import rearrange

from pixelstory_jax.data import build_source
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.inference.noise_schedule import NoiseSchedule, add_noise, training_target
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.storydiffusion import (
    DiffusionLoss,
    StoryDiffusionObjective,
    draw_times,
    random_sharing,
    snr_weights,
)
from pixelstory_jax.training.state import split_trained
from tests.story_sizes import SIDE, SIZES, smallest_story_config, story_params

STORIES, PANELS, STEPS = 4, 3, 20
SCHEDULE = NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True)
PLAIN = DiffusionLoss(min_snr=0.0, drop_caption=0.0, share=0.0)
RNG = jax.random.key(5)


def objective_of(loss: DiffusionLoss = PLAIN, schedule: NoiseSchedule = SCHEDULE, **changes: Any):
    def evaluator(params: Any, step: int) -> Any:
        raise AssertionError("nothing is evaluated here")

    settings: dict[str, Any] = {"config": SIZES, "train_text": True, "train_unet": "full", **changes}
    empty = {"text": build_objective(smallest_story_config()).empty["text"]}
    return StoryDiffusionObjective(
        schedule=schedule,
        loss=loss,
        batch_spec={},
        empty=empty,
        picture_size=SIDE,
        evaluator=evaluator,
        **settings,
    )


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    source = build_source(smallest_story_config(), "train")
    return stack_examples([source[index] for index in range(STORIES)], range(STORIES))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return story_params()


@pytest.fixture(scope="module")
def clean(batch, params) -> dict[str, np.ndarray]:
    """The batch with latents in the place of pictures: shorter programs."""
    latents = jax.jit(objective_of().latents)(params, batch, jax.random.split(RNG, 5)[0])
    return {"latents": np.asarray(latents), "tokens": batch["tokens"]}


@pytest.fixture(scope="module")
def plain(clean, params):
    """Loss and terms without sharing, weights and dropped captions."""
    return jax.jit(objective_of().loss)(params, clean, RNG)


@pytest.fixture(scope="module")
def by_hand(clean, params) -> tuple[np.ndarray, np.ndarray]:
    """The squared error of each story by the U-Net without sharing, from the same draws, and the stories' times."""

    @jax.jit
    def errors(params):
        _, time, noise, _, _ = jax.random.split(RNG, 5)
        times = ((jax.random.uniform(time) + jnp.arange(STORIES) / STORIES) % 1.0 * 1000).astype(jnp.int32)
        latents, table = clean["latents"], SCHEDULE.alphas_cumprod()
        noise = jax.random.normal(noise, latents.shape)
        model = objective_of().model
        context, _ = model.encode_text(params, {"text": rearrange(clean["tokens"], "b a t -> (b a) t")})
        noisy = rearrange(add_noise(table, latents, noise, times), "b a ... -> (b a) ...")
        output, _ = model.unet.apply({"params": params["unet"]}, noisy, jnp.repeat(times, PANELS), context)
        target = training_target("v_prediction", table, latents, noise, times)
        return jnp.square(output.reshape(target.shape) - target).mean((1, 2, 3, 4)), times

    found, times = errors(params)
    return np.asarray(found), np.asarray(times)


def test_the_loss_of_panels_for_themselves(plain, by_hand):
    errors, times = by_hand
    loss, terms = plain
    assert np.ptp(times) > 500  # the times of a batch are spread over the schedule
    assert np.isfinite(loss) and loss > 0.1
    np.testing.assert_allclose([loss, terms["error"], terms["error_alone"]], [errors.mean()] * 3, rtol=1e-5)
    assert terms["error_shared"] == 0


def test_each_story_has_the_weight_of_its_time(by_hand, plain, clean, params):
    """What is shown is not weighted."""
    errors, times = by_hand
    alphas = SCHEDULE.alphas_cumprod()[times]
    ratio = alphas / (1 - alphas)
    assert ratio.max() > 5 > ratio.min()
    loss, terms = jax.jit(objective_of(dataclasses.replace(PLAIN, min_snr=5.0)).loss)(params, clean, RNG)
    np.testing.assert_allclose(loss, (errors * np.minimum(ratio, 5) / (ratio + 1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["error"], plain[0], rtol=1e-5)


@pytest.mark.slow
def test_times_are_even_or_logit_normal():
    """One per story, each from one of as many ranges; those of a logit-normal are equally likely under scipy's."""
    even = np.asarray(draw_times(RNG, 8, 3, 1000, PLAIN))
    np.testing.assert_array_equal(np.sort(even[:, 0]) // 125, np.arange(8))
    np.testing.assert_array_equal(even, even[:, :1].repeat(3, 1))
    options = dataclasses.replace(PLAIN, time_spread=1.2, time_mean=0.35)
    drawn = np.sort(draw_times(RNG, 400, 1, 1000, options)[:, 0])
    levels = scipy.stats.norm.cdf((scipy.special.logit((drawn + 0.5) / 1000) - 0.35) / 1.2)
    np.testing.assert_allclose(levels, (np.arange(400) + 0.5) / 400, atol=0.004)
    times = np.stack([draw_times(key, 3, 2, 1000, options) for key in jax.random.split(RNG, 200)])
    assert times.min() >= 0 and times.max() <= 999


def test_panels_of_mixed_stories_have_their_own_times():
    """All panels of a batch then share the ranges out, in any order; other stories keep one time."""
    mixed = np.asarray(draw_times(RNG, 8, 5, 1000, dataclasses.replace(PLAIN, mixed=1.0)))
    np.testing.assert_array_equal(np.sort(mixed.ravel()) // 25, np.arange(40))
    assert np.ptp(mixed, axis=1).min() > 200
    half = np.asarray(draw_times(RNG, 400, 5, 1000, dataclasses.replace(PLAIN, mixed=0.5)))
    own = np.ptp(half, axis=1) > 0
    assert 0.4 < own.mean() < 0.6
    np.testing.assert_array_equal(half[~own], draw_times(RNG, 400, 5, 1000, PLAIN)[~own])


@pytest.mark.slow
def test_the_loss_with_a_time_for_each_panel(clean, params):
    """Each panel has noise, target and time embedding of its own time."""
    options = dataclasses.replace(PLAIN, mixed=1.0)
    loss, terms = jax.jit(objective_of(options).loss)(params, clean, RNG)
    _, time, noise, _, _ = jax.random.split(RNG, 5)
    times = draw_times(time, STORIES, PANELS, 1000, options)
    latents, table = clean["latents"], SCHEDULE.alphas_cumprod()
    noise = jax.random.normal(noise, latents.shape)
    model = objective_of().model
    context, _ = model.encode_text(params, {"text": rearrange(clean["tokens"], "b a t -> (b a) t")})
    errors = []
    for panel in np.ndindex(STORIES, PANELS):
        a, row = table[times[panel]], np.ravel_multi_index(panel, (STORIES, PANELS))
        noisy = np.sqrt(a) * latents[panel] + np.sqrt(1 - a) * noise[panel]
        target = np.sqrt(a) * noise[panel] - np.sqrt(1 - a) * latents[panel]
        output, _ = model.unet.apply(
            {"params": params["unet"]}, noisy[None], times[panel][None], context[row : row + 1]
        )
        errors.append(np.square(output[0] - target).mean())
    np.testing.assert_allclose([loss, terms["error"]], [np.mean(errors)] * 2, rtol=1e-4)


@pytest.mark.slow
def test_sharing_changes_the_loss(plain, clean, params):
    """Where all stories share, there is no error alone; a rate of zero shows nothing, so that it is as without."""
    shared, terms = jax.jit(objective_of(dataclasses.replace(PLAIN, share=1.0)).loss)(params, clean, RNG)
    assert abs(shared - plain[0]) > 1e-3 * plain[0]
    np.testing.assert_allclose(terms["error_shared"], shared, rtol=1e-6)
    assert terms["error_alone"] == 0
    blind, _ = jax.jit(objective_of(dataclasses.replace(PLAIN, share=1.0, rate=0.0)).loss)(params, clean, RNG)
    np.testing.assert_allclose(blind, plain[0], rtol=1e-5)


def test_latents_may_be_computed_before(plain, batch, params):
    """Pictures give the loss of their latents."""
    loss, _ = jax.jit(objective_of().loss)(params, batch, RNG)
    np.testing.assert_allclose(loss, plain[0], rtol=1e-5)


def test_latents_are_draws_of_the_autoencoder(batch, clean, params):
    """One for each picture, around the mean, another one for another key."""
    objective = objective_of()
    assert clean["latents"].shape == (STORIES, PANELS, *objective.latent_size, 4)
    means = jax.jit(objective.model.encode_images)(params, rearrange(batch["images"], "b a ... -> (b a) ..."))
    other = np.asarray(jax.jit(objective.latents)(params, batch, jax.random.key(6)))
    means = np.asarray(means).reshape(clean["latents"].shape)
    for draw in (clean["latents"], other):
        assert 0 < np.abs(draw - means).mean() < 3 * np.abs(means).mean() + 3
    assert np.abs(other - clean["latents"]).mean() > 1e-3
    halves = objective.latents(params, {"latents": clean["latents"].astype(np.float16)}, RNG)
    assert halves.dtype == jnp.float32
    np.testing.assert_allclose(halves, clean["latents"], rtol=1e-3, atol=1e-3)


def test_dropped_captions_are_empty(batch, params):
    """Of a whole story at once; the captions of the others stay."""
    objective = objective_of()
    dropped = np.array([True, False, False, True])
    context, pooled = jax.jit(objective.text)(params, batch, dropped)
    tokens = np.where(dropped[:, None, None], objective.empty["text"], batch["tokens"])
    expected, _ = jax.jit(objective.model.encode_text)(params, {"text": rearrange(tokens, "b a t -> (b a) t")})
    assert pooled is None and context.shape == (STORIES * PANELS, SIZES.text.length, SIZES.text.width)
    np.testing.assert_allclose(context, expected, atol=1e-6)
    assert np.abs(context[0] - context[PANELS]).max() > 1e-2


def test_captions_computed_before_are_dropped_too(params):
    objective = objective_of()
    rng = np.random.default_rng(0)
    batch = {"context": rng.standard_normal((2, 3, 5, 8)), "pooled": rng.standard_normal((2, 3, 6))}
    objective.empty = {"context": rng.standard_normal((5, 8)), "pooled": rng.standard_normal(6)}
    context, pooled = objective.text(params, jax.tree.map(jnp.asarray, batch), jnp.array([False, True]))
    for found, name in ((context, "context"), (pooled, "pooled")):
        np.testing.assert_allclose(found[:3], batch[name][0], rtol=1e-6)
        np.testing.assert_allclose(found[3:], np.broadcast_to(objective.empty[name], found[3:].shape), rtol=1e-6)


def test_zeros_may_stand_for_no_caption(batch, params):
    """As SDXL samples; the captions that stay are untouched."""
    dropped = np.array([True, False, False, True])
    context, _ = jax.jit(objective_of(zero_empty=True).text)(params, batch, dropped)
    other, _ = jax.jit(objective_of().text)(params, batch, dropped)
    gone = dropped.repeat(PANELS)
    assert not context[gone].any() and other[gone].any()
    np.testing.assert_array_equal(context[~gone], other[~gone])
    cached = {"context": np.ones((2, 3, 5, 8)), "pooled": np.ones((2, 3, 6))}
    objective = objective_of(zero_empty=True)
    objective.empty = {"context": np.ones((5, 8)), "pooled": np.ones(6)}
    states = objective.text(params, jax.tree.map(jnp.asarray, cached), jnp.array([False, True]))
    assert all(found[:3].all() and not found[3:].any() for found in states)


@pytest.mark.slow
def test_how_many_captions_are_dropped(plain, clean, params):
    """None, or all: then the loss does not know the captions."""
    loss = jax.jit(objective_of(dataclasses.replace(PLAIN, drop_caption=1.0)).loss)
    others = {**clean, "tokens": clean["tokens"][::-1]}
    empty, same = loss(params, clean, RNG)[0], loss(params, others, RNG)[0]
    assert empty == same and abs(empty - plain[0]) > 1e-4 * plain[0]
    captioned = jax.jit(objective_of().loss)
    assert abs(captioned(params, others, RNG)[0] - plain[0]) > 1e-4 * plain[0]


@pytest.mark.parametrize(
    ("prediction", "bound", "expected"),
    [
        ("epsilon", 5.0, [5 / 9, 1.0, 1.0, 0.0]),
        ("v_prediction", 5.0, [5 / 10, 1 / 2, 0.25 / 1.25, 0.0]),
        ("sample", 5.0, [5.0, 1.0, 0.25, 0.0]),
        ("v_prediction", 0.5, [0.5 / 10, 0.5 / 2, 0.25 / 1.25, 0.0]),
        ("epsilon", 0.0, [1.0, 1.0, 1.0, 1.0]),
        ("v_prediction", 0.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights_of_the_steps(prediction, bound, expected):
    """Signal-to-noise ratios 9, 1, 1/4 and 0: min(ratio, bound) for x0, in the terms of each prediction."""
    table = np.array([0.9, 0.5, 0.2, 0.0], np.float32)
    weights = snr_weights(NoiseSchedule(prediction=prediction), table, jnp.arange(4), bound)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def many():
    """The sharing of many stories of four panels."""
    return random_sharing(jax.random.key(0), 600, 4, (4, 20), share=0.5, rate=0.3)


def test_who_sees_whom_in_training(many):
    """Half of the stories share: all see the first M panels, nobody itself, M from 1 to 4 alike often."""
    sees = np.asarray(many.sees)
    assert sees.shape == (600, 4, 4) and not sees[:, range(4), range(4)].any()
    shares = sees.any((1, 2))
    assert 0.42 < shares.mean() < 0.58
    anchors = sees.any(1).sum(1)
    for count in (1, 2, 3, 4):
        of_count = sees[shares & (anchors == count)]
        assert 0.17 < len(of_count) / shares.sum() < 0.33
        expected = (np.arange(4) < count) & ~np.eye(4, dtype=bool)
        np.testing.assert_array_equal(of_count, np.broadcast_to(expected, of_count.shape))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_all_or_no_stories_share(share, expected):
    sees = random_sharing(jax.random.key(1), 50, 3, (4,), share, rate=0.5).sees
    assert sees.any((1, 2)).mean() == expected


def test_which_tokens_are_seen(many):
    """round(rate N) different ones of each anchor, at least one; other ones for each anchor, grid and step."""
    assert set(many.samples) == {4, 20}
    for grid, count in ((4, 1), (20, 6)):
        sample = many.samples[grid]
        index = np.asarray(sample.index)
        assert index.shape == sample.valid.shape == (4, count) and index.dtype == np.int32
        assert np.all(sample.valid) and index.min() >= 0 and index.max() < grid
        assert all(len(set(row)) == count for row in index.tolist())
    rows = {tuple(row) for row in np.asarray(many.samples[20].index).tolist()}
    other = random_sharing(jax.random.key(1), 1, 4, (20,), share=0.5, rate=0.3).samples[20].index
    assert len(rows | {tuple(row) for row in np.asarray(other).tolist()}) == 8
    nothing = random_sharing(jax.random.key(0), 1, 4, (20,), share=1.0, rate=0.0).samples[20]
    assert not np.any(nothing.valid)


def trained_parts(objective: StoryDiffusionObjective) -> set[str]:
    paths = flatten(jax.eval_shape(objective.init, RNG))
    return {path.split("/")[0] for path in paths if objective.trainable(path)}


def test_what_is_trained():
    """The autoencoder never is; by LoRA nothing of the U-Net but the additions."""
    assert trained_parts(objective_of()) == {"unet", "text"}
    assert trained_parts(objective_of(train_text=False)) == {"unet"}
    adapted = dataclasses.replace(SIZES, unet=dataclasses.replace(SIZES.unet, lora_rank=2))
    objective = objective_of(config=adapted, train_text=False, train_unet="lora")
    paths = flatten(jax.eval_shape(objective.init, RNG))
    trained = {path for path in paths if objective.trainable(path)}
    assert trained == {path for path in paths if path.rsplit("/", 1)[-1] in ("lora_a", "lora_b")} != set()
    assert trained_parts(objective_of(train_text=False, train_unet="lora")) == set()
    with pytest.raises(ValueError, match="train_unet is 'most'; known are full, lora"):
        objective_of(train_unet="most")


def test_the_loss_falls_on_one_repeated_batch(batch, params):
    """From pictures, with everything on. The autoencoder gets no gradient, also where it would be trained."""
    objective = objective_of(DiffusionLoss(drop_caption=0.2, share=0.5))
    trained, frozen = split_trained(params, objective.trainable)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trained, state):
        def loss(everything):
            return objective.loss(unflatten(everything), batch, RNG)

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)({**trained, **frozen})
        unwanted = optax.tree.norm({path: gradients[path] for path in frozen})
        updates, state = optimizer.update({path: gradients[path] for path in trained}, state, trained)
        norms = {path: jnp.abs(gradients[path]).max() for path in trained}
        return optax.apply_updates(trained, updates), state, value, norms, unwanted

    state, values = optimizer.init(trained), []
    for number in range(STEPS):
        trained, state, value, norms, unwanted = step(trained, state)
        values.append(float(value))
        assert unwanted == 0
        if number == 0:
            still = {path for path, norm in norms.items() if not norm > 0}
            # All text states are seen; a bias of the keys shifts all scores alike, so that attention ignores it.
            assert all(path.endswith("key/bias") for path in still), still
    assert np.isfinite(values).all() and values[-1] < 0.7 * values[0], values


def test_text_that_is_not_trained_gets_no_gradient(clean, params):
    objective = objective_of(train_text=False)

    @jax.jit
    def gradients(text):
        return jax.grad(lambda text: objective.loss({**params, "text": text}, clean, RNG)[0])(text)

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients(params["text"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.5}, "loss.share is 1.5; a share lies between 0 and 1."),
        ({"rate": -0.1}, "loss.rate is -0.1; a share lies between 0 and 1."),
        ({"drop_caption": 2}, "loss.drop_caption is 2; a share lies between 0 and 1."),
        ({"time_spread": -1.0}, "loss.time_spread is -1.0; 0 (even) or a positive number is needed."),
        ({"mixed": 2.0}, "loss.mixed is 2.0; a share lies between 0 and 1."),
        ({"min_snr": -1.0}, "loss.min_snr is -1.0; 0 (off) or a positive number is needed."),
    ],
)
def test_losses_that_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        DiffusionLoss(**changes)
    assert str(error.value) == message


def test_as_built_from_a_config(batch):
    """Batches fit the source; a new run starts from the shipped autoencoder only."""
    config = smallest_story_config()
    objective = build_objective(config)
    assert objective.batch_spec == {
        "tokens": jax.ShapeDtypeStruct((2, 3, SIZES.text.length), np.int32),
        "images": jax.ShapeDtypeStruct((2, 3, SIDE, SIDE, 3), np.uint8),
    }
    assert {name: value.shape[1:] for name, value in batch.items()} == {
        name: spec.shape[1:] for name, spec in objective.batch_spec.items()
    }
    assert objective.config == SIZES and objective.options == DiffusionLoss(**config.loss)
    assert {path.split("/")[0] for path in objective.starting_weights()} == {"autoencoder"}
    assert f"panels of {SIDE} x {SIDE} pixels, from random initialisation" in objective.describe()
    assert "U-Net (full) and text encoder" in objective.describe()
