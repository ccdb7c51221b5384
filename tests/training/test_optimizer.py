"""Schedules, weight decay masks and learning rate factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.models.paths import unflatten
from pixelstory_jax.training.checkpoints import _state_from_trees, _train_tree
from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.optimizer import (
    build_optimizer,
    decay_mask,
    learning_rate_factors,
    learning_rate_schedule,
)
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.state import TrainState


@pytest.mark.parametrize("warmup", [20, 0.2])
def test_warmup_then_cosine(warmup):
    options = TrainOptions(steps=100, learning_rate=2.0, warmup_steps=warmup, final_fraction=0.1)
    schedule = learning_rate_schedule(options)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == pytest.approx(2.0 / 20) and rates[19] == pytest.approx(2.0) == max(rates)
    assert rates[60] == pytest.approx(2.0 * (0.9 * 0.5 + 0.1)) and rates[100] == pytest.approx(0.2)
    assert np.all(np.diff(rates[20:]) < 0)


def test_linear_and_constant():
    linear = learning_rate_schedule(TrainOptions(steps=10, learning_rate=1.0, schedule="linear"))
    assert [float(linear(s)) for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    constant = learning_rate_schedule(TrainOptions(steps=10, learning_rate=1.0, schedule="constant", warmup_steps=2))
    assert [float(constant(s)) for s in (0, 1, 2, 9)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_decay_leaves_out_norms_biases_embeddings_and_vectors_even_when_stacked():
    shapes = {
        "layers/attention/query/kernel": (4, 8, 8),
        "layers/attention/query/bias": (4, 8),
        "layers/input_norm/weight": (4, 8),
        "tokens/embedding": (10, 8),
        "fusion": (3,),
        "vision/position_embedding": (50, 8),
        "vision/class_embedding": (1, 8),
        "token_weights": (2, 3),
        "scale_weights": (1, 2),
        "mask_decoder/level_embedding": (2, 8),
        "mask_decoder/mask_tokens": (4, 8),
        "mask_decoder/iou_token": (1, 8),
        "mask_decoder/mask_heads/bias_0": (4, 8),
        "mask_decoder/mask_heads/kernel_0": (4, 8, 8),
        "prompt_encoder/mask_0_bias": (1, 8),
        "prompt_encoder/no_mask": (1, 8),
        "prompt_encoder/points": (4, 8),
        "prompt_encoder/not_a_point": (1, 8),
    }
    mask = decay_mask({path: jnp.zeros(shape) for path, shape in shapes.items()}, TrainOptions().no_decay)
    assert [path for path, decays in mask.items() if decays] == [
        "layers/attention/query/kernel",
        "mask_decoder/mask_heads/kernel_0",
    ]


def test_longest_prefix_of_whole_components_gives_the_factor():
    paths = ["llama/a/kernel", "llama/b", "llama2/a"]
    factors = learning_rate_factors(paths, {"llama/a": 0.5, "llama": 0.1})
    assert factors == {"llama/a/kernel": 0.5, "llama/b": 0.1, "llama2/a": 1.0}
    with pytest.raises(ConfigError, match="no trained parameter starts with lama"):
        learning_rate_factors(paths, {"lama": 0.1})


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_optimizers_minimise_decay_and_scale(name):
    trained = {"a/kernel": jnp.full((4, 4), 2.0), "b/kernel": jnp.full((4, 4), 2.0), "c": jnp.full(4, 2.0)}
    options = TrainOptions(
        steps=10,
        optimizer=name,
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.5,
        clip_norm=0,
        learning_rate_multipliers={"b": 0.5},
    )
    optimizer = build_optimizer(options, trained)
    state = optimizer.init(trained)
    zero = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = optimizer.update(zero, state, trained)
    # Without a gradient only the decay moves: rate * decay * weight, halved by the factor, and never for vectors.
    np.testing.assert_allclose(updates["a/kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["b/kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["c"], 0)
    updates, _ = optimizer.update(trained, state, trained)
    assert all(np.all(np.asarray(update) < 0) for update in updates.values())


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_state_of_every_optimizer_goes_through_a_checkpoint_tree_and_back(name):
    trained = {"layers/a/kernel": jnp.ones((2, 8, 8)), "layers/a/bias": jnp.ones((2, 8)), "b": jnp.ones(3)}
    opt_state = build_optimizer(TrainOptions(optimizer=name), trained).init(trained)
    state = TrainState(jnp.int32(1), unflatten(trained), opt_state, None)
    back = _state_from_trees(state.params, _train_tree(state), state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_options_name_the_field_that_is_wrong():
    with pytest.raises(ConfigError, match="no field train.learning_rat; did you mean train.learning_rate"):
        TrainOptions.from_config({"learning_rat": 1})
    for section, words in (
        ({"steps": 0}, "train.steps must be at least 1"),
        ({"schedule": "cosin"}, "train.schedule must be one of cosine, linear, constant"),
        ({"batch_size": 6, "accumulate": 4}, "multiple of train.accumulate"),
        ({"mesh": {"model": 2}}, "axes data, fsdp and tensor, got model"),
        ({"ema": 1.0}, "train.ema"),
        ({"no_decay": "("}, r"train.no_decay must be a regular expression, got '\(' \(missing"),
        ({"muon_matrices": "["}, r"train.muon_matrices must be a regular expression, got '\['"),
        ({"mesh": 8}, "train.mesh must be a dict, got 8"),
        ({"mesh": {"data": "all"}}, "train.mesh: data must be a whole number, got 'all'"),
        ({"learning_rate_multipliers": {"neck": {}}}, "train.learning_rate_multipliers: neck must be a number, got {}"),
        ({"steps": "many"}, "train.steps must be a whole number, got 'many'"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainOptions.from_config(section)
