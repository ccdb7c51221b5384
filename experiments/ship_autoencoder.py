"""Writes the autoencoder of a run as one file in the layout of diffusers, with the scale of its latents measured.

python -m experiments.ship_autoencoder --workdir=runs/autoencoder --out=tiny_autoencoder.safetensors
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import ConfigDict

from experiments import command_line
from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_AUTOENCODER
from pixelstory_jax.interop.autoencoder_table import write_autoencoder_file
from pixelstory_jax.objectives.autoencoder import build_autoencoder_objective, measure_scale
from pixelstory_jax.training.checkpoints import load_params
from pixelstory_jax.training.errors import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of configs/autoencoder_tiny.py.")
_OUT = flags.DEFINE_string("out", str(TINY_AUTOENCODER), "File to write (float16 safetensors).")


def main() -> None:
    if not _WORKDIR.value:
        raise ConfigError("Say which run: --workdir=runs/autoencoder (see --help)")
    params, settings = load_params(_WORKDIR.value)
    if settings.get("objective") != "autoencoder":
        raise ConfigError(f"{_WORKDIR.value} is no run of an autoencoder; name one of configs/autoencoder_tiny.py")
    objective = build_autoencoder_objective(ConfigDict(settings))
    config, metrics = measure_scale(objective, params)
    write_autoencoder_file(_OUT.value, config, params, settings["name"])
    print(f"Wrote an autoencoder of {metrics['psnr']:.2f} dB, scaling factor {config.scaling_factor}, to {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
