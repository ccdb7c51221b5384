"""Runs in processes of their own: killed, terminated, on eight simulated devices, and two processes as one run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.metrics import read_metrics
from tests.training.toy import ToyObjective, ToySource, toy_config

ROOT = Path(__file__).resolve().parents[2]


def start(workdir, *arguments, **environment):
    command = [sys.executable, "-m", "tests.training.toy", f"--workdir={workdir}", *arguments]
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    try:
        output, errors = process.communicate(timeout=400)  # on a machine that is busy with something else
    finally:
        process.kill()
    return process.returncode, output, errors


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, "train")}


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
    assert losses(tmp_path) == losses(unbroken)
    again, whole = flatten(load_params(tmp_path)[0]), flatten(load_params(unbroken)[0])
    assert all(np.array_equal(again[path], whole[path]) for path in whole)


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
    one, eight = losses(unbroken), losses(tmp_path)
    np.testing.assert_allclose([eight[step] for step in one], list(one.values()), rtol=2e-6)
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
    one, moved = losses(unbroken), losses(tmp_path)
    np.testing.assert_allclose([moved[step] for step in one], list(one.values()), rtol=2e-6)


def test_two_processes_give_the_losses_of_one(unbroken, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
    processes = [
        start(tmp_path, coordinator, "--processes=2", f"--process={index}", "--data=1", "--fsdp=-1") for index in (0, 1)
    ]
    try:
        for process in processes:
            code, _, errors = finish(process)
            assert code == 0, errors
    finally:
        for process in processes:
            process.kill()
    one, two = losses(unbroken), losses(tmp_path)
    assert one.keys() == two.keys()
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=2e-6)
    whole, again = flatten(load_params(unbroken)[0]), flatten(load_params(tmp_path)[0])
    for path in whole:
        np.testing.assert_allclose(again[path], whole[path], rtol=1e-4, atol=1e-6)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
