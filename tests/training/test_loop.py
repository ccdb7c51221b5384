"""The loop in one process: files it leaves, frozen parameters, resume, accumulation, errors."""

from __future__ import annotations

import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training import loop
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.errors import ConfigError, TrainingStopped, UserError
from pixelstory_jax.training.loop import compare_configs, train
from pixelstory_jax.training.metrics import read_metrics
from pixelstory_jax.training.optimizer import build_optimizer
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.state import make_state, split_trained
from tests.training.toy import ToyObjective, ToySource, toy_config


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, "train")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of 12 steps, evaluated at 6 and 12."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = train(toy_config(eval_every=6), ToyObjective(), ToySource(), workdir)
    return workdir, result


def test_run_leaves_what_it_promises(finished, capsys):
    workdir, result = finished
    assert result.finished and result.step == 12 and result.evaluation.score == 12.0
    assert json.loads((workdir / "config.json").read_text())["train"]["eval_every"] == 6
    assert losses(workdir).keys() == set(range(1, 13))
    assert [line["step"] for line in read_metrics(workdir, "evaluation")] == [6, 12]
    assert np.asarray(Image.open(workdir / "evaluations/step_000006/sheet.png")).tolist() == [[[6] * 3] * 8] * 8
    assert (workdir / "evaluations/step_000012/table.txt").read_text().startswith("size")
    table = (workdir / "parameters.txt").read_text()
    assert "frozen/kernel  [8, 8]   float32  64     frozen" in table and "FLOPs per step" in table
    assert sorted(p.name for p in (workdir / "checkpoints/last").iterdir()) == ["12", "8"]
    assert [p.name for p in (workdir / "checkpoints/best").iterdir()] == ["12"]
    assert list((workdir / "tensorboard").glob("events*"))
    assert not list(workdir.rglob("*tmp*"))
    assert sum(result.seconds.values()) > 0


def test_the_table_at_the_end_is_of_the_best_parameters(tmp_path, capsys):
    objective = ToyObjective(best_at=6)
    result = train(toy_config(eval_every=6), objective, ToySource(), tmp_path)
    shown = capsys.readouterr().out
    size = float(np.square(load_params(tmp_path)[0]["second"]["kernel"]).sum())  # what segment and evaluate load
    assert f"size {size:.3f}" == result.evaluation.table and f"size {size:.3f}" in shown
    assert "parameters of step 6" in shown and result.scores == tmp_path / "evaluations/step_000006"
    # Like every last evaluation it was a complete one: the objective was told the last step.
    assert json.loads((result.scores / "records.jsonl").read_text()) == {"step": 12}
    assert (tmp_path / "evaluations/step_000012/table.txt").read_text() != (result.scores / "table.txt").read_text()
    assert [line["step"] for line in read_metrics(tmp_path, "evaluation")] == [6, 12]

    again = train(toy_config(eval_every=6), objective, ToySource(), tmp_path)
    shown = capsys.readouterr().out
    assert f"size {size:.3f}" in shown and "parameters of step 6" in shown and "checkpoints/best" in shown
    assert again.finished and again.evaluation is None and again.scores == result.scores


def test_a_run_killed_while_the_best_parameters_are_evaluated_does_it_on_resume(tmp_path):
    class Dies(ToyObjective):
        calls = 0

        def evaluate(self, params, step):
            Dies.calls += 1
            if Dies.calls == 3:
                raise RuntimeError("power cut")
            return super().evaluate(params, step)

    with pytest.raises(RuntimeError, match="power cut"):
        train(toy_config(eval_every=6), Dies(best_at=6), ToySource(), tmp_path)
    result = train(toy_config(eval_every=6), ToyObjective(best_at=6), ToySource(), tmp_path)
    assert json.loads((result.scores / "records.jsonl").read_text()) == {"step": 12}


def test_the_loss_falls(finished, tmp_path):
    train(toy_config(steps=150, log_every=10, checkpoint_every=0), ToyObjective(), ToySource(), tmp_path / "run")
    values = losses(tmp_path / "run")
    assert values[150] < 0.7 * values[1]


def test_frozen_parameters_stay_and_have_no_moments(finished):
    workdir, _ = finished
    objective, options = ToyObjective(), TrainOptions.from_config(toy_config()["train"])
    start = flatten(jax.jit(objective.init)(jax.random.fold_in(jax.random.key(3), 0x1217)))
    params = flatten(load_params(workdir / "checkpoints/last")[0])
    np.testing.assert_array_equal(params["frozen/kernel"], start["frozen/kernel"])
    assert not np.array_equal(params["first/kernel"], start["first/kernel"])

    trained, frozen = split_trained(objective.init(jax.random.key(0)), objective.trainable)
    assert list(frozen) == ["frozen/kernel"]
    state = jax.eval_shape(lambda: make_state(objective, build_optimizer(options, trained), 0.9, 0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]
    assert sum("first/kernel" in path for path in paths) == 2  # two moments
    assert not any("frozen" in path for path in paths) and "frozen/kernel" not in state.ema


def test_gradients_of_frozen_parameters_are_not_computed():
    class Watched(ToyObjective):
        def loss(self, params, batch, rng):
            seen.append(type(params["frozen"]["kernel"]).__name__)
            seen.append(type(params["first"]["kernel"]).__name__)
            return super().loss(params, batch, rng)

    seen: list[str] = []
    objective, options = Watched(), TrainOptions.from_config(toy_config()["train"])
    params = objective.init(jax.random.key(0))
    optimizer = build_optimizer(options, split_trained(params, objective.trainable)[0])
    state = make_state(objective, optimizer, 0.0, 0)
    batch = {name: np.zeros(spec.shape, spec.dtype) for name, spec in objective.batch_spec.items()}
    loop.build_step(objective, optimizer, options, 0)(state, batch)
    frozen, trained = seen
    assert frozen != trained and "Tracer" in trained and "Tracer" not in frozen


def test_resumed_run_equals_the_unbroken_one_and_evaluation_does_not_disturb(finished, tmp_path):
    workdir, _ = finished
    part = tmp_path / "part"
    train(toy_config(steps=12, schedule="cosine"), ToyObjective(), ToySource(), tmp_path / "whole")
    assert losses(tmp_path / "whole") == losses(workdir)  # one evaluated at 6 and 12, the other only at 12

    class Interrupted(ToySource):
        taken = 0

        def __getitem__(self, index):
            Interrupted.taken += 1
            if Interrupted.taken > 16 * 7:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train(toy_config(eval_every=6, data_threads=0), ToyObjective(), Interrupted(), part)
    assert max(losses(part)) >= 6
    train(toy_config(eval_every=6), ToyObjective(), ToySource(), part)
    assert losses(part) == losses(workdir)
    whole, again = flatten(load_params(workdir)[0]), flatten(load_params(part)[0])
    assert all(np.array_equal(whole[path], again[path]) for path in whole)
    assert [line["step"] for line in read_metrics(part, "evaluation")] == [6, 12]


def test_evaluation_cut_off_after_its_checkpoint_is_done_on_resume(tmp_path):
    class Dies(ToyObjective):
        def evaluate(self, params, step):
            if step == 6:
                raise RuntimeError("power cut")
            return super().evaluate(params, step)

    with pytest.raises(RuntimeError, match="power cut"):
        train(toy_config(eval_every=6), Dies(), ToySource(), tmp_path)
    train(toy_config(eval_every=6), ToyObjective(), ToySource(), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path, "evaluation")] == [6, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["init", "compile"])
def test_a_signal_before_the_first_step_stops_like_one_within_the_loop(
    finished, tmp_path, monkeypatch, capsys, number, moment
):
    def unhandled(number, frame):
        raise AssertionError("the run does not handle the signal")

    class Signalled(ToyObjective):
        def starting_weights(self):
            if moment == "init":
                os.kill(os.getpid(), number)
            return {}

    compile_step, compiled = loop._Run._compile, []

    def compile_and_signal(run):
        if moment == "compile":
            os.kill(os.getpid(), number)
        compiled.append(True)
        return compile_step(run)

    usual = signal.signal(number, unhandled)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(loop._Run, "_compile", compile_and_signal)
            result = train(toy_config(eval_every=6), Signalled(), ToySource(), tmp_path)
        assert signal.getsignal(number) is unhandled
    finally:
        signal.signal(number, usual)
    assert not result.finished and result.step == 0
    assert bool(compiled) == (moment == "compile")
    assert (
        f"Stopped by a signal at step 0, saved; to resume, run it with --workdir={tmp_path}" in capsys.readouterr().out
    )
    assert train(toy_config(eval_every=6), ToyObjective(), ToySource(), tmp_path).finished
    assert losses(tmp_path) == losses(finished[0])


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path):
    class NoDropout(ToyObjective):
        def loss(self, params, batch, rng):
            x = batch["x"] @ params["frozen"]["kernel"]
            error = ((x @ params["first"]["kernel"] @ params["second"]["kernel"] - batch["y"]) ** 2).mean()
            return error, {}

    for count in (1, 4):
        train(toy_config(accumulate=count), NoDropout(), ToySource(), tmp_path / str(count))
    one, four = losses(tmp_path / "1"), losses(tmp_path / "4")
    np.testing.assert_allclose(list(one.values()), list(four.values()), rtol=1e-5)


def test_nan_stops_with_the_step_and_the_terms(tmp_path):
    objective = ToyObjective(nan_at=-1)
    train(toy_config(steps=4), objective, ToySource(), tmp_path)
    with pytest.raises(TrainingStopped, match=r"Step 5: .*loss nan.*last/4.*train.learning_rate") as caught:
        train(toy_config(steps=12), _AlwaysNan(), ToySource(), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints/last/4").is_dir() and not (tmp_path / "checkpoints/last/8").exists()


class _AlwaysNan(ToyObjective):
    def loss(self, params, batch, rng):
        loss, terms = super().loss(params, batch, rng)
        return loss * np.nan, terms


def test_data_that_do_not_fit_are_listed(tmp_path):
    class Wrong(ToySource):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {"x": example["x"].astype(np.float64), "y": example["y"], "extra": example["x"]}

    with pytest.raises(TrainingStopped) as caught:
        train(toy_config(), ToyObjective(), Wrong(), tmp_path)
    text = str(caught.value)
    assert "extra is not expected" in text and "index is missing" in text
    assert "x is float64[16, 8], not float32[16, 8]" in text


def test_broken_example_stops_with_its_number(tmp_path):
    with pytest.raises(TrainingStopped, match="Example 17 .*picture is truncated"):
        train(toy_config(), ToyObjective(), ToySource(broken=17), tmp_path)


def test_starting_weights_replace_initialised_ones_strictly(tmp_path):
    class Started(ToyObjective):
        weights = {"frozen/kernel": np.eye(8, dtype=np.float32)}

        def starting_weights(self):
            return self.weights

    train(toy_config(steps=2), Started(), ToySource(), tmp_path / "good")
    params, _ = load_params(tmp_path / "good")
    np.testing.assert_array_equal(params["frozen"]["kernel"], np.eye(8))
    Started.weights = {"frozen/kernel": np.eye(7, dtype=np.float32), "nothing": np.zeros(1)}
    with pytest.raises(Exception, match=r"frozen/kernel has shape \[7, 7\], not \[8, 8\]; nothing is unknown"):
        train(toy_config(steps=2), Started(), ToySource(), tmp_path / "bad")


def test_changed_configs():
    old = toy_config()
    assert compare_configs(old, toy_config()) == []
    (note,) = compare_configs(old, toy_config(steps=20, clip_norm=2.0))
    assert "train.steps was 12, is 20" in note and "train.clip_norm was None, is 2.0" in note
    with pytest.raises(ConfigError, match="model.width was 16, is 32"):
        compare_configs(old, {**old, "model": {"width": 32}})


def test_mesh_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train.mesh \(data=3, fsdp=1, tensor=1\) does not fit 1 device"):
        train(toy_config(mesh={"data": 3}), ToyObjective(), ToySource(), tmp_path)


def test_the_loop_waits_for_a_step_only_when_the_next_one_is_on_its_way(tmp_path, monkeypatch):
    """A value that is read before the next step is handed out would make the devices idle."""
    events = []

    class Watched:
        """An output of a step that notes when something on the host wants its value."""

        def __init__(self, array, step):
            self.array, self.step = array, step

        def __getattr__(self, name):  # __float__ and the like are looked up on the class, which has none of them
            events.append((name, self.step))
            return getattr(self.array, name)

    def compile_watched(run):
        compiled, flops = compile_step(run)

        def step(state, batch):
            number = run.step + 1
            events.append(("started", number))
            state, scalars = compiled(state, batch)
            return state, {name: Watched(array, number) for name, array in scalars.items()}

        return step, flops

    def fetch(tree):
        steps = {leaf.step for leaf in jax.tree.leaves(tree)}
        events.extend(("fetched", step) for step in steps)
        return device_get(jax.tree.map(lambda leaf: leaf.array, tree))

    compile_step, device_get = loop._Run._compile, jax.device_get
    monkeypatch.setattr(loop._Run, "_compile", compile_watched)
    monkeypatch.setattr(loop.jax, "device_get", fetch)
    with monkeypatch.context() as patched:
        patched.setattr("pixelstory_jax.training.goodput.DeviceWatch.started", lambda *_: None)
        train(toy_config(steps=5, checkpoint_every=0), ToyObjective(), ToySource(), tmp_path)
    expected = [("started", 1)]
    for step in range(1, 5):
        expected += [("started", step + 1), ("fetched", step)]
    assert events == [*expected, ("fetched", 5)]


def test_what_is_not_on_the_devices_is_not_sent_there_by_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.sharding, "global_batch", lambda batch, *_: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(toy_config(steps=3), ToyObjective(), ToySource(), tmp_path)


def test_a_bucket_is_refused_as_workdir_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the address of a bucket.*docs/slices.md"):
        train(toy_config(), ToyObjective(), ToySource(), "gs://bucket/run")
    assert not list(tmp_path.iterdir())
