"""The file that tiny models start from, written from a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from pixelstory_jax.data.builtin.start import read_start
from pixelstory_jax.interop.safetensors_files import read_safetensors

ROOT = Path(__file__).resolve().parents[2]


def ship(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.ship_pretrained", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_only_the_shipped_parts_are_written_in_half_precision(tmp_path):
    parts = ("vision", "mm_projector", "llama", "heads_high", "heads_low")
    params = {part: {"kernel": np.full((2, 3), 1 / 3 + n, np.float32)} for n, part in enumerate(parts)}
    items = {"params": ocp.args.PyTreeSave(params), "config": ocp.args.JsonSave({"name": "pretrain-language"})}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "run" / "checkpoints" / "best" / "5", args=ocp.args.Composite(**items))
    out = tmp_path / "start.safetensors"
    done = ship(f"--workdir={tmp_path / 'run'}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"Wrote 3 arrays, 18 values, to {out}" in done.stdout
    arrays, metadata = read_safetensors(out)
    assert metadata == {"trained_by": "pretrain-language"}
    assert set(arrays) == set(read_start(str(out))) == {"vision/kernel", "mm_projector/kernel", "llama/kernel"}
    for part in parts[:3]:
        array = arrays[f"{part}/kernel"]
        assert array.dtype == np.float16
        np.testing.assert_allclose(array, params[part]["kernel"], rtol=1e-3)


def test_a_run_has_to_be_named():
    done = ship()
    assert done.returncode == 2 and done.stderr.startswith("Error: Say which run: --workdir=") and not done.stdout
