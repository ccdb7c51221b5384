"""The PixelLM objective: what it trains, where it starts, that its loss falls, and that its batches fit its source."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from experiments.command_line import user_errors
from pixelstory_jax.data import build_source
from pixelstory_jax.data.builtin.start import StartError
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.pixellm import PixelLMOutput
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.objectives.pixellm import LossWeights, PixelLMObjective
from pixelstory_jax.training.errors import CheckpointError
from pixelstory_jax.training.state import split_trained
from tests.objectives.smallest import drawn_params, smallest_pixellm

STEPS = 15


def trained_paths(objective) -> set[str]:
    return {p for p in flatten(jax.eval_shape(objective.init, jax.random.key(0))) if objective.trainable(p)}


def all_paths(objective) -> set[str]:
    return set(flatten(jax.eval_shape(objective.init, jax.random.key(0))))


def parts(paths: set[str]) -> set[str]:
    return {path.split("/")[0] for path in paths}


@pytest.fixture(scope="module")
def config():
    return smallest_pixellm()


@pytest.fixture(scope="module")
def objective(config):
    return build_objective(config)


@pytest.fixture(scope="module")
def batch(config):
    source = build_source(config, "train")
    return stack_examples([source[3], source[4]], [3, 4])


@pytest.fixture(scope="module")
def params(objective):
    return drawn_params(objective)


def test_batch_spec_is_what_the_source_gives(objective, batch):
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec.items()
    }
    assert batch["target_valid"].any(1).all()


def test_the_loss_falls_on_one_repeated_batch(objective, batch, params):
    trained, frozen = split_trained(params, objective.trainable)
    optimizer = optax.adamw(5e-3)

    @jax.jit
    def step(trained, state):
        def loss(trained):
            return objective.loss(unflatten({**trained, **frozen}), batch, jax.random.key(0))

        (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value, terms, optax.tree.norm(gradients)

    state, values, history = optimizer.init(trained), [], []
    for _ in range(STEPS):
        trained, state, value, terms, norm = step(trained, state)
        values.append(float(value))
        history.append({name: float(term) for name, term in terms.items()})
        assert np.isfinite(norm) and norm > 0
    assert values[-1] < 0.8 * values[0], values
    for name in ("language", "bce"):
        assert history[-1][name] < history[0][name], (name, history[0], history[-1])
    # The sum that is minimised is the weighted sum of the terms that are shown.
    first = history[0]
    weights = objective.weights
    total = weights.language * first["language"] + weights.dice * first["dice"]
    total += weights.bce * (first["bce"] + first["refinement"])
    np.testing.assert_allclose(values[0], total, rtol=1e-5)


class FixedMasks:
    """Stands for the model: the same logits whatever the parameters, so that it is known which masks overlap."""

    def __init__(self, masks: np.ndarray, vocab: int, tokens: tuple[int, ...]) -> None:
        self.output = PixelLMOutput(jnp.zeros((*tokens, vocab)), jnp.zeros(()), jnp.asarray(masks), ())

    def apply(self, variables, batch, rng) -> PixelLMOutput:
        return self.output


@pytest.mark.parametrize(
    ("mode", "weight", "questions", "expected"),
    [
        ("paper", 2.0, (0, 0), "on"),
        ("paper", 1.0, (0, 0), "off"),
        ("paper", 2.0, (0, 1), "off"),  # masks of different questions may overlap
        ("faithful", 2.0, (0, 0), "off"),  # switched off in the released code
    ],
)
def test_target_refinement(objective, mode, weight, questions, expected):
    """Two masks that cover the left half both, of which only the first is right."""
    masks = np.full((1, 2, 8, 8), -1.0, np.float32)
    masks[..., :4] = 1.0
    truth = np.zeros((1, 2, 8, 8), np.uint8)
    truth[0, 0, :, :4] = 1
    batch = {
        "labels": np.full((1, 2, 4), -100, np.int32),
        "image_size": np.full((1, 2), 8, np.int32),
        "target_masks": truth,
        "target_valid": np.ones((1, 2), bool),
        "target_question": np.asarray([questions], np.int32),
    }
    config = dataclasses.replace(objective.config, mode=mode)
    fixed = PixelLMObjective(config, {}, LossWeights(refinement=weight), objective.trained, objective.evaluator)
    fixed.model = FixedMasks(masks, 7, (1, 2, 4))
    total, terms = fixed.loss({}, batch, jax.random.key(0))
    wrong, right = np.log1p(np.exp(1.0)), np.log1p(np.exp(-1.0))
    bce = (right + (right + wrong) / 2) / 2  # the first mask is right everywhere, the second on one half
    extra = (right / 2 + wrong / 2) / 2 if expected == "on" else 0.0  # the left halves count twice
    np.testing.assert_allclose(terms["bce"], bce, rtol=1e-5)
    np.testing.assert_allclose(terms["refinement"], extra, atol=1e-6)
    np.testing.assert_allclose(total, 2 * (bce + extra) + 0.5 * terms["dice"], rtol=1e-5)


def test_what_paper_mode_trains(config):
    paths = trained_paths(build_objective(config))
    assert {"neck", "prompt_encoder", "mask_decoder", "token_weights", "scale_weights"} <= parts(paths)
    assert {"llama", "mm_projector", "out_mm_projector", "text_projector"} <= parts(paths)
    assert "vision" not in parts(paths)
    assert not any("position_matrix" in path for path in paths)


def test_what_faithful_mode_trains():
    config = smallest_pixellm()
    config.model.mode = "faithful"
    objective = build_objective(config)
    assert {"neck", "prompt_encoder"} <= parts(all_paths(objective))
    assert not {"neck", "prompt_encoder", "token_weights", "scale_weights"} & parts(trained_paths(objective))
    assert {"mask_decoder", "text_projector"} <= parts(trained_paths(objective))


def test_what_lora_trains():
    """Of a frozen language model: the low-rank leaves, the embeddings and the output head, as in the released code."""
    config = smallest_pixellm()
    config.model.llama.lora.rank = 2
    config.trained.update({"vision": False, "language_model": False})
    objective = build_objective(config)
    inside = {path for path in trained_paths(objective) if path.startswith("llama/")}
    adapters = {path for path in inside if "lora_" in path}
    assert {path.split("/")[-2] for path in adapters} == {"query", "value"}
    assert {path.split("/")[1] for path in inside - adapters} == {"embedding", "head"}
    assert adapters == {path for path in all_paths(objective) if "lora_" in path}
    assert "LoRA of rank 2" in objective.describe() and "language model" in objective.describe()


def test_a_vision_tower_can_be_trained():
    config = smallest_pixellm()
    config.trained.vision = True
    assert "vision" in parts(trained_paths(build_objective(config)))


def test_starting_weights_replace_initialised_ones(objective, tmp_path):
    path = "mm_projector/first/bias"
    shape = flatten(jax.eval_shape(objective.init, jax.random.key(0)))[path].shape
    save_file({path: np.full(shape, 0.25, np.float16)}, tmp_path / "start.safetensors")
    config = smallest_pixellm()
    config.init_from = str(tmp_path / "start.safetensors")
    started = build_objective(config)
    assert str(tmp_path / "start.safetensors") in started.describe()
    placed = placed_state(config, started)
    assert (flatten(placed)[path] == 0.25).all()
    assert "random initialisation" in objective.describe() and not objective.starting_weights()


def placed_state(config, objective):
    """What the trainer makes of the starting weights, from zeros in place of the initialisation."""
    from pixelstory_jax.training.sharding import build_mesh
    from pixelstory_jax.training.state import TrainState, place_starting_weights, state_shardings

    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=(), ema=None)
    shardings = state_shardings(jax.eval_shape(lambda: state), objective.sharding_rules, build_mesh({"data": 1}))
    return place_starting_weights(state, objective.starting_weights(), shardings).params


def test_starting_weights_that_do_not_fit_are_all_named(tmp_path):
    save_file(
        {"mm_projector/first/bias": np.zeros(3, np.float32), "llama/no_such_leaf": np.zeros(2, np.float32)},
        tmp_path / "start.safetensors",
    )
    config = smallest_pixellm()
    config.init_from = str(tmp_path / "start.safetensors")
    with pytest.raises(
        CheckpointError, match=r"llama/no_such_leaf is unknown; mm_projector/first/bias has shape \[3\]"
    ):
        placed_state(config, build_objective(config))


def test_only_a_run_that_starts_anew_needs_its_starting_weights(tmp_path):
    """A file that was moved, is damaged or was never named is no matter to those who have a checkpoint."""
    config = smallest_pixellm()
    config.allow_random_frozen = False
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    absent, cut = str(tmp_path / "absent.safetensors"), str(tmp_path / "cut.safetensors")
    for source, words in ((absent, "absent.safetensors: no such file"), (cut, "cut.safetensors: not a whole")):
        config.init_from = source
        built = build_objective(config)
        assert source in built.describe()
        with pytest.raises(StartError, match=f"config.init_from.*{words}"):
            built.starting_weights()
    config.init_from = ""
    with pytest.raises(StartError, match="would stay frozen at random initialisation"):
        build_objective(config).starting_weights()
    assert issubclass(StartError, user_errors())  # one sentence at the command line


def test_wrong_configs_are_refused():
    config = smallest_pixellm()
    config.objective = "segmentation"
    with pytest.raises(
        ValueError, match="Unknown objective 'segmentation'; known are pixellm, storydiffusion, pretraining"
    ):
        build_objective(config)
    config = smallest_pixellm()
    config.model.llama.vocab = 500
    with pytest.raises(ValueError, match="model.llama.vocab is 500"):
        build_objective(config)
    config = smallest_pixellm()
    config.data.name = "coco"
    with pytest.raises(ValueError, match="Unknown data 'coco'; known are builtin, photos and mixture"):
        build_objective(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval.batch_size": 0}, "eval.batch_size is 0; at least 1 is needed"),
        ({"eval.examples": 0}, "eval.examples is 0"),
        ({"eval.quick_examples": -1}, "eval.quick_examples is -1"),
        ({"eval.max_new_tokens": 0}, "eval.max_new_tokens is 0"),
        ({"eval.splits": ()}, "eval.splits is empty"),
        ({"eval.max_new_tokens": 500}, "eval.max_new_tokens=500 .*set eval.max_new_tokens to at most 424"),
        ({"data.length": 512}, "data.length=512 leaves no room for an answer in model.llama.max_length=512"),
    ],
)
def test_an_evaluation_that_would_fail_is_refused_before_training(fields, message):
    config = smallest_pixellm()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message) as caught:
        build_objective(config)
    assert "\n" not in str(caught.value)


def test_the_longest_answer_that_fits_is_not_refused():
    config = smallest_pixellm()
    config.eval.max_new_tokens = 424
    build_objective(config)


def test_every_parameter_has_a_sharding_rule_or_is_small(config):
    """What no rule matches is replicated: that must stay a small part of the 7B model."""
    import re

    from configs.pixellm import get_config
    from pixelstory_jax.models.pixellm import PixelLMConfig
    from pixelstory_jax.models.sizes import sizes_from_config

    sizes = sizes_from_config(PixelLMConfig, get_config("7b").model)
    base = build_objective(config)
    large = PixelLMObjective(sizes, base.batch_spec, LossWeights(), base.trained, base.evaluator)
    spec = {
        "image": jax.ShapeDtypeStruct((1, 448, 448, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((1, 2), np.int32),
        "tokens": jax.ShapeDtypeStruct((1, 1, 300), np.int32),
        "token_valid": jax.ShapeDtypeStruct((1, 1, 300), bool),
        "target_positions": jax.ShapeDtypeStruct((1, 1, sizes.group), np.int32),
    }
    large.batch_spec = spec
    flat = flatten(jax.eval_shape(large.init, jax.random.key(0)))
    free = {
        path: leaf.size
        for path, leaf in flat.items()
        if not any(re.search(rule, path) for rule, _ in large.sharding_rules)
    }
    total = sum(leaf.size for leaf in flat.values())
    assert total > 6.5e9 and sum(free.values()) < 0.01 * total, sorted(free, key=free.get)[-5:]
