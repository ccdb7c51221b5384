"""Notebooks: paired with their .py, committed without outputs, and executed at the least size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_pixellm_runs(tmp_path, monkeypatch):
    """Two steps, one question of each kind: a curve, a score sheet and answers with their pictures come out."""
    workdir = tmp_path / "run"
    settings = {"STEPS": "2", "EXAMPLES": "1", "WORKDIR": str(workdir)}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIXELSTORY_{name}", value)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = jupytext.read(ROOT / "colab" / "pixellm.ipynb")
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4  # the training picture, two score sheets, the answers
    printed = "".join(output.get("text", "") for output in outputs)
    assert "giou" in printed.lower() and "CpuDevice" in json.dumps(outputs)
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2 and (workdir / "checkpoints" / "best").is_dir()
