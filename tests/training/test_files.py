"""A write that fails leaves what was there before, and nothing else."""

from __future__ import annotations

import resource

import numpy as np
import pytest

from pixelstory_jax.objectives.objective import Evaluation
from pixelstory_jax.training import loop, metrics
from pixelstory_jax.training.files import replacing

NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)


@pytest.fixture
def full_disk():
    """No file may grow beyond 8 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_picture(folder):
    loop.write_evaluation(Evaluation({}, 0.0, "table", {"small": NOISE[:2], "noise": NOISE}), folder / "step_000006")


def write_config(folder):
    loop._write_text(folder / "config.json", "x" * 20_000)


def drop_lines(folder):
    metrics._drop_after(folder / "metrics.jsonl", 500)


@pytest.mark.parametrize("write", [write_picture, write_config, drop_lines])
def test_a_full_disk_leaves_the_earlier_output(tmp_path, request, write):
    earlier = Evaluation({}, 0.0, "earlier")
    loop.write_evaluation(earlier, tmp_path / "step_000006")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "kind": "train"}}\n' for i in range(1000)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="File too large"):
        write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "step_000006"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_cut_short_is_removed_and_a_later_write_succeeds(tmp_path, error, kind):
    def write(content, fail):
        with replacing(tmp_path / "output") as temporary:
            if kind == "folder":
                temporary.mkdir()
            (temporary / "part" if kind == "folder" else temporary).write_text(content)
            if fail:
                raise error

    write("first", fail=False)
    with pytest.raises(error):
        write("second", fail=True)
    part = tmp_path / "output" / "part" if kind == "folder" else tmp_path / "output"
    assert part.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["output"]
    (tmp_path / ".output.tmp").mkdir()  # left by a process that was killed
    write("third", fail=False)
    assert part.read_text() == "third" and [path.name for path in tmp_path.iterdir()] == ["output"]
