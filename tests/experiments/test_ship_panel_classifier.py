"""The file that measures stories, written from a run and checked at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from pixelstory_jax.evaluation.panel_classifier import read_panel_classifier
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives import build_objective
from tests.objectives.test_panel_classifier import smallest

ROOT = Path(__file__).resolve().parents[2]


def ship(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.ship_panel_classifier", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def save(folder: Path, params: dict, config: dict) -> None:
    items = {"params": ocp.args.PyTreeSave(params), "config": ocp.args.JsonSave(config)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "checkpoints" / "best" / "5", args=ocp.args.Composite(**items))


def test_the_classifier_is_written_without_the_autoencoder(tmp_path):
    config = smallest()
    params = jax.device_get(jax.jit(build_objective(config).init)(jax.random.key(0)))
    frozen = {"autoencoder": {"kernel": np.ones(2, np.float32)}}
    save(tmp_path / "run", {**params, **frozen}, config.to_dict())
    out = tmp_path / "classifier.safetensors"
    done = ship(f"--workdir={tmp_path / 'run'}", f"--out={out}", "--panels=9")
    assert done.returncode == 0, done.stderr
    assert f"bytes to {out}" in done.stdout and "The file on 9 held-out real panels" in done.stdout
    written = read_panel_classifier(out)
    assert written.config.channels == (8, 16)
    for path, array in flatten(params["classifier"]).items():
        np.testing.assert_allclose(flatten(written.params)[path], array, rtol=1e-3, atol=1e-6)


def test_a_run_has_to_be_named_and_to_hold_a_classifier(tmp_path):
    done = ship()
    assert done.returncode == 2 and done.stderr.startswith("Error: Say which run: --workdir=") and not done.stdout
    save(tmp_path / "run", {"vision": {"kernel": np.ones(2, np.float32)}}, {"name": "other"})
    done = ship(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2 and "it has no classifier" in done.stderr
