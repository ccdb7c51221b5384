"""Rate and time left on a terminal and in a log, with a clock that the tests turn."""

from __future__ import annotations

import io
import re
import types

import pytest

from pixelstory_jax.training import goodput, progress
from pixelstory_jax.training.progress import Progress, Work
from tests.training.toy import ToyObjective, ToySource, toy_config

SHARES = dict.fromkeys((*goodput.SECTIONS, "other"), 0.0)


class Clock:
    """A time that passes only by `sleep`."""

    def __init__(self):
        self.now = 1000.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_an_evaluation_leaves_rate_and_time_left_as_they_were(clock, monkeypatch, stream):
    shown = stream()
    monkeypatch.setattr("sys.stderr", shown)
    bar = Progress(0, 2000, Work(8), quiet_seconds=0)
    for step in range(1, 201):
        clock.sleep(0.5)
        bar.update(step, {"loss": 0.25}, SHARES)
        if step == 199:
            with bar.pause():
                clock.sleep(600)
    bar.close()
    last = re.split(r"[\r\n]+", shown.getvalue().strip())[-1]
    assert "200/2000" in last and "loss 0.25" in last
    assert "16 examples/s" in last and "15:00 left" in last, last  # 1800 steps of half a second


def test_rate_and_time_left_are_those_of_the_last_steps(clock, capsys):
    bar = Progress(100, 400, Work(2), quiet_seconds=0)
    for step in range(101, 201):
        clock.sleep(8.0 if step <= 150 else 0.5)
        bar.update(step, {}, SHARES)
    assert "4 examples/s" in capsys.readouterr().err.splitlines()[-1]
    clock.sleep(0.5)
    bar.update(201, {}, SHARES)
    assert capsys.readouterr().err.strip().endswith("| 1:39 left")


def test_a_log_gets_a_line_only_now_and_then_and_at_the_end(clock, capsys):
    bar = Progress(0, 100, Work(1), quiet_seconds=30)
    for step in range(1, 101):
        clock.sleep(1.0)
        bar.update(step, {}, SHARES)
    steps = [line.split("/")[0] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["step 1", "step 31", "step 61", "step 91", "step 100"]


def test_rates_by_hand(clock, capsys):
    """8 examples of one picture and 400 tokens in half a second; 4 * 10^9 operations of at most 20 * 10^9 a second."""
    bar = Progress(0, 10, Work(8, {"images": 1, "tokens": 400}, flops=4e9, peak=20e9), quiet_seconds=0)
    clock.sleep(0.5)
    assert bar.update(1, {}, SHARES) == {
        "examples_per_second": 16,
        "images_per_second": 16,
        "tokens_per_second": 6400,
        "model_flops_per_second": 8e9,
        "mfu": 0.4,
    }
    assert "16 images/s 6.4 k tokens/s 8 GFLOP/s (MFU 40.0 %)" in capsys.readouterr().err


def test_without_a_data_sheet_there_is_no_utilisation():
    work = Work(8, flops=4e9)
    assert "mfu" not in work.rates(2.0) and "MFU" not in work.describe(work.rates(2.0))


def test_waits_for_checkpoints_and_evaluations_are_no_part_of_the_rate(tmp_path, monkeypatch):
    from pixelstory_jax.training import loop

    paused = []

    class Watched(Progress):
        def close(self):
            paused.append(self._away)
            super().close()

    save = loop.Checkpoints.save_last

    def slow(self, *values):
        real.sleep(0.2)
        save(self, *values)

    import time as real

    class Slow(ToyObjective):
        def evaluate(self, params, step):
            real.sleep(0.3)
            return super().evaluate(params, step)

    monkeypatch.setattr(loop, "Progress", Watched)
    monkeypatch.setattr(loop.Checkpoints, "save_last", slow)
    loop.train(toy_config(eval_every=12, checkpoint_every=4), Slow(), ToySource(), tmp_path)
    assert paused[0] >= 3 * 0.2 + 0.3
