"""Notebooks: paired with their .py, committed without outputs, and executed at the least size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixelstory_jax.data.story_script import read_script
from pixelstory_jax.inference.story_teller import read_manifest, read_panels, script_from_manifest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def cells(notebook) -> list[tuple[str, str, list[str]]]:
    return [(cell.cell_type, cell.source.strip(), cell.metadata.get("tags", [])) for cell in notebook.cells]


def test_there_are_notebooks_and_each_has_its_script():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (ROOT / "colab").glob("*.py")} != set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_agree(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert cells(notebook) == cells(script), f"jupytext --to ipynb --update {path.with_suffix('.py')}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean_and_opens_on_a_tpu(path):
    notebook = jupytext.read(path)
    assert notebook.metadata["accelerator"] == "TPU"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


SMALL_STORIES = {
    "model.unet.channels": (16, 32),
    "model.unet.depths": (0, 1),
    "model.unet.heads": (1, 2),
    "train.optimizer": "adamw",
    "eval.steps": 2,
    "eval.quick_stories": 2,
    "eval.batch_size": 2,
    "eval.rates": (),
    "train.batch_size": 2,
}


def check_story(workdir: Path) -> None:
    """What the notebook tells, since an installed package lacks it, is examples/moon.txt; panel 4 was drawn again."""
    manifest = read_manifest(workdir / "story")
    assert script_from_manifest(manifest) == read_script(ROOT / "examples" / "moon.txt")
    assert manifest["redrawn"] == {"3": 1} and len(read_panels(workdir / "story", manifest)) == 8


# Environment, the least number of pictures, what is printed, and what else is checked.
SMALLEST = {
    # One question of each kind: the training picture, two score sheets, the answers.
    "pixellm": ({"EXAMPLES": "1"}, 4, ("giou",), lambda workdir: None),
    # Two stories: the training story, the sheet, a page, both versions of a panel, the page with the new one.
    "storydiffusion": (
        {"STORIES": "2", "CHANGES": json.dumps(SMALL_STORIES)},
        5,
        ("same character", "sharing off", "sharing on, rate 0.7", "8 panels", "story/panel_04.png"),
        check_story,
    ),
}


def test_every_notebook_is_executed():
    assert SMALLEST.keys() == {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_notebook_runs(name, tmp_path, monkeypatch):
    """Two steps of training: a curve, a score sheet, and what the model is for come out, with their pictures."""
    workdir = tmp_path / "run"
    environment, least, words, check = SMALLEST[name]
    for variable, value in {"STEPS": "2", "WORKDIR": str(workdir), **environment}.items():
        monkeypatch.setenv(f"PIXELSTORY_{variable}", value)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = jupytext.read(ROOT / "colab" / f"{name}.ipynb")
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= least
    printed = "".join(output.get("text", "") for output in outputs)
    assert all(word in printed.lower() for word in words) and "CpuDevice" in json.dumps(outputs)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2 and (workdir / "checkpoints" / "best").is_dir()
    check(workdir)
