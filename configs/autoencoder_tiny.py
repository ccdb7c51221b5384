"""The tiny autoencoder that configs/storydiffusion.py:tiny works in the latents of.

    python -m experiments.train --config=configs/autoencoder_tiny.py --workdir=runs/autoencoder
    python -m experiments.ship_autoencoder --workdir=runs/autoencoder --out=tiny_autoencoder.safetensors

About 20 minutes on two CPU cores (2,500 steps of 8 pictures); held-out panels come back at 30.8 dB. docs/autoencoder.md
holds scores along the way and what was tried.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import as_config, parse_variant, profile_section, train_section
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.objectives.autoencoder import AutoencoderLoss


def get_config(argument: str | None = None) -> ConfigDict:
    parse_variant(argument, ("tiny",))
    config = ConfigDict()
    config.name = "autoencoder-tiny"
    config.seed = 29
    config.objective = "autoencoder"
    config.dry_run = False  # True: read the data, describe the first batch, and stop
    config.model = as_config(AutoencoderConfig.tiny())
    config.loss = ConfigDict(dataclasses.asdict(AutoencoderLoss()))
    config.data = ConfigDict({"size": 96, "scenes": 0.1})
    config.profile = profile_section()
    config.train = train_section(
        {
            "steps": 2500,
            "batch_size": 8,
            "optimizer": "muon",
            "muon_matrices": r"(resnet_\d|attention|downsample|upsample).*kernel$",
            "learning_rate": 3e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.98,
            "ema": 0.998,
            "eval_every": 250,
            "checkpoint_every": 250,
            "log_every": 20,
        }
    )
    config.eval = ConfigDict({"examples": 64, "scenes": 0.0})  # panels alone: they are what it is for
    return config
