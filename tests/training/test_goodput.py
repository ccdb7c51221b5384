"""Where the time goes: sections, what a wait for data has cost, steps done twice, the warning."""

from __future__ import annotations

import time as real_time
import types

import jax
import pytest

from pixelstory_jax.training import goodput
from pixelstory_jax.training.goodput import DeviceWatch, SlowData, Stopwatch
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.metrics import read_metrics
from pixelstory_jax.training.options import TrainOptions
from tests.training.toy import ToyObjective, ToySource, toy_config


class Clock:
    """A time that passes only by `sleep`."""

    def __init__(self):
        self.now = 1000.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_time_counts_for_the_innermost_section(clock):
    watch = Stopwatch()
    with watch.section("step"):
        clock.sleep(1)
        with watch.section("data"):
            clock.sleep(2)
    assert watch.seconds["step"] == 1 and watch.seconds["data"] == 2 and watch.total == 3


def test_the_table_adds_up(clock):
    watch = Stopwatch()
    for section, seconds in (("compile", 20), ("step", 150), ("data", 40), ("repeat", 10)):
        with watch.section(section):
            clock.sleep(seconds)
    watch.move(25, "data", "step")
    clock.sleep(30)
    lines = [line.split() for line in watch.table().splitlines()]
    assert " ".join(lines[0]) == "Time 4:10, goodput 70 %:"
    assert [line[:3] for line in lines[1:]] == [
        ["compile", "0:20", "8"],
        ["data", "0:15", "6"],
        ["step", "2:55", "70"],
        ["repeat", "0:10", "4"],
        ["other", "0:30", "12"],
    ]


class Result:
    """An output of a step that is ready when the test says so."""

    def __init__(self, fails=False):
        self.ready, self.fails = False, fails

    def is_ready(self):
        if self.ready and self.fails:
            raise RuntimeError("out of memory")
        return self.ready


class Devices(DeviceWatch):
    def finish(self, result):
        result.ready = True
        while self._running:
            real_time.sleep(0.001)


@pytest.fixture
def devices(clock):
    watch = Devices()
    yield watch
    watch.close()


def test_a_wait_costs_only_what_the_devices_were_idle(clock, devices):
    step = Result()
    devices.started(step)
    begin = clock.now
    clock.sleep(3)
    assert devices.busy_seconds(begin, clock.now) == 3  # still at it
    devices.finish(step)
    clock.sleep(2)
    assert devices.busy_seconds(begin, clock.now) == 3  # of 5
    assert devices.busy_seconds(clock.now, clock.now + 1) == 0
    devices.started(Result())
    assert devices.busy_seconds(clock.now, clock.now + 1) == 1


def test_a_step_that_fails_does_not_end_the_watch(clock, devices):
    for result in (Result(fails=True), Result()):
        devices.started(result)
        devices.finish(result)
    assert devices.busy_seconds(clock.now, clock.now + 1) == 0


def test_the_watch_ends_with_the_run_even_while_a_step_hangs():
    watch = DeviceWatch()
    watch.started(Result())
    watch.close()
    watch._thread.join(10)
    assert not watch._thread.is_alive()


def warnings_of(waits, **options):
    slow = SlowData(TrainOptions.from_config(options))
    seconds, warnings = {"data": 0.0, "step": 0.0, "repeat": 0.0}, {}
    for step, wait in enumerate(waits, 1):
        seconds["data"] += wait
        seconds["step"] += 1.0
        text = slow.after_step(step, seconds)
        if text:
            warnings[step] = text
    return warnings


def test_slow_data_are_reported_once_in_a_while():
    assert warnings_of([100.0] + [0.1] * 300) == {}  # the first batch always takes its time
    warnings = warnings_of([0.0] * 100 + [1.0] * 900)
    assert len(warnings) == 2 and 100 < min(warnings) < 110 and max(warnings) == min(warnings) + SlowData.EVERY
    text = warnings[max(warnings)]
    assert "waited for data for 50 % of the last 50 steps" in text and "\n" not in text
    assert "raise train.data_threads (now 2) or set train.data_processes" in text and "train.prefetch (now 4)" in text
    (text, *_) = warnings_of([1.0] * 60, data_processes=3).values()
    assert "raise train.data_processes (now 3)" in text and "data_threads" not in text


class SlowModel(ToyObjective):
    def loss(self, params, batch, rng):
        jax.debug.callback(lambda: real_time.sleep(0.05))
        return super().loss(params, batch, rng)


def test_waits_for_data_are_told_from_waits_for_the_model(tmp_path, capsys):
    """How much each waits depends on the machine, so that only the larger part is asked for."""
    source = ToySource(delay=0.002)  # 16 examples of a batch by two threads: 16 ms a batch
    slow = train(toy_config(steps=60, checkpoint_every=0), ToyObjective(), source, tmp_path / "data")
    assert "The devices waited for data" in capsys.readouterr().out
    assert slow.seconds["data"] > slow.seconds["step"]
    fine = train(toy_config(steps=60, checkpoint_every=0), SlowModel(), source, tmp_path / "model")
    assert fine.seconds["step"] > 55 * 0.05 > fine.seconds["data"]


def test_steps_done_a_second_time_are_no_goodput(tmp_path, capsys):
    class Dies(ToySource):
        taken = 0

        def __getitem__(self, index):
            Dies.taken += 1
            if Dies.taken > 16 * 11:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train(toy_config(data_threads=0), ToyObjective(), Dies(), tmp_path)
    reached = max(line["step"] for line in read_metrics(tmp_path, "train"))
    assert reached >= 10
    result = train(toy_config(), ToyObjective(), ToySource(delay=0.002), tmp_path)
    assert result.seconds["repeat"] > 0 and result.seconds["step"] > 0
    (time,) = read_metrics(tmp_path, "time")
    assert time["goodput"] == pytest.approx(time["step_seconds"] / time["total_seconds"], rel=0.01)
    parts = sum(value for name, value in time.items() if name.endswith("_seconds") and name != "total_seconds")
    assert parts == pytest.approx(time["total_seconds"], rel=0.02)
    assert "steps that a killed run had done" in capsys.readouterr().out
    assert train(toy_config(), ToyObjective(), ToySource(), tmp_path / "other").seconds["repeat"] == 0
