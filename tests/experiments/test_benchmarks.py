"""The benchmarks: what is compared and refused, the roofline, the table, and every row at small size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import random_weights, table
from experiments.benchmarks.first_call import NAMES, FirstCall
from experiments.benchmarks.machine import roofline_seconds
from experiments.benchmarks.measure import Result, compare, measure
from experiments.benchmarks.report import Report
from experiments.benchmarks.row import Stage
from experiments.benchmarks.rows import all_rows, find_row
from experiments.benchmarks.work import generation_stages, our_side, stage_of
from experiments.benchmarks.worker import arrays
from pixelstory_jax.models.llama import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
PEAKS = {"float32": 100e9, "convolution": 50e9, "bfloat16": 200e9, "memory": 10e9}
SHORT = ("attention, 1024 tokens, heads of 40", "consistent attention, 8 panels", "SDXL block, 32 x 32 of 640")
RESULT = Result("a row", "float32", 0.9, 0.75, ours=0.02, torch=0.03, stages=(Stage({"float32": 1.6e9}, 1e6),))


def problem_of(name: str) -> str:
    """What comparing both sides of a small row says, in this process."""
    pytest.importorskip("torch")
    row = find_row(name, quick=True)
    ours, theirs = row.ours(), row.torch()
    passes = [(arrays(ours.run()), arrays(theirs.run())) for _ in range(row.warmups)]
    assert all(stage.bytes > 0 for stage in ours.stages())
    has_products = sum(sum(stage.flops.values()) for stage in ours.stages()) > 0
    assert has_products != name.startswith("data pipeline")
    return compare([one for one, _ in passes], [other for _, other in passes], row.tolerance)[1]


@pytest.mark.parametrize("name", SHORT)
def test_both_sides_of_a_row_agree(name):
    pytest.importorskip("diffusers")
    assert problem_of(name) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in all_rows(quick=True) if row.name not in SHORT])
def test_both_sides_of_every_row_agree(name):
    pytest.importorskip("diffusers")
    assert problem_of(name) == ""


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip("diffusers")
    row = find_row("consistent attention, 4 panels", quick=True)
    ours = row.ours()
    numbers = random_weights.normal_numbers()
    monkeypatch.setattr(random_weights, "normal_numbers", lambda: 1.01 * numbers)
    theirs = row.torch()
    error, problem = compare([arrays(ours.run())], [arrays(theirs.run())], row.tolerance)
    assert error > 1e-3 and "differs from PyTorch's by" in problem


def test_what_is_compared():
    one = [np.array([1.0, -4.0], np.float32), np.array([3, 5])]
    assert compare([one], [one], 0.0) == (0.0, "")
    near = [np.array([1.0, -4.2], np.float32), np.array([3, 5])]
    error, problem = compare([near], [one], 0.1)
    assert error == pytest.approx(0.05) and problem == ""
    assert compare([near], [one], 0.01)[1] == "Output 0 differs from PyTorch's by 0.05 of its largest number"
    other = [one[0], np.array([3, 6])]
    assert compare([one, other], [one, one], 0.1)[1] == "Output 3 differs from PyTorch's in 1 whole numbers"
    assert "has the shape [1], PyTorch's [2]" in compare([[one[0][:1]]], [[one[0]]], 0.1)[1]
    assert compare([[np.array([np.nan], np.float32)]], [[np.ones(1, np.float32)]], 0.1)[1]


def test_work_and_roofline():
    def function(x, y):
        return x @ y

    stage = stage_of(function, jnp.ones((8, 16)), jnp.ones((16, 4)), times=3, unread=64.0)
    assert stage == Stage({"float32": 2 * 8 * 16 * 4}, 4 * (8 * 16 + 16 * 4 + 8 * 4) - 64, times=3)
    half = stage_of(function, jnp.ones((8, 16), "bfloat16"), jnp.ones((16, 4), "bfloat16"))
    assert list(half.flops) == ["bfloat16"]
    computing, reading = Stage({"float32": 1e9, "convolution": 1e9}, 1e6), Stage({"bfloat16": 1e6}, 1e9, times=2)
    assert roofline_seconds([computing, reading], PEAKS) == pytest.approx(0.01 + 0.02 + 2 * 0.1)


def test_generation_reads_all_weights_for_every_token():
    config = LlamaConfig(vocab=50, width=32, layers=2, heads=2, kv_heads=2, mlp_width=48)
    from experiments.benchmarks.language_rows import our_llama

    prefill, step = generation_stages(config, our_llama(config, random_weights.draw_tensor), 3, prompt=7, new=5)
    matrices = config.layers * (4 * 32 * 32 + 3 * 32 * 48)
    attention = config.layers * 4 * 32 * (7 + 5)
    assert prefill.flops["float32"] == 3 * (7 * (2 * matrices + attention) + 2 * 32 * 50)
    assert step.flops["float32"] == 3 * (2 * matrices + attention + 2 * 32 * 50)
    assert (prefill.times, step.times) == (1, 4)
    assert step.bytes > 4 * (matrices + 32 * 50)


def test_a_side_runs_what_it_counts():
    side = our_side(lambda x: (x @ x, x), jnp.ones((4, 4)), outputs=lambda result: result[0])
    np.testing.assert_array_equal(side.run(), np.full((4, 4), 4))
    assert side.stages() == [Stage({"float32": 128.0}, 3 * 64)]


def test_targets():
    line = RESULT.on(PEAKS)
    assert line.ratio == pytest.approx(1.5) and line.share == pytest.approx(0.8) and line.met
    assert not Result("slow", "float32", 0.9, None, ours=0.02, torch=0.01).met
    assert not Result("far from the roofline", "float32", 0.9, 0.75, ours=0.02, torch=0.03, roofline=0.01).met
    assert Result("steady", "float32", 1.0, None, our_times=(1.0, 1.1, 2.0)).steady
    assert not Result("disturbed", "float32", 1.0, None, our_times=(1.0, 1.4, 2.0)).steady
    assert not Result("refused", "float32", 0.9, None, problem="differs").met


def test_table():
    failed = Result("another row", "bfloat16", 1.5, None, problem="Output 0 differs")
    assert table.result_table([RESULT.on(PEAKS), failed]).splitlines() == [
        "| row         | ours, ms | PyTorch, ms | ratio | GFLOP/s | roofline, ms | share | ours, MiB | PyTorch, MiB |"
        "          wanted |     met |",
        "|-------------|---------:|------------:|------:|--------:|-------------:|------:|----------:|-------------:|"
        "----------------:|--------:|",
        "| a row       |       20 |          30 |  1.50 |      80 |           16 |  0.80 |         - |            - |"
        " 0.9, share 0.75 |     yes |",
        "| another row |        - |           - |     - |       - |            - |     - |         - |            - |"
        "             1.5 | differs |",
    ]
    last = table.first_call_table([FirstCall("a row", 12.34, 1.2, 0.5)]).splitlines()[-1]
    assert " ".join(last.split()) == "| a row | 12.3 | 1.2 | 0.50 |"
    assert [table.milliseconds(seconds) for seconds in (1.2345, 0.1234, 0.0123456, 0.000123)] == [
        "1234",
        "123",
        "12.3",
        "0.123",
    ]


def test_files(tmp_path):
    pytest.importorskip("diffusers")
    report = Report(2, PEAKS, {**PEAKS, "memory": 12e9}, measured=[RESULT])
    report.measured_again({**PEAKS, "float32": 200e9, "memory": 1e9}, PEAKS)
    assert report.results[0].roofline == pytest.approx(1.6e9 / 200e9)
    report.save(str(tmp_path / "out.json"))
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["rows"][0]["ratio"] == pytest.approx(1.5) and numbers["at_best"]["torch"]["memory"] == 12e9
    assert (tmp_path / "out.md").read_text() == report.text() + "\n"


def test_names_of_rows():
    small, large = ([row.name for row in all_rows(quick)] for quick in (True, False))
    assert small == large and len(set(large)) == len(large)
    assert set(NAMES.values()) <= set(large)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    """Times, memory and shares of small rows in turns, of one side after the other, and of a first call."""
    pytest.importorskip("diffusers")
    out = tmp_path / "numbers.json"
    chosen = "--rows=1024 tokens, heads of 64|full size|first call: tiny"
    done = command("--quick", "--full", chosen, "--repeats=2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(out.read_text())
    assert [row["name"][:9] for row in numbers["rows"]] == ["attention", "SDXL U-Ne"]
    for row in numbers["rows"]:
        assert row["ours"] > 0 and row["torch"] > 0 and 2 <= len(row["our_times"]) <= 50 and row["roofline"] > 0
        assert row["error"] < 1e-4 and row["our_memory"] >= 0
    (call,) = numbers["first_calls"]
    assert call["cold"] > call["later"] > 0
    assert re.search(r"\| attention, 1024 tokens, heads of 64 +\|", done.stdout)
    assert " left | first call: tiny U-Net" in done.stderr


@pytest.mark.slow
def test_both_pipelines_make_the_same_batches(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "numbers.json"
    done = command("--quick", "--rows=data pipeline", "--repeats=1", f"--out={out}")
    assert done.returncode == 0, done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 and all(row["error"] == 0 and row["ours"] > 0 for row in rows)


@pytest.mark.slow
def test_a_side_that_fails_is_told():
    pytest.importorskip("diffusers")
    row = find_row("attention, 1024 tokens, heads of 64", quick=True)
    result = measure(row, repeats=1, threads=0, quick=True)  # which no library takes
    assert result.ours is None and "failed" in result.problem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rows=nonsense"], "No row is called like --rows=nonsense"),
        pytest.param(["--rows=("], "is not a regular expression", marks=pytest.mark.slow),
        pytest.param(["--repeats=0"], "--repeats must be at least 1", marks=pytest.mark.slow),
        (["--threads=1000"], "--threads must be from 1 to"),
        pytest.param(["--out=/no/such/folder/x.json"], "is in a folder that does not exist", marks=pytest.mark.slow),
    ],
)
def test_what_is_refused(arguments, words):
    pytest.importorskip("diffusers")
    done = command(*arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
