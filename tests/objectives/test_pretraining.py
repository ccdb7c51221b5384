"""Pretraining of the tiny tower and language model: targets of patches, falling loss, what is shipped."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from configs.pretrain_tiny import get_config
from pixelstory_jax.data import build_source
from pixelstory_jax.data.builtin.start import SHIPPED_PARTS
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.pretraining import CELLS, HEADS, PRETRAINED_PARTS, patch_targets
from tests.objectives.smallest import shrink, smallest_pixellm, smallest_pretraining


@pytest.fixture(scope="module")
def objective():
    return build_objective(smallest_pretraining())


@pytest.fixture(scope="module")
def batch():
    source = build_source(smallest_pretraining(), "train")
    return stack_examples([source[0], source[1]], [0, 1])


@pytest.fixture(scope="module")
def params(objective):
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.ones(leaf.shape, leaf.dtype)
            if path[-1].key == "scale"
            else rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype)
        ),
        shapes,
    )


def test_what_patches_show():
    """Two objects on an 8 x 8 canvas with patches of 4: the larger share owns a patch, a quarter is the least."""
    objects = np.zeros((1, 8, 8), np.uint8)
    objects[0, 0:4, 0:2] = 1  # half of patch 0
    objects[0, 0:4, 2:3] = 2  # a quarter of it
    objects[0, 0:1, 4:7] = 2  # 3 of 16 pixels of patch 1: too few
    objects[0, 4:8, 4:8] = 2  # all of patch 3
    owner, cells = patch_targets(objects, patch=4, count=3)
    assert owner.tolist() == [[1, 0, 0, 2]]
    assert cells.shape == (1, 4, CELLS**2)
    assert cells[0, 0].reshape(4, 4).tolist() == [[1, 1, 1, 0]] * 4
    assert cells[0, 1].tolist() == [1, 1, 1] + [0] * 13 and cells[0, 3].min() == 1


def test_batch_spec_is_what_the_source_gives(objective, batch):
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec.items()
    }


def test_the_loss_falls_on_one_repeated_batch(objective, batch, params):
    optimizer = optax.adamw(5e-3)

    @jax.jit
    def step(params, state):
        (value, terms), gradients = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, jax.random.key(0))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value, terms

    state, values, history = optimizer.init(params), [], []
    for _ in range(15):
        params, state, value, terms = step(params, state)
        values.append(float(value))
        history.append({name: float(term) for name, term in terms.items()})
    assert values[-1] < 0.9 * values[0], values
    for name in ("language", "names", "cells", "boxes"):
        assert history[-1][name] < history[0][name], name


def test_evaluation_reports_the_terms(objective, params):
    evaluation = objective.evaluate(params, 1)
    assert evaluation.score == evaluation.metrics["name_accuracy"] + evaluation.metrics["language_accuracy"]
    assert all(name in evaluation.table for name in ("language", "names", "boxes"))


def test_an_evaluation_of_nothing_is_refused_before_training():
    config = smallest_pretraining()
    config.eval.examples = 0
    with pytest.raises(ValueError, match="eval.examples is 0; at least 1 is needed"):
        build_objective(config)


def test_shipped_parts_are_parts_of_pixellm(objective):
    """Every shipped leaf exists in the PixelLM of the same sizes, in the same shape; the heads do not."""
    pretrained = flatten(jax.eval_shape(objective.init, jax.random.key(0)))
    pixellm = flatten(jax.eval_shape(build_objective(smallest_pixellm()).init, jax.random.key(0)))
    assert SHIPPED_PARTS == PRETRAINED_PARTS
    shipped = {path: leaf.shape for path, leaf in pretrained.items() if path.startswith(SHIPPED_PARTS)}
    assert shipped == {path: leaf.shape for path, leaf in pixellm.items() if path.startswith(SHIPPED_PARTS)}
    others = {path.split("/")[0] for path in pretrained.keys() - shipped.keys()}
    assert others - {"token_weights", "scale_weights"} == set(HEADS)  # the fusion weights exist but are not used
    assert all(objective.trainable(path) for path in pretrained)


def test_the_second_stage_leaves_the_tower_alone():
    config = shrink(get_config("language"))
    config.eval.examples = 2
    stage = build_objective(config)
    paths = flatten(jax.eval_shape(stage.init, jax.random.key(0)))
    trained = {path.split("/")[0] for path in paths if stage.trainable(path)}
    assert {"llama", "mm_projector"} <= trained and "vision" not in trained
