"""Runs in processes of their own: killed, terminated, on eight simulated devices, and several processes as one run."""

from __future__ import annotations

import collections
import json
import shutil
import signal
import time

import numpy as np
import pytest

from pixelstory_jax.data.pipeline import make_iterator
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.metrics import read_metrics
from pixelstory_jax.training.options import TrainOptions
from tests.training.runs import (
    assert_close,
    assert_same,
    coordinator,
    finish,
    finish_all,
    losses,
    start,
    start_several,
    wait_for,
)
from tests.training.toy import ToyObjective, ToySource, toy_config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train(toy_config(), ToyObjective(), ToySource(), workdir)
    return workdir


def test_killed_and_resumed_equals_unbroken_bit_for_bit(unbroken, tmp_path):
    code, _, _ = finish(start(tmp_path, "--kill-at=10"))
    assert code == -signal.SIGKILL
    assert 1 <= max(losses(tmp_path)) < 12
    train(toy_config(), ToyObjective(), ToySource(), tmp_path)
    assert_same(tmp_path, unbroken)


def test_killed_right_after_an_evaluation_keeps_its_parameters(tmp_path):
    code, _, errors = finish(start(tmp_path, "--kill-after-evaluation"))
    assert code == -signal.SIGKILL, errors
    assert (tmp_path / "evaluations/step_000012").is_dir()
    assert [folder.name for folder in (tmp_path / "checkpoints/best").iterdir()] == ["12"]
    assert train(toy_config(), ToyObjective(), ToySource(), tmp_path).finished
    load_params(tmp_path / "checkpoints/best/12")


def test_sigterm_saves_and_exits_cleanly(unbroken, tmp_path):
    process = start(tmp_path, "--delay=0.02")  # a third of a second per step
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and losses(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = finish(process)
    assert code == 0, errors
    stopped = max(losses(tmp_path))
    assert f"Stopped by a signal at step {stopped}, saved" in output and f"--workdir={tmp_path}" in output
    assert "Traceback" not in errors and stopped < 12
    assert (tmp_path / "checkpoints/last" / str(stopped)).is_dir()
    train(toy_config(), ToyObjective(), ToySource(), tmp_path)
    assert losses(tmp_path) == losses(unbroken)


def test_sigterm_cuts_an_evaluation_short(tmp_path):
    process = start(tmp_path, TOY_SLOW_EVALUATION="60")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("evaluating"):
            break
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    code, output, errors = finish(process)
    assert code == 0 and time.monotonic() - begin < 30, errors
    assert (tmp_path / "checkpoints/last/12").is_dir() and "saved" in output
    train(toy_config(), ToyObjective(), ToySource(), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path, "evaluation")] == [12]


def test_eight_devices_give_the_losses_of_one_and_moments_lie_like_their_parameters(unbroken, tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    code, output, errors = finish(
        start(tmp_path, "--data=2", "--fsdp=2", "--tensor=-1", "--report-shardings", XLA_FLAGS=flags)
    )
    assert code == 0, errors
    assert "8 cpu device(s), 1 process(es), mesh data 2 x fsdp 2 x tensor 2" in output
    assert_close(tmp_path, unbroken)
    report = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    kernels = [spec for path, spec in report.items() if "first/kernel" in path or "['first']['kernel']" in path]
    assert kernels == [["fsdp", "tensor"]] * 4, report  # parameter, two moments, average


def test_a_run_on_one_device_continues_on_eight(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/last/12")
    flags = "--xla_force_host_platform_device_count=8"
    code, output, errors = finish(start(tmp_path, "--data=-1", "--fsdp=4", XLA_FLAGS=flags))
    assert code == 0, errors
    assert "Resuming at step 8" in output
    assert_close(tmp_path, unbroken)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """(workdir, outputs) of a run of four processes with sharded parameters."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    ended = finish_all(start_several(workdir, 4, "--data=1", "--fsdp=4", "--report-reads"))
    assert all(code == 0 for code, _, _ in ended), ended
    return workdir, [output for _, output, _ in ended]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(unbroken, tmp_path):
    for code, _, errors in finish_all(start_several(tmp_path, 2, "--data=1", "--fsdp=-1")):
        assert code == 0, errors
    assert_close(tmp_path, unbroken)
    whole, again = flatten(load_params(unbroken)[0]), flatten(load_params(tmp_path)[0])
    for path in whole:
        np.testing.assert_allclose(again[path], whole[path], rtol=1e-4, atol=1e-6)


def test_four_processes_give_the_losses_of_one_and_write_everything_once(unbroken, four):
    workdir, _ = four
    assert_close(workdir, unbroken)
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (workdir, unbroken)]
    for name in ("metrics.jsonl", "evaluations/step_000012/table.txt", "checkpoints/last/8", "checkpoints/last/12"):
        assert name in files[0] and name in files[1]
    assert sorted(path.name for path in (workdir / "checkpoints/last").iterdir()) == ["12", "8"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1 and not any("tmp" in name for name in files[0])


def test_each_process_reads_its_part_of_the_data_only(four):
    reports = [json.loads(line) for output in four[1] for line in output.splitlines() if line.startswith('{"process"')]
    options = TrainOptions.from_config(toy_config()["train"])
    batches = make_iterator(ToySource(), options.batch_size, toy_config()["seed"])
    ahead = options.prefetch + options.data_threads + 1  # batches that may have been begun when the run ends
    order = [next(batches)["index"].tolist() for _ in range(options.steps + ahead)]
    assert sorted(report["process"] for report in reports) == [0, 1, 2, 3]
    for report in reports:
        rows = slice(4 * report["process"], 4 * report["process"] + 4)
        own = [batch[rows] for batch in order]
        asked = collections.Counter(report["reads"])
        assert not collections.Counter(sum(own[: options.steps], [])) - asked
        assert not asked - collections.Counter(sum(own, []))


@pytest.mark.parametrize(
    ("count", "mesh"), [(1, ()), pytest.param(2, ("--data=1", "--tensor=2"), marks=pytest.mark.slow)]
)
def test_a_run_of_four_processes_continues_on_other_numbers_and_meshes(unbroken, four, tmp_path, count, mesh):
    shutil.copytree(four[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/last/12")
    ended = finish_all(start_several(tmp_path, count, *mesh) if count > 1 else [start(tmp_path, *mesh)])
    assert all(code == 0 for code, _, _ in ended), ended
    assert "Resuming at step 8" in ended[0][1]
    assert_close(tmp_path, unbroken)


@pytest.mark.slow
def test_a_run_of_two_processes_continues_on_four(unbroken, tmp_path):
    for code, _, errors in finish_all(start_several(tmp_path, 2, "--data=1", "--tensor=2")):
        assert code == 0, errors
    shutil.rmtree(tmp_path / "checkpoints/last/12")
    ended = finish_all(start_several(tmp_path, 4, "--data=2", "--fsdp=2"))
    assert all(code == 0 for code, _, _ in ended), ended
    assert "Resuming at step 8" in ended[0][1]
    assert_close(tmp_path, unbroken)


@pytest.mark.slow
def test_processes_that_do_not_share_the_workdir_are_told(tmp_path):
    place = coordinator(2)
    ended = finish_all([start(tmp_path / str(index), *place, f"--process={index}") for index in range(2)])
    for code, _, errors in ended:
        assert code == 2 and "(number 1)" in errors and "a disk that they share" in errors, ended
    assert not list(tmp_path.rglob(".process*")) and not list(tmp_path.rglob("checkpoints"))
