"""Training of the panel classifier: augmentation, falling loss, the frozen autoencoder, evaluation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.panel_classifier import get_config
from pixelstory_jax.data import build_source
from pixelstory_jax.data.builtin.start import StartError
from pixelstory_jax.data.labelled_panels import HEADS
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.panel_classifier import Augmentation, disturbed, smoothed

NOTHING = Augmentation(decoded=0, latent_noise=0, blur=0, noise=0, colour=0)


def smallest(autoencoder: str = ""):
    config = get_config()
    config.autoencoder = autoencoder
    config.model.update({"channels": (8, 16), "features": 16, "groups": 4})
    config.data.size = 32
    config.train.update({"batch_size": 4, "steps": 2})
    config.eval.examples = 6
    return config


@pytest.fixture(scope="module")
def alone():
    return build_objective(smallest())


@pytest.fixture(scope="module")
def batch():
    source = build_source(smallest())
    return stack_examples([source[i] for i in range(4)], range(4))


@pytest.fixture(scope="module")
def params(alone):
    return jax.jit(alone.init)(jax.random.key(0))


def test_smoothing_keeps_flat_pictures_and_the_mean():
    flat = jnp.full((1, 6, 6, 3), 0.3)
    np.testing.assert_allclose(smoothed(flat), flat, rtol=1e-6)
    dot = np.zeros((1, 5, 5, 1), np.float32)
    dot[0, 2, 2, 0] = 16
    expected = np.outer([1, 2, 1], [1, 2, 1])
    np.testing.assert_allclose(smoothed(dot)[0, 1:4, 1:4, 0], expected)
    assert float(smoothed(dot).sum()) == 16


def test_augmentation_of_nothing_only_mirrors():
    images = jax.random.uniform(jax.random.key(0), (32, 8, 8, 3), minval=-1)
    changed = np.asarray(disturbed(images, NOTHING, jax.random.key(1)))
    kept = (changed == images).all((1, 2, 3))
    mirrored = (changed == images[:, :, ::-1]).all((1, 2, 3))
    assert (kept | mirrored).all() and 4 < kept.sum() < 28


@pytest.mark.parametrize("name", ["blur", "noise", "colour"])
def test_each_change_is_drawn_for_each_panel_and_bounded(name):
    options = Augmentation(**{**NOTHING.__dict__, name: 0.2})
    images = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), (1, 16, 8, 3), minval=-1), (64, 16, 8, 3))
    images = jnp.concatenate([images, images[:, :, ::-1]], axis=2)  # symmetric: mirroring changes nothing
    error = np.abs(disturbed(images, options, jax.random.key(1)) - images)
    size = error.mean((1, 2, 3))
    assert size.std() > 0.2 * size.mean() > 0
    # A blur moves a value by at most 2, noise stays within five deviations, colour scales and shifts.
    assert error.max() < {"blur": 0.4, "noise": 1.0, "colour": 0.4}[name]


def test_shares_and_strengths_are_checked():
    with pytest.raises(ValueError, match="augmentation.decoded is 2; a share"):
        Augmentation(decoded=2)
    with pytest.raises(ValueError, match="augmentation.noise is -1; it must not be negative"):
        Augmentation(noise=-1)


def test_batch_spec_is_what_the_source_gives(alone, batch):
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in alone.batch_spec.items()
    }


def test_the_loss_falls_on_one_repeated_batch(alone, batch, params):
    optimizer = optax.adam(5e-3)

    @jax.jit
    def step(params, state):
        (value, terms), gradients = jax.value_and_grad(alone.loss, has_aux=True)(params, batch, jax.random.key(0))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, terms

    state, history = optimizer.init(params), []
    for _ in range(40):
        params, state, value, terms = step(params, state)
        assert float(value) == pytest.approx(sum(float(terms[head]) for head in HEADS), rel=1e-5)
        history.append({name: float(term) for name, term in terms.items()})
    for head in HEADS:
        assert history[-1][head] < 0.5 * history[0][head], head


def test_every_head_has_its_own_label(alone, batch, params):
    """A wrong label of one head raises the loss of that head alone."""
    loss = jax.jit(alone.loss)
    terms = loss(params, batch, jax.random.key(0))[1]
    for head in HEADS:
        other = {**batch, head: (batch[head] + 1) % 5}
        changed = loss(params, other, jax.random.key(0))[1]
        assert {name for name in HEADS if changed[name] != terms[name]} == {head}


@pytest.fixture(scope="module")
def with_autoencoder(params):
    """An objective whose autoencoder is random: it makes something else of every picture."""
    objective = build_objective(smallest("builtin"))
    shapes = jax.eval_shape(objective.init, jax.random.key(0))["autoencoder"]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    return objective, {**params, "autoencoder": drawn}


def test_the_autoencoder_is_the_shipped_one_and_stays_frozen(with_autoencoder):
    objective, params = with_autoencoder
    frozen = {path: leaf.shape for path, leaf in flatten(params).items() if not objective.trainable(path)}
    assert {path.split("/")[0] for path in frozen} == {"autoencoder"}
    assert {path: array.shape for path, array in objective.starting_weights().items()} == frozen


def test_half_of_a_batch_goes_through_the_autoencoder(with_autoencoder):
    _, params = with_autoencoder
    config = smallest("builtin")
    config.augmentation.update(NOTHING.__dict__)
    config.augmentation.decoded = 0.5
    images = jax.random.uniform(jax.random.key(2), (4, 32, 32, 3), minval=-1)
    changed = jax.jit(build_objective(config).augmented)(params, images, jax.random.key(3))
    as_they_are = [
        any(np.allclose(new, old, atol=1e-6) for old in (image, image[:, ::-1]))
        for new, image in zip(np.asarray(changed), np.asarray(images), strict=True)
    ]
    assert as_they_are == [False, False, True, True]


def test_evaluation_also_shows_decoded_panels(with_autoencoder):
    objective, params = with_autoencoder
    evaluation = objective.evaluate(params, 1)
    assert set(evaluation.metrics) == {
        f"{head}_{name}" for head in HEADS for name in ("real", "decoded", "decoded_noisy")
    }
    images = objective.held_out()["image"]  # six, one and a half batches
    decoded = objective._all_decoded(params, images, 0.0)
    again = objective._all_decoded(params, images[2:], 0.0)
    assert decoded.shape == images.shape and not np.array_equal(decoded, images)
    assert np.abs(decoded[2:].astype(int) - again).max() <= 1  # rounding
    assert (decoded != objective._all_decoded(params, images, 0.5)).mean() > 0.05


def test_a_missing_autoencoder_is_named():
    with pytest.raises(StartError, match="config.autoencoder names cannot be read: nowhere.safetensors"):
        build_objective(smallest("nowhere.safetensors"))


def test_evaluation_reports_every_head_on_held_out_panels(alone, params):
    evaluation = alone.evaluate(params, 1)
    assert set(evaluation.metrics) == {f"{head}_real" for head in HEADS}
    assert evaluation.score == pytest.approx(np.mean(list(evaluation.metrics.values())))
    assert all(word in evaluation.table for word in (*HEADS, "a robot", "climbing"))
    images = alone.held_out()["image"]
    assert images.shape == (6, 32, 32, 3)
    assert not np.array_equal(images[0], build_source(smallest())[0]["image"])


def test_sizes_that_do_not_fit():
    config = smallest()
    config.data.size = 34
    with pytest.raises(ValueError, match="data.size is 34; the networks need a multiple of 4"):
        build_objective(config)
    config = smallest()
    config.eval.examples = 0
    with pytest.raises(ValueError, match="eval.examples is 0"):
        build_objective(config)
