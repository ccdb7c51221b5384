"""A step that is not finite: training stops, the first tensor is named, and nothing of it is saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.data.pipeline import make_iterator
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.errors import TrainingStopped
from pixelstory_jax.training.loop import train
from tests.training.runs import finish_all, start_several
from tests.training.toy import ToyObjective, ToySource, toy_config

STEP = 8  # a step after which a checkpoint is due
EXAMPLES = 200  # none comes twice in a run
BATCHES = make_iterator(ToySource(EXAMPLES), 16, toy_config()["seed"], threads=0)
BAD = int([next(BATCHES)["index"][0] for _ in range(STEP)][-1])  # an example of the batch of that step


class Ballast(ToyObjective):
    """The loss has a root, whose gradient at 0 is not finite."""

    def init(self, rng):
        return {**super().init(rng), "ballast": jnp.full(3, 7.0)}

    def loss(self, params, batch, rng):
        loss, metrics = super().loss(params, batch, rng)
        bad = (batch["index"] == BAD).any()
        root = jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.square(params["ballast"]).sum())
        return loss + 1e-3 * root, metrics


class BadTerm(ToyObjective):
    """A metric that is not finite and no part of the loss."""

    def loss(self, params, batch, rng):
        loss, metrics = super().loss(params, batch, rng)
        return loss, {**metrics, "term": jnp.where((batch["index"] == BAD).any(), jnp.inf, 1.0)}


class NanWeights(ToyObjective):
    def starting_weights(self):
        return {"frozen/kernel": np.full((8, 8), np.inf, np.float32)}


@pytest.mark.parametrize(
    ("objective", "source", "step", "message"),
    [
        (Ballast(), ToySource(EXAMPLES), STEP, r"the gradient of ballast is not finite \(gradient_norm nan\)"),
        (BadTerm(), ToySource(EXAMPLES), STEP, r"term is not finite \(term inf\)"),
        (ToyObjective(nan_at=1), ToySource(EXAMPLES), None, r"the loss is not finite \(loss nan, error nan\)"),
        (
            ToyObjective(),
            ToySource(EXAMPLES, nan=BAD),
            STEP,
            r"the batch field x is not finite \(loss nan, .*, the gradient of first/bias ",
        ),
        (NanWeights(), ToySource(EXAMPLES), 1, r"the frozen parameter frozen/kernel is not finite \(loss nan"),
    ],
)
def test_the_first_tensor_is_named_and_nothing_of_the_step_is_saved(tmp_path, objective, source, step, message):
    with pytest.raises(TrainingStopped, match=message) as caught:
        train(toy_config(), objective, source, tmp_path)
    text = str(caught.value)
    assert "\n" not in text and (step is None or text.startswith(f"Step {step}: "))
    saved = sorted(int(folder.name) for folder in (tmp_path / "checkpoints/last").iterdir())
    assert saved == list(range(4, int(text.split(":")[0].removeprefix("Step ")), 4))
    assert f"last/{saved[-1]}" in text if saved else "there is no checkpoint yet" in text
    for number in saved:
        params = flatten(load_params(tmp_path / f"checkpoints/last/{number}")[0])
        assert all(np.isfinite(value).all() for value in params.values())
    usually_helps = not text.split(": ")[1].startswith(("the batch", "the frozen"))
    assert ("train.learning_rate" in text) == usually_helps


def test_an_update_that_is_not_finite_stops_before_it_is_saved(tmp_path, monkeypatch):
    """Loss and gradients of the step are finite: only the parameters after it tell."""
    from pixelstory_jax.training import loop

    build = loop.build_optimizer

    def bad_at_the_end(options, trained):
        optimizer = build(options, trained)

        def update(gradients, state, params):
            updates, new = optimizer.update(gradients, state, params)
            counts = [leaf for leaf in jax.tree.leaves(new) if leaf.dtype == jnp.int32 and leaf.ndim == 0]
            updates["first/bias"] = jnp.where(counts[0] == STEP, jnp.inf, updates["first/bias"])
            return updates, new

        return optimizer._replace(update=update)

    monkeypatch.setattr(loop, "build_optimizer", bad_at_the_end)
    with pytest.raises(
        TrainingStopped, match=rf"^Step {STEP}: the updated parameter first/bias is not finite; .*last/4"
    ):
        train(toy_config(), ToyObjective(), ToySource(EXAMPLES), tmp_path)
    assert not (tmp_path / "checkpoints/last" / str(STEP)).exists()


@pytest.mark.slow
def test_two_processes_both_stop_and_name_it(tmp_path):
    ended = finish_all(start_several(tmp_path, 2, "--fsdp=2", "--data=1", "--nan=17"))
    assert [code for code, _, _ in ended] == [2, 2], ended
    for _, _, errors in ended:
        assert "the batch field x is not finite (loss nan" in errors and "Traceback" not in errors
