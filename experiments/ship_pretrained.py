"""Writes the vision tower, projector and language model of a pretraining run as the file that tiny models start from.

python -m experiments.ship_pretrained --workdir=runs/pretrain --out=tiny_start.safetensors
"""

from __future__ import annotations

import sys

import numpy as np
from absl import flags

from experiments import command_line
from pixelstory_jax.data.builtin.start import SHIPPED_PARTS, TINY_START
from pixelstory_jax.interop.safetensors_files import write_safetensors
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.errors import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of configs/pretrain_tiny.py.")
_OUT = flags.DEFINE_string("out", str(TINY_START), "File to write (float16 safetensors).")


def main() -> None:
    if not _WORKDIR.value:
        raise ConfigError("Say which run: --workdir=runs/pretrain (see --help)")
    params, config = load_params(_WORKDIR.value)
    shipped = {path: array for path, array in flatten(params).items() if path.startswith(SHIPPED_PARTS)}
    halves = {path: array.astype(np.float16) for path, array in shipped.items()}
    write_safetensors(_OUT.value, halves, {"trained_by": config["name"]})
    count = sum(array.size for array in shipped.values())
    print(f"Wrote {len(shipped)} arrays, {count:,} values, to {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
