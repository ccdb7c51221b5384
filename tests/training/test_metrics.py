"""What is written while a run goes on, and what happens when there is no room for it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from pixelstory_jax.training.metrics import MetricWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]


def read_events(folder):
    """Every event of a folder, in TensorBoard's order, with both checksums of each record checked."""
    events = []
    for path in sorted(folder.glob("*tfevents*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            length, length_sum = struct.unpack_from("<QI", content, start)
            body = content[start + 12 : start + 12 + length]
            (body_sum,) = struct.unpack_from("<I", content, start + 12 + length)
            assert masked_crc32c(content[start : start + 8]) == length_sum and masked_crc32c(body) == body_sum
            events.append(Event.FromString(body))
            start += 16 + length
    return events


def test_what_was_written_is_in_the_files_before_they_are_closed(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.scalars(3, "train", {"loss": 0.5, "bad": float("nan")})
    writer.images(3, "evaluation", {"sheet": np.full((4, 6, 3), 9, np.uint8)})
    assert read_metrics(tmp_path) == [{"step": 3, "kind": "train", "loss": 0.5, "bad": None}]
    head, scalars, image = read_events(tmp_path / "tensorboard")
    assert head.file_version == "brain.Event:2" and scalars.step == image.step == 3
    values = {value.tag: value.simple_value for value in scalars.summary.value}
    assert values["train/loss"] == 0.5 and np.isnan(values["train/bad"]) and len(values) == 2
    (value,) = image.summary.value
    assert value.tag == "evaluation/sheet" and (value.image.height, value.image.width) == (4, 6)
    writer.close()


def test_a_resumed_run_purges_the_steps_that_it_does_again(tmp_path):
    for first_step in (0, 5):
        writer = MetricWriter(tmp_path, first_step)
        for step in range(first_step + 1, 9):
            writer.scalars(step, "train", {"loss": 1.0 * step})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 9))
    starts = [e.step for e in read_events(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
    assert starts == [6]


FULL_DISK = """
import resource, sys
import numpy as np
from pixelstory_jax.training.errors import UserError
from pixelstory_jax.training.loop import train
from tests.training.toy import ToyObjective, ToySource, toy_config

class Pictures(ToyObjective):
    def evaluate(self, params, step):
        # Noise of 12 kB: each PNG has room, but not the event file that holds several.
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        noise = np.random.default_rng(step).integers(0, 256, (64, 64, 3), np.uint8)
        evaluation = super().evaluate(params, step)
        evaluation.images["noise"] = noise
        return evaluation

try:
    train(toy_config(steps=60, eval_every=2), Pictures(), ToySource(), sys.argv[1])
except UserError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_for_pictures_ends_the_run_with_one_sentence(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("Error: The disk or the quota of") == 1 and "Traceback" not in result.stderr
    assert "make room and run the same command again" in result.stderr
    assert not list(tmp_path.rglob("*tmp*"))
