"""experiments.launch: several processes of one command, started, stopped and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from pixelstory_jax.training.metrics import read_metrics
from tests.data.readers.all_miniatures import MAKERS
from tests.experiments.test_commands import CONFIG, SMALLEST
from tests.training.runs import ROOT, finish, losses, wait_for


def launch(*arguments, **environment):
    command = [sys.executable, "-m", "experiments.launch", *arguments]
    pipe = subprocess.PIPE
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=pipe, stderr=pipe, text=True)


def toy(workdir, *arguments):
    return launch("--processes=2", "--", "tests.training.toy", f"--workdir={workdir}", *arguments)


def begun(workdir, process):
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and losses(workdir), process)


def members(workdir):
    """{index: process id} of the processes of a run that are alive."""
    lines = subprocess.run(
        ["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    own = [line.split() for line in lines if f"--workdir={workdir}" in line and "experiments.launch" not in line]
    return {int(word.removeprefix("--process=")): int(pid) for pid, *words in own for word in words[-1:]}


def test_help_and_what_is_wrong_with_a_line():
    code, output, _ = finish(launch("--help"))
    assert code == 0 and "--processes=4 -- train --config=" in output and "--devices: Simulated" in output
    for arguments, words in (
        (["--processes=2"], "Say what to run after --"),
        (["--", "segment", "--image=x.png"], "experiments.segment is no command for several processes; train is one"),
        (["--processes=0", "--", "train"], "are at least 1"),
    ):
        code, output, errors = finish(launch(*arguments))
        assert code == 2 and words in errors and errors.startswith("Error: ") and "Traceback" not in errors


def test_one_that_is_killed_ends_the_others_and_is_named(tmp_path):
    process = toy(tmp_path, "--delay=0.1")
    begun(tmp_path, process)
    os.kill(members(tmp_path)[1], signal.SIGKILL)
    begin = time.monotonic()
    code, _, errors = finish(process)
    assert code == 128 + signal.SIGKILL and time.monotonic() - begin < 30
    assert "Error: Process 1 of 2 was ended by SIGKILL, so the others were ended; run the same command again" in errors
    assert not members(tmp_path)


def test_the_notice_to_stop_reaches_all_and_they_save(tmp_path):
    process = toy(tmp_path, "--delay=0.1")
    begun(tmp_path, process)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 0, errors
    stopped = max(losses(tmp_path))
    assert f"Stopped by a signal at step {stopped}, saved" in output and stopped < 12
    assert (tmp_path / "checkpoints/last" / str(stopped)).is_dir() and not members(tmp_path)


def test_the_error_of_another_process_than_the_first_is_shown(tmp_path):
    config = tmp_path / "config.py"
    config.write_text("def get_config():\n    raise ValueError('nothing to see')\n", encoding="utf-8")
    code, _, errors = finish(launch("--processes=2", "--", "train", f"--config={config}", f"--workdir={tmp_path}/run"))
    assert code == 2 and "nothing to see" in errors and "Traceback" not in errors
    assert "has failed with exit code 2, so the others were ended" in errors


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALLEST)
def test_training_in_two_processes_of_two_devices_gives_the_losses_of_one(model, tmp_path):
    module, function = SMALLEST[model]
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(module=module, function=function, steps=2), encoding="utf-8")
    mesh = ("--config.train.mesh.data=1", "--config.train.mesh.fsdp=4")
    runs = {
        "one device": (("--processes=1",), ()),
        "one process": (("--processes=1", "--devices=4"), mesh),
        "two processes": (("--processes=2", "--devices=2"), mesh),
    }
    for name, (before, after) in runs.items():
        workdir = tmp_path / name.replace(" ", "_")
        line = ("train", f"--config={config}", f"--workdir={workdir}", "--config.train.batch_size=4")
        code, output, errors = finish(launch(*before, "--", *line, *after))
        assert code == 0, errors
    assert "4 cpu device(s), 2 process(es), mesh data 1 x fsdp 4 x tensor 1" in output
    alone, one, two = (read_metrics(tmp_path / name.replace(" ", "_"), "train") for name in runs)
    assert len(alone) == len(one) == len(two) == 2  # Adam blows up rounding errors in later ones
    for step in range(2):
        assert two[step]["loss"] == pytest.approx(alone[step]["loss"], rel=1e-6)
        for name in ("loss", "gradient_norm"):  # the same mesh, so the same sums
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-6)
    assert len(read_metrics(workdir, "evaluation")) == 1


@pytest.mark.slow
def test_a_mixture_in_four_processes_is_that_of_one(tmp_path):
    for name in ("ade20k", "refcoco", "muse"):
        MAKERS[name](tmp_path)
    config = tmp_path / "config.py"
    text = CONFIG.format(module="tests.objectives.smallest", function="smallest_mixture", steps=3)
    text = text.replace("smallest()", f"smallest({str(tmp_path)!r}, 'ade20k', 'refcoco', 'muse')")
    config.write_text(text.replace('"eval_every": 4', '"eval_every": 0'), encoding="utf-8")
    line = ("train", f"--config={config}", "--config.train.batch_size=4", "--config.train.mesh.data=4")
    runs = {"one": ("--processes=1", "--devices=4"), "four": ("--processes=4",)}
    for name, before in runs.items():
        code, output, errors = finish(launch(*before, "--", *line, f"--workdir={tmp_path / name}"))
        assert code == 0, errors
    assert "4 cpu device(s), 4 process(es)" in output
    one, four = (read_metrics(tmp_path / name, "train") for name in runs)
    assert len(one) == len(four) == 3 and len({step["loss"] for step in one}) == 3
    for alone, together in zip(one, four, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
