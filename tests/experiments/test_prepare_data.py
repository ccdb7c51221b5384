"""The command that checks, shows and packs data sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.readers import open_reader
from tests.data.readers.miniature_semantic import make_ade20k

ROOT = Path(__file__).resolve().parents[2]
SMALL_FILES = """
import resource, sys
from experiments import command_line, prepare_data
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
command_line.run(prepare_data.main, "")
"""


def command(folder: Path, *arguments: str, start: tuple[str, ...] = ("-m", "experiments.prepare_data")):
    return subprocess.run(
        [sys.executable, *start, "--dataset=ade20k", *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def root(tmp_path) -> Path:
    make_ade20k(tmp_path / "dataset")
    (tmp_path / "a_file").touch()
    return tmp_path


def test_check_inspect_and_pack(root):
    (root / "dataset/ade20k/images/training/ADE_train_00000001.jpg").unlink()
    done = command(root, "--source=dataset", "--inspect", "--processes=1")
    assert done.returncode == 0, done.stderr
    assert "3, of which 2 can be used" in done.stdout and "There is no picture at dataset/ade20k" in done.stdout
    assert "3/3" in done.stderr  # the progress bar
    report = json.loads((root / "reports/ade20k-train/report.json").read_text())
    assert (report["pictures"], report["usable"], report["problems_by_kind"]) == (3, 2, {"no picture": 1})
    assert report["problems"][0]["picture"] == "ade20k/images/training/ADE_train_00000001.jpg"
    assert np.asarray(Image.open(root / "reports/ade20k-train/examples-1.png")).std() > 0

    done = command(root, "--source=dataset", "--out=packed_here", "--shard=2", "--report=r")
    assert done.returncode == 0, done.stderr
    assert "To train on it: --config.data.folder=packed_here" in done.stdout
    assert len(open_reader("ade20k", root / "packed_here")) == 2
    again = command(root, "--source=dataset", "--out=packed_here")
    assert again.returncode == 2 and "packed_here/packed/ade20k-train exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--dataset and --source are needed"),
        (["--source=nowhere"], "There is no folder nowhere. For ade20k it should hold:\n  ade20k/images"),
        pytest.param(
            ["--source=dataset", "--dataset=ade2k"],
            "Unknown data set 'ade2k'; did you mean ade20k?",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--source=dataset", "--split=test"],
            "ade20k has no split 'test'; it has train, val.",
            marks=pytest.mark.slow,
        ),
        (["--source=dataset", "--out=a_file"], "cannot be written: Not a directory"),
        pytest.param(
            ["--source=dataset", "--report=a_file"],
            "a_file",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_refused(root, arguments, words):
    done = command(root, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_where_nothing_can_be_used_the_command_fails_with_a_report(root):
    for path in (root / "dataset").glob("ade20k/images/training/*"):
        path.write_bytes(b"")
    done = command(root, "--source=dataset", "--out=out")
    assert done.returncode == 2 and "None of the 3 pictures can be used; reports/ade20k-train/report" in done.stderr
    assert "pictures that cannot be decoded: 3" in done.stdout and not any((root / "out/packed").iterdir())


def test_a_full_disk_is_one_sentence(root):
    done = command(root, "--source=dataset", "--out=out", start=("-c", SMALL_FILES))
    assert done.returncode == 2 and "The disk or the quota of out/packed is full; make room" in done.stderr
    assert "Traceback" not in done.stderr and not list(root.glob("out/packed/*/*.array_record*"))
