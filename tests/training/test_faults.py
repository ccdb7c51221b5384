"""What goes wrong in long runs: processes that die or hang, notices of preemption, death while a checkpoint is written.

After each the run resumes, and its losses and parameters equal those of an unbroken one, bit for bit.
"""

from __future__ import annotations

import random
import signal
import sys
import time

import pytest

from pixelstory_jax.data.pipeline import make_iterator
from pixelstory_jax.training.loop import train
from tests.training.runs import assert_same, finish, finish_all, losses, start, start_several, wait_for
from tests.training.toy import ToyObjective, ToySource, toy_config

SAVING = "checkpoints/last/8"  # the second checkpoint of a run, beside a complete first one


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train(toy_config(), ToyObjective(), ToySource(), workdir)
    return workdir


@pytest.fixture(scope="module")
def unbroken_two(tmp_path_factory):
    """A run of two processes."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    assert [code for code, _, _ in finish_all(start_several(workdir, 2))] == [0, 0]
    return workdir


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """How many operations on files Python does to save one checkpoint, from the first folder to the final name."""
    heard, listening = [], True

    def hear(event, values):
        if listening and event.startswith(("open", "os.", "shutil.")) and any(SAVING in str(v) for v in values[:2]):
            heard.append((event, str(values[0])))

    sys.addaudithook(hear)
    train(toy_config(steps=9, checkpoint_every=8), ToyObjective(), ToySource(), tmp_path_factory.mktemp("counted"))
    listening = False
    assert heard[0][0] == "os.mkdir" and heard[0][1] == heard[-1][1] and heard[-1][0] == "os.rename", heard
    return len(heard)


def quick_ones(count, *quick):
    """Parameters 0 to count - 1, of which those that are not `quick` run with the slow tests."""
    return [pytest.param(i, marks=() if i in quick else pytest.mark.slow) for i in range(count)]


@pytest.mark.parametrize("moment", quick_ones(10, 6))
def test_death_while_a_checkpoint_is_written(unbroken, operations, tmp_path, moment):
    operation = 1 + moment * operations // 10
    code, _, errors = finish(start(tmp_path, f"--kill-within={SAVING}", f"--kill-operation={operation}"))
    assert code == -signal.SIGKILL, errors
    names = {path.name for path in (tmp_path / "checkpoints/last").iterdir()}
    assert "4" in names and "8" not in names
    assert train(toy_config(), ToyObjective(), ToySource(), tmp_path).finished
    assert_same(tmp_path, unbroken)
    assert sorted(path.name for path in (tmp_path / "checkpoints/last").iterdir()) == ["12", "8"]
    assert not list(tmp_path.rglob("*tmp*"))


def started(workdir, *arguments):
    """Two processes that have done some of their steps, half a second each."""
    processes = start_several(workdir, 2, "--delay=0.1", *arguments)
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and losses(workdir), processes[0])
    return processes


def resume(workdir):
    assert [code for code, _, _ in finish_all(start_several(workdir, 2))] == [0, 0]


@pytest.mark.parametrize("victim", quick_ones(2, 1))
def test_the_other_process_ends_soon_with_a_sentence_where_one_is_killed(tmp_path, victim):
    processes = started(tmp_path)
    processes[victim].kill()
    begin = time.monotonic()
    ended = finish_all(processes)
    assert time.monotonic() - begin < 60  # heartbeats that stay out are noticed after 100
    assert ended[victim][0] == -signal.SIGKILL and ended[1 - victim][0] not in (0, -signal.SIGKILL)
    sentences = [line for line in ended[1 - victim][2].splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1 and "resumes from the newest checkpoint" in sentences[0], ended
    assert "nother process" in sentences[0] and "Traceback" not in ended[1 - victim][2]


@pytest.mark.slow
def test_two_processes_of_which_one_was_killed_resume_to_the_same_numbers(unbroken_two, tmp_path):
    processes = started(tmp_path)
    wait_for((tmp_path / "checkpoints/last/4").is_dir, processes[0])
    processes[1].kill()
    finish_all(processes)
    assert 4 <= max(losses(tmp_path)) < 12
    resume(tmp_path)
    assert_same(tmp_path, unbroken_two)


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_when_its_heartbeats_stay_out(tmp_path):
    processes = started(tmp_path, "--heartbeat=10")
    processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    try:
        code, _, errors = finish(processes[0])
    finally:
        processes[1].kill()
    assert code == -signal.SIGABRT and time.monotonic() - begin < 60
    assert "Error: The process" in errors and "another process is gone" in errors, errors


@pytest.mark.slow
def test_notice_of_preemption_to_one_process_has_both_save_the_same_step(unbroken_two, tmp_path):
    processes = started(tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish_all(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    stopped = max(losses(tmp_path))
    assert stopped < 12 and f"Stopped by a signal at step {stopped}, saved" in ended[0][1]
    assert (tmp_path / "checkpoints/last" / str(stopped)).is_dir()
    resume(tmp_path)
    assert_same(tmp_path, unbroken_two)


@pytest.mark.slow
def test_data_that_fail_in_one_process_end_both(tmp_path):
    batches = make_iterator(ToySource(), 16, toy_config()["seed"], process_index=1, process_count=2, threads=0)
    broken = [next(batches)["index"] for _ in range(6)][-1][0]  # of the second process alone, and not at once
    begin = time.monotonic()
    ended = finish_all(start_several(tmp_path, 2, f"--broken={broken}"))
    assert time.monotonic() - begin < 60
    assert ended[1][0] == 2 and f"Error: Example {broken} of the data could not be made" in ended[1][2], ended
    assert ended[0][0] not in (0, None) and "nother process" in ended[0][2], ended


def test_killed_at_random_points_equals_unbroken(tmp_path):
    kill_at_random(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_killed_at_random_points_twenty_times_equals_unbroken(tmp_path):
    kill_at_random(tmp_path, kills=20, seed=1)


def kill_at_random(folder, kills, seed):
    """Kills one run again and again: in turn within its start, and once steps are on their way. Then compares."""
    steps = 40 * kills
    draw = random.Random(seed)
    reached = []
    for number in range(kills):
        process = start(folder / "killed", f"--steps={steps}", "--delay=0.01")  # about a tenth of a second a step
        if number % 2:
            time.sleep(draw.uniform(0, 4))
        else:
            assert any("compiled in" in line for line in process.stdout)
            time.sleep(draw.uniform(0, 2))
        assert process.poll() is None, "the run was over before it could be killed"
        process.kill()
        code, _, errors = finish(process)
        assert code == -signal.SIGKILL and "Traceback" not in errors
        reached.append(max(losses(folder / "killed"), default=0) if (folder / "killed/metrics.jsonl").exists() else 0)
    print(f"Killed {kills} times, after steps {reached}")
    assert reached[-1] > 0
    code, output, errors = finish(start(folder / "killed", f"--steps={steps}"))
    assert code == 0, errors
    train(toy_config(steps=steps), ToyObjective(), ToySource(), folder / "unbroken")
    assert_same(folder / "killed", folder / "unbroken")
