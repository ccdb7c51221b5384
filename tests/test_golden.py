"""The golden check passes on the fixtures, and can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden_check import main

HERE = Path(__file__).parent / "golden"
LARGE = Path(__file__).parents[2] / "shared" / "golden" / "pixellm"  # beside the repository, where there is one


def test_small_fixtures():
    assert main([str(HERE)]) == 0


@pytest.mark.skipif(not LARGE.is_dir(), reason="the large fixtures are not here")
def test_large_fixtures(tmp_path, capsys):
    """Those that are not in tests/golden; the one of LISA is not covered and says so."""
    for path in LARGE.glob("*.npz"):
        if not (HERE / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    assert main([str(tmp_path), "--except=lisa_decoder"]) == 0
    assert "lisa_decoder.npz: excepted" in capsys.readouterr().out


def perturbed(folder: Path, name: str, key: str, change: float) -> Path:
    with np.load(HERE / f"{name}.npz") as file:
        arrays = {entry: file[entry].copy() for entry in file.files}
    arrays[key].flat[0] += change
    np.savez(folder / f"{name}.npz", **arrays)
    return folder


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("losses", "out/one_mask/grad_dice", 1e-5),
        ("losses", "in/one_mask/logits", 0.5),
        ("match_eval", "out/match/equal/pred_index", 1),
        ("consistent_attention_mask", "out/read_masked", 1e-3),
        ("consistent_attention_mask", "in/x_read", 0.5),
        ("mask_rules", "out/index_low/0", 1),
    ],
)
def test_a_changed_number_fails(tmp_path, capsys, name, key, change):
    assert main([str(perturbed(tmp_path, name, key, change))]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_changed_script_fails(tmp_path, capsys):
    cases = json.loads((HERE / "prompt_parsing.json").read_text(encoding="utf-8"))
    number = next(number for number, case in enumerate(cases) if case.get("character_list"))
    cases[number]["character_list"].append("[Nobody]")
    (tmp_path / "prompt_parsing.json").write_text(json.dumps(cases), encoding="utf-8")
    assert main([str(tmp_path)]) == 1
    assert f"prompt_parsing case {number}: differs in character_list" in capsys.readouterr().out


def test_what_is_not_covered_fails(tmp_path, capsys):
    np.savez(tmp_path / "new.npz", meta='{"fixture": "lisa_decoder"}')
    assert main([str(tmp_path)]) == 1
    assert "new.npz: FAILED, the fixture lisa_decoder is not covered" in capsys.readouterr().out
    assert main([str(tmp_path), "--except=lisa_decoder"]) == 0
    with np.load(HERE / "match_eval.npz") as file:
        np.savez(tmp_path / "match_eval.npz", **{name: file[name] for name in file.files}, **{"out/more": np.ones(2)})
    assert main([str(tmp_path), "--except=lisa_decoder"]) == 1
    assert "match_eval more: not computed" in capsys.readouterr().out


def test_empty_folder_fails(tmp_path):
    assert main([str(tmp_path)]) == 1
