"""Errors and help of the command lines: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command_line import check_config, explain, load_config
from pixelstory_jax.training.errors import ConfigError, UserError
from pixelstory_jax.training.processes import initialize_distributed

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
    config.train.learning_rate_multipliers = ConfigDict({"llama/layers": 0.4, "neck": 3.0})
    config.loss = ConfigDict({"dice": 0.5, "bce": 2.0})
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
        ("--config.zzzz=5", "no field zzzz; it has loss, model, name, train"),
        ("--config.train.steps=five", "--config.train.steps must be a whole number, got 'five'"),
        ("--config.train.steps=1.5", "must be a whole number, got '1.5'"),
        ("--config.train.learning_rate=fast", "--config.train.learning_rate must be a number, got 'fast'"),
        ("--config.train.fast=maybe", "must be true or false"),
        ("--config.model=3", "--config.model must be a dict"),
        ("--config.loss={'dcie': 1}", r"no field loss.dcie; did you mean --config.loss.dice\?"),
        ("--config.loss={'dice': 'much'}", "--config.loss.dice must be a number, got 'much'"),
        ("--config.model={'width': 8, 'vision': {'layer': 3}}", r"did you mean --config.model.vision.layers\?"),
        ("--config.model={'a': 1}", "no field model.a; it has loss, model, name, train"),
        (
            "--config.train.learning_rate_multipliers.llama=0.1",
            r"no field .*llama; to add it, .* \"--config.train.learning_rate_multipliers=\{'llama': 0.1, ...\}\"",
        ),
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


SHOW = """
import json
from experiments import command_line
config = command_line.define_config_flag()
command_line.run(lambda: print(json.dumps(config.value.to_dict())), "usage")
"""


def test_sections_and_names_with_a_slash_are_set_as_they_are_written(config_file):
    overrides = [
        "--config.train.learning_rate_multipliers.llama/layers=0.1",
        "--config.loss={'dice': 1}",
        "--config.model={'vision': {'layers': 3}}",
        "--config.train={'fast': True, 'sizes': (3, 4)}",
    ]
    command = [sys.executable, "-c", SHOW, f"--config={config_file}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout)
    assert config["train"]["learning_rate_multipliers"] == {"llama/layers": 0.1, "neck": 3.0}
    assert config["loss"] == {"dice": 1.0, "bce": 2.0}  # what the dict does not name stays
    assert config["model"] == {"width": 4, "vision": {"layers": 3}}
    assert config["train"]["fast"] is True and config["train"]["sizes"] == [3, 4] and config["train"]["steps"] == 10

    command[4:] = ["--config.train.learning_rate_multipliers={'head': 0.5}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert json.loads(result.stdout)["train"]["learning_rate_multipliers"] == {"head": 0.5}, result.stderr


def test_explain_names_the_field_and_lets_bugs_keep_their_traceback():
    @dataclasses.dataclass
    class Weights:
        dice: float

    with pytest.raises(ConfigError, match="section of the config does not fit Weights: .*keyword argument 'dcie'"):
        explain(lambda: Weights(**{"dcie": 1.0}))
    with pytest.raises(ConfigError, match="section of the config does not fit Weights: missing .*'dice'"):
        explain(lambda: Weights())
    with pytest.raises(TypeError):
        explain(lambda: len(3))
    with pytest.raises(UserError, match="^no such thing$"):
        explain(lambda: (_ for _ in ()).throw(ValueError("no such\n thing")))


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


@pytest.mark.parametrize("given", [(2, 0), (2, -1), (0, 0)])
def test_one_of_several_processes_does_not_train_alone(given):
    with pytest.raises(ConfigError, match="as --coordinator=host:port"):
        initialize_distributed("", *given)
    with pytest.raises(ConfigError, match=r"With a coordinator \(localhost:1\) give"):
        initialize_distributed("localhost:1", 2, 2)


def test_processes_without_a_coordinator_are_refused_on_the_command_line(tmp_path):
    result = command("--config=configs/pixellm.py:tiny", "--processes=2", "--process=0", f"--workdir={tmp_path}/run")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.startswith("Error: The number of processes") and "Traceback" not in result.stderr


def test_help_says_what_it_does_and_which_configs_there_are():
    result = command("--help")
    assert result.returncode == 0, result.stderr
    for words in ("--config=configs/pixellm.py", "configs/pretrain_tiny.py:", "--workdir", "resumed"):
        assert words in result.stdout


def test_unknown_flag(config_file):
    result = command(f"--config={config_file}", "--wrokdir=x")
    assert result.returncode == 2 and "wrokdir" in result.stderr and "workdir" in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
