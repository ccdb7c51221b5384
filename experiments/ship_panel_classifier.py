"""Writes the panel classifier of a run as the file that measures stories, and checks that file on new panels.

python -m experiments.ship_panel_classifier --workdir=runs/panel_classifier --out=panel_classifier.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.labelled_panels import HEADS, class_names, held_out_panels
from pixelstory_jax.evaluation.panel_classifier import (
    PANEL_CLASSIFIER,
    PanelClassifier,
    accuracy_table,
    confusion_table,
    head_accuracies,
    read_panel_classifier,
    write_panel_classifier,
)
from pixelstory_jax.models.panel_classifier import PanelClassifierConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.errors import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of configs/panel_classifier.py.")
_OUT = flags.DEFINE_string("out", str(PANEL_CLASSIFIER), "File to write (float16 safetensors).")
_PANELS = flags.DEFINE_integer("panels", 3000, "Held-out real panels to check the written file on.", lower_bound=1)


def main() -> None:
    if not _WORKDIR.value:
        raise ConfigError("Say which run: --workdir=runs/panel_classifier (see --help)")
    params, config = load_params(_WORKDIR.value)
    if "classifier" not in params:
        raise ConfigError(f"{_WORKDIR.value} is no run of configs/panel_classifier.py: it has no classifier")
    classes = class_names(builtin_cast())
    counts = {f"{head}s": len(words) for head, words in classes.items()}
    sizes = sizes_from_config(PanelClassifierConfig, {**config["model"], **counts})
    write_panel_classifier(_OUT.value, PanelClassifier(sizes, params["classifier"], classes))
    print(f"Wrote {Path(_OUT.value).stat().st_size:,} bytes to {_OUT.value}")

    # Another seed than the run's: its best checkpoint was chosen on the panels of that one.
    labels = held_out_panels(_PANELS.value, config["seed"] + 1, config["data"]["size"])
    read = read_panel_classifier(_OUT.value)(labels["image"])
    print(f"\nThe file on {_PANELS.value} held-out real panels:")
    print(accuracy_table({"real": head_accuracies(read, labels)}))
    for head in HEADS:
        print(f"\n{confusion_table(read[head], labels[head], classes[head])}")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
