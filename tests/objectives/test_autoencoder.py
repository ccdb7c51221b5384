"""The autoencoder's objective: terms by hand, a falling loss, scores; its pictures; the file that is shipped."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs.autoencoder_tiny import get_config
from pixelstory_jax.data import build_source
from pixelstory_jax.data.pictures import Pictures
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.interop.autoencoder_table import read_autoencoder_file, write_autoencoder_file
from pixelstory_jax.models.autoencoder import Autoencoder, byte_pixels, signed_pixels
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.autoencoder import (
    comparison_sheet,
    edge_loss,
    halve,
    measure_scale,
    normal_divergence,
    signal_to_noise,
)
from tests.objectives.smallest import drawn_params


def smallest() -> ConfigDict:
    config = get_config()
    config.model.update({"block_channels": (8, 8, 8), "latent_channels": 4, "groups": 2})
    config.data.size = 32
    config.train.update({"batch_size": 2, "steps": 2})
    config.eval.examples = 4
    return config


@pytest.fixture(scope="module")
def objective():
    return build_objective(smallest())


@pytest.fixture(scope="module")
def batch():
    source = build_source(smallest(), "train")
    return stack_examples([source[0], source[1]], [0, 1])


@pytest.fixture(scope="module")
def params(objective):
    return drawn_params(objective)


def test_edges_by_hand():
    """A step of 2 that the other picture lacks: 2 of 4 horizontal differences are missed, no vertical one."""
    images = np.zeros((1, 2, 3, 1), np.float32)
    images[:, :, 1:] = 2
    assert float(edge_loss(images, np.zeros_like(images))) == pytest.approx(2 * 2 / 4)
    assert float(edge_loss(images, images + 5)) == 0, "brightness alone moves no edge"


def test_divergence_by_hand():
    assert float(normal_divergence(jnp.zeros(3), jnp.zeros(3))) == 0
    assert float(normal_divergence(jnp.full(3, 2.0), jnp.zeros(3))) == pytest.approx(2.0)
    narrow = jnp.log(jnp.full(3, 0.01))
    assert float(normal_divergence(jnp.zeros(3), narrow)) == pytest.approx(0.5 * (0.01 - 1 + np.log(100)), rel=1e-5)


def test_signal_to_noise_by_hand():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    others = images.copy()
    others[1] += 10
    expected = [10 * np.log10(255**2 / 1e-3), 20 * np.log10(25.5)]
    np.testing.assert_allclose(signal_to_noise(images, others), expected, rtol=1e-5)
    np.testing.assert_allclose(signal_to_noise(others, images), expected, rtol=1e-5)  # no wrap-around of uint8


def test_comparison_sheet():
    rows = [np.full((2, 4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    rows[0][1] = 11
    page = comparison_sheet(rows, scale=2)
    assert page.shape == (3 * 4 * 2, 2 * 6 * 2, 3)
    assert page[0, 0, 0] == 10 and page[0, -1, 0] == 11 and page[8, 0, 0] == 20 and page[-1, -1, 0] == 30


def test_batch_spec_is_what_the_source_gives(objective, batch):
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec.items()
    }


def test_the_loss_is_the_weighted_sum_of_its_terms(objective, batch, params):
    total, terms = objective.loss(params, batch, jax.random.key(0))
    weights = smallest().loss
    assert float(total) == pytest.approx(sum(weights[name] * float(terms[name]) for name in weights), rel=1e-5)
    images = signed_pixels(batch["image"])
    _, mean, logvar = objective.model.apply({"params": params}, images, jnp.zeros((2, 8, 8, 4)))
    assert float(terms["divergence"]) == pytest.approx(float(normal_divergence(mean, logvar)), rel=1e-5)
    assert float(terms["latent_deviation"]) == pytest.approx(float(mean.std()), rel=1e-5)


def test_halved_latents_decode_to_the_halved_picture(objective, batch, params):
    """Means of four latents against means of four pixels; the means, not every second one."""
    np.testing.assert_allclose(halve(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, ..., 0], [[2.5, 4.5], [10.5, 12.5]])
    images, key = signed_pixels(batch["image"]), jax.random.key(0)
    noise = jax.random.normal(key, (2, 8, 8, 4))
    _, mean, logvar = objective.model.apply({"params": params}, images, noise)
    small = halve(mean + jnp.exp(0.5 * logvar) * noise)
    decoded = objective.model.apply({"params": params}, small, method=Autoencoder.decode)
    expected = float(jnp.abs(decoded - halve(images)).mean())
    assert float(objective.loss(params, batch, key)[1]["halved"]) == pytest.approx(expected, rel=1e-5)


def test_latents_are_drawn(objective, batch, params):
    """Another key draws other latents, so other pictures; the distribution is the same."""
    terms = [objective.loss(params, batch, jax.random.key(seed))[1] for seed in (0, 0, 1)]
    assert terms[0]["absolute"] == terms[1]["absolute"] != terms[2]["absolute"]
    assert terms[0]["divergence"] == terms[2]["divergence"]


def test_the_loss_falls_on_one_repeated_batch(objective, batch):
    optimizer = optax.adamw(5e-3)

    @jax.jit
    def step(params, state):
        (value, terms), gradients = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, jax.random.key(0))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, terms

    params = jax.jit(objective.init)(jax.random.key(0))
    state, values, history = optimizer.init(params), [], []
    for _ in range(40):
        params, state, value, terms = step(params, state)
        values.append(float(value))
        history.append({name: float(term) for name, term in terms.items()})
    assert values[-1] < 0.6 * values[0], values
    for name in ("absolute", "squared", "edges"):
        assert history[-1][name] < history[0][name], name


def test_evaluation(objective, params):
    evaluation = objective.evaluate(params, 1)
    assert evaluation.score == evaluation.metrics["psnr"]
    assert all(name in evaluation.table for name in ("psnr", "psnr_disturbed", "psnr_drawn", "latent_deviation"))
    assert evaluation.images["reconstructions"].shape == (3 * 32 * 2, 2 * 32 * 2, 3)
    held_out = Pictures(seed=smallest().seed, split="test", size=32, scenes=0.0)
    scores = []
    for index in range(4):
        image = held_out[index]["image"][None]
        mean, _ = objective.model.apply({"params": params}, signed_pixels(image), method=Autoencoder.encode)
        decoded = objective.model.apply({"params": params}, mean, method=Autoencoder.decode)
        scores.append(float(signal_to_noise(image, byte_pixels(decoded))[0]))
    assert evaluation.score == pytest.approx(np.mean(scores), abs=1e-3)


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("eval", "examples", 1, r"eval.examples is 1; at least one batch \(2\) is needed"),
        ("data", "size", 30, "data.size is 30; model.block_channels needs a multiple of 8"),
    ],
)
def test_what_is_refused_before_training(section, name, value, message):
    config = smallest()
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        build_objective(config)


def test_pictures_are_panels_scenes_and_their_mirror_images():
    panels, scenes = (Pictures(seed=1, split="train", size=32, scenes=share) for share in (0.0, 1.0))
    mixed = Pictures(seed=1, split="train", size=32, scenes=0.5)
    kinds = []
    for index in range(12):
        image = mixed[index]["image"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        np.testing.assert_array_equal(image, mixed[index]["image"])
        kinds.append(bool(np.array_equal(image, panels[index]["image"])))
    assert 0 < sum(kinds) < 12
    stories = panels._stories
    mirrored = [not np.array_equal(panels[i]["image"], stories[i]["images"][0]) for i in range(12)]
    assert 0 < sum(mirrored) < 12
    flipped = mirrored.index(True)
    np.testing.assert_array_equal(panels[flipped]["image"], stories[flipped]["images"][0][:, ::-1])
    assert not np.array_equal(scenes[0]["image"], Pictures(seed=1, split="test", size=32, scenes=1.0)[0]["image"])


def test_pictures_refuse():
    with pytest.raises(ValueError, match="share of scenes must lie in 0..1, got 2"):
        Pictures(seed=1, split="train", size=32, scenes=2)
    with pytest.raises(IndexError, match="example 3 of a source of 3"):
        Pictures(seed=1, split="train", size=32, scenes=0, length=3)[3]


def test_shipping_measures_the_scale(tmp_path, objective, params):
    """Latents of the shipped file, scaled, have unit deviation on held-out pictures."""
    scaled, metrics = measure_scale(objective, params)
    write_autoencoder_file(tmp_path / "out.safetensors", scaled, params, "test")
    config, read = read_autoencoder_file(tmp_path / "out.safetensors")
    assert config == scaled
    deviation = objective.evaluate(read, 0).metrics["latent_deviation"]
    assert deviation == pytest.approx(metrics["latent_deviation"], rel=1e-2)
    assert config.scaling_factor * deviation == pytest.approx(1, rel=1e-2)


def test_a_run_has_to_be_named():
    done = subprocess.run([sys.executable, "-m", "experiments.ship_autoencoder"], capture_output=True, text=True)
    assert done.returncode != 0 and "Say which run: --workdir=" in done.stderr and "Traceback" not in done.stderr
