"""Runs of the toy in processes of their own, and what they leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.metrics import read_metrics

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


def coordinator(count):
    """The arguments of `count` processes that find one another at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return (f"--coordinator=localhost:{free.getsockname()[1]}", f"--processes={count}")


def start_several(workdir, count, *arguments):
    """`count` processes as one run."""
    place = coordinator(count)
    return [start(workdir, *place, f"--process={index}", *arguments) for index in range(count)]


def finish_all(processes):
    """[(exit code, output, errors)] of several processes."""
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_same(workdir, whole):
    """The losses of both runs and their last parameters are equal, bit for bit."""
    assert losses(workdir) == losses(whole)
    again, first = (flatten(load_params(folder / "checkpoints/last")[0]) for folder in (workdir, whole))
    assert again.keys() == first.keys()
    assert all(np.array_equal(again[path], first[path]) for path in first)


def assert_close(workdir, whole):
    """The losses of two runs on other devices or processes are equal but for the order of their sums."""
    one, other = losses(whole), losses(workdir)
    assert one.keys() == other.keys()
    np.testing.assert_allclose([other[step] for step in one], list(one.values()), rtol=1e-6)


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
