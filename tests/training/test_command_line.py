"""Errors and help of the command lines: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command_line import check_config, load_config
from pixelstory_jax.training.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

CONFIG = '''"""A config for tests."""
from ml_collections import ConfigDict

def get_config(argument=None):
    if argument == "bad":
        raise ValueError("Unknown variant 'bad'; this config has tiny.")
    if argument == "broken":
        return missing_name
    config = ConfigDict()
    config.name = "test"
    config.train = ConfigDict({"steps": 10, "learning_rate": 1.0, "fast": False, "sizes": (1, 2)})
    config.model = ConfigDict({"width": 4, "vision": ConfigDict({"layers": 2})})
    return config
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "some_config.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.train.stepz=5", r"no field train.stepz; did you mean --config.train.steps\?"),
        ("--config.trian.steps=5", r"no field trian.steps; did you mean --config.train.steps\?"),
        ("--config.width=5", r"no field width; did you mean --config.model.width\?"),
        ("--config.model.vision.layer=5", r"did you mean --config.model.vision.layers\?"),
        ("--config.zzzz=5", "no field zzzz; it has model, name, train"),
        ("--config.train.steps=five", "--config.train.steps must be a whole number, got 'five'"),
        ("--config.train.steps=1.5", "must be a whole number, got '1.5'"),
        ("--config.train.learning_rate=fast", "--config.train.learning_rate must be a number, got 'fast'"),
        ("--config.train.fast=maybe", "must be true or false"),
        ("--config.model=3", "--config.model must be a dict"),
    ],
)
def test_bad_overrides_are_refused_with_the_nearest_name_or_the_type(config_file, override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_config(["train", f"--config={config_file}", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "--config.train.steps=5",
        "--config.train.learning_rate=1e-3",
        "--noconfig.train.fast",
        "--config.train.fast=true",
    ],
)
def test_good_overrides_pass(config_file, override):
    check_config(["train", f"--config={config_file}", override])
    check_config(["train", "--config", str(config_file), override])


def test_config_files_that_are_missing_or_refuse(config_file, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"no config file configs/pretrain_tyni.py; did you mean configs/pretrain_tiny"
    ):
        load_config("configs/pretrain_tyni.py")
    with pytest.raises(ConfigError, match="Unknown variant 'bad'; this config has tiny"):
        load_config(f"{config_file}:bad")
    with pytest.raises(NameError):  # a bug in a config keeps its traceback
        load_config(f"{config_file}:broken")
    monkeypatch.chdir(config_file.parent)
    path, config = load_config("configs/pretrain_tiny.py")  # from any folder
    assert path == ROOT / "configs/pretrain_tiny.py" and config.name


def command(*arguments, cwd=ROOT):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "experiments.train", *arguments]
    return subprocess.run(run, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_unknown_field_on_the_command_line(config_file, tmp_path):
    result = command(f"--config={config_file}:tiny", "--config.train.stepz=5", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip() == ("Error: The config has no field train.stepz; did you mean --config.train.steps?")
    assert not result.stdout and not list(tmp_path.glob("runs"))


def test_help_says_what_it_does_and_which_configs_there_are():
    result = command("--help")
    assert result.returncode == 0, result.stderr
    for words in ("--config=configs/pixellm.py", "configs/pretrain_tiny.py:", "--workdir", "resumed"):
        assert words in result.stdout


def test_unknown_flag(config_file):
    result = command(f"--config={config_file}", "--wrokdir=x")
    assert result.returncode == 2 and "wrokdir" in result.stderr and "workdir" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
