"""Dry runs: the data of the large configs are read and described, and no model is allocated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from experiments.command_line import load_config
from pixelstory_jax.objectives.dry_run import describe_first_batch
from tests.data.readers.all_miniatures import MAKERS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    for make in MAKERS.values():
        make(path)
    return path


def small(variant: str, folder: Path) -> ConfigDict:
    config = load_config(f"configs/pixellm.py:{variant}")[1]
    config.data.folder = str(folder)
    config.data.tokenizer = "small"
    config.train.batch_size = 8
    return config


@pytest.mark.parametrize(("variant", "parameters"), [("7b", "7.15 G"), ("13b", "13.5 G")])
def test_the_large_configs_read_their_data_and_allocate_nothing(variant, parameters, folder):
    before = sum(array.nbytes for array in jax.live_arrays())
    text = describe_first_batch(small(variant, folder))
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    assert f"The model would have {parameters} parameters; none of them was allocated." in text
    assert re.search(r"muse +train +4 pictures, 23.53% of the examples", text)
    assert re.search(r"target_masks +uint8 +\[8, 16, 448, 448\]", text)
    rows, drawn, left_out = map(
        int, re.search(r"conversation: (\d+) of 24.*Conversations: (\d+) drawn, (\d+) left", text, re.S).groups()
    )
    assert rows == drawn - left_out > 8
    assert "USER: <im_start> <im_end>" in text and "ASSISTANT:" in text


def test_what_does_not_fit_is_counted(folder):
    config = small("7b", folder)
    whole = describe_first_batch(config)
    assert "0 left out because they do not fit" in whole
    config.data.slots = 2
    text = describe_first_batch(config)
    drawn = re.search(r"Masks: (\d+) drawn, 0", whole)[1]
    masks, left_out, slots, used = map(
        int, re.search(r"Masks: (\d+) drawn, (\d+) left out with them; (\d+) slots, of which (\d+)", text).groups()
    )
    assert masks == int(drawn) and left_out == masks - used > 0 and slots == 16


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "data.tokenizer",
            "tokenizer.model",
            "There is no tokenizer tokenizer.model; config.data.tokenizer has to name",
        ),
        ("data.folder", "nowhere", "There is no folder nowhere. For "),
        ("data.asked", 4, "data.asked=4 questions about a picture need as many rows"),
        ("data.length", 260, r"No conversation of the first 16 examples fits into data.length=260 tokens"),
    ],
)
def test_what_ends_training_ends_a_dry_run(field, value, words, folder):
    config = small("7b", folder)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=words):
        describe_first_batch(config)


def test_pictures_that_cannot_be_used_are_counted(folder):
    assert re.search(r"  [1-9]\d* pictures that were met cannot be used", describe_first_batch(small("7b", folder)))


def test_a_mixture_that_cannot_be_drawn_from():
    config = load_config("configs/pixellm.py:tiny,data=mixture")[1]  # its folder is not looked at
    for group in config.data.mixture.values():
        group.weight = 0.0
    with pytest.raises(ValueError, match="positive sum, got {.*'reasoning': 0.0"):
        describe_first_batch(config)
    config = load_config("configs/pixellm.py:tiny")[1]
    config.data.name = "mixture"
    with pytest.raises(ValueError, match="This config has no data.mixture; choose the variant that has"):
        describe_first_batch(config)


def test_the_command(folder):
    arguments = ["--config=configs/pixellm.py", "--config.dry_run=True", "--config.train.batch_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Dry run of pixellm-tiny: nothing is trained." in done.stdout and not (folder / "runs").exists()
