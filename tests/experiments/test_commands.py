"""The commands one after the other at the least sizes, for each model: train, kill, resume, evaluate, ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from pixelstory_jax.data.builtin import compose
from pixelstory_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
CONFIG = """
from {module} import {function} as smallest

def get_config(argument=None):
    config = smallest()
    config.train.update(
        {{"steps": {steps}, "checkpoint_every": 2, "eval_every": 4, "log_every": 1, "warmup_steps": 0}}
    )
    return config
"""
SMALLEST = {
    "pixellm": ("tests.objectives.smallest", "smallest_pixellm"),
    "storydiffusion": ("tests.story_sizes", "smallest_story_training"),
}


@pytest.fixture(scope="module", params=list(SMALLEST))
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp(model)
    module, function = SMALLEST[model]
    config = CONFIG.format(module=module, function=function, steps=STEPS)
    (path / "smallest_config.py").write_text(config, encoding="utf-8")
    Image.fromarray(compose(1, 2, "test", size=96).image).save(path / "picture.png")
    return path


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "xla"),
    }
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    return out + err


def train(folder: Path, workdir: str) -> subprocess.Popen:
    return start(folder, "train", f"--config={folder / 'smallest_config.py'}", f"--workdir={folder / workdir}")


def losses(workdir: Path) -> list[dict]:
    return read_metrics(workdir, "train")


@pytest.fixture(scope="module")
def unbroken(folder):
    output = finish(train(folder, "unbroken"))
    assert "from random initialisation" in output and "Written:" in output
    return folder / "unbroken"


def test_training_writes_what_it_says(model, unbroken):
    assert [line["step"] for line in losses(unbroken)] == list(range(1, STEPS + 1))
    for path in ("config.json", "parameters.txt", "tensorboard", "checkpoints/best", "checkpoints/last"):
        assert (unbroken / path).exists()
    for step in (4, STEPS):
        evaluation = unbroken / "evaluations" / f"step_{step:06d}"
        assert list(evaluation.glob("*.png")) and (evaluation / "table.txt").read_text().strip()
    terms = {"pixellm": {"language", "bce", "dice", "refinement"}, "storydiffusion": {"error", "error_shared"}}
    assert terms[model] <= losses(unbroken)[0].keys()


def without_rates(lines):
    return [{name: x for name, x in line.items() if "per_second" not in name and name != "mfu"} for line in lines]


def test_a_killed_run_resumes_with_the_same_losses_bit_for_bit(folder, unbroken):
    workdir = folder / "killed"
    process = train(folder, "killed")
    try:
        deadline = time.monotonic() + 1800
        # A folder that is still being written has a longer name.
        while not any(saved.name.isdigit() for saved in (workdir / "checkpoints" / "last").glob("*")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert "Resuming at step" in finish(train(folder, "killed"))
    assert without_rates(losses(workdir)) == without_rates(losses(unbroken))


def test_evaluate_gives_the_scores_that_training_ended_with(folder, unbroken):
    """The figures, the table, every scored answer and the pages of the best parameters, made again."""
    (best,) = (unbroken / "checkpoints" / "best").iterdir()
    reported = unbroken / "evaluations" / f"step_{int(best.name):06d}"
    scores = folder / "scores"
    output = finish(start(folder, "evaluate", f"--checkpoint={unbroken}", f"--out={scores}"))
    assert (reported / "table.txt").read_text() in output
    assert sorted(path.name for path in scores.iterdir()) == sorted(path.name for path in reported.iterdir())
    for path in scores.iterdir():
        assert path.read_bytes() == (reported / path.name).read_bytes(), path.name
    assert json.loads((scores / "metrics.json").read_text())["metrics"]
    again = start(folder, "evaluate", f"--checkpoint={unbroken}", f"--out={unbroken}")
    assert again.wait(timeout=1800) == 2 and "holds no scores" in again.communicate()[1]


def test_what_training_wrote_is_used(model, folder, unbroken):
    {"pixellm": check_segment, "storydiffusion": check_story}[model](folder, unbroken)


def check_story(folder: Path, unbroken: Path) -> None:
    """The same story twice gives the same files."""
    script = f"--story={ROOT / 'examples' / 'moon.txt'}"
    for name in ("once", "again"):
        finish(start(folder, "story", f"--checkpoint={unbroken}", script, f"--out={folder / name}", "--steps=2"))
    once = {path.name: path.read_bytes() for path in (folder / "once").iterdir()}
    assert once == {path.name: path.read_bytes() for path in (folder / "again").iterdir()} and "comic.pdf" in once


def check_segment(folder: Path, unbroken: Path) -> None:
    questions = ["--question=Where is the cat?", "--question=And the dog?"]
    where = [f"--checkpoint={unbroken}", f"--image={folder / 'picture.png'}", f"--out={folder / 'answers'}"]
    output = finish(start(folder, "segment", *where, *questions))
    assert "> Where is the cat?" in output and (folder / "answers" / "overlay.png").is_file()
    written = json.loads((folder / "answers" / "answer.json").read_text())
    assert [turn["question"] for turn in written["turns"]] == ["Where is the cat?", "And the dog?"]
    width, height = Image.open(folder / "picture.png").size
    assert written["size"] == [height, width]
