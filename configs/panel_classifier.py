"""The small classifier that measures whether generated stories keep their character (docs/story_metrics.md).

    python -m experiments.train --config=configs/panel_classifier.py --workdir=runs/panel_classifier
    python -m experiments.ship_panel_classifier --workdir=runs/panel_classifier --out=panel_classifier.safetensors

Real panels of training stories, half of them after the tiny autoencoder. docs/story_metrics.md holds time and accuracy.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import parse_variant, profile_section, train_section
from pixelstory_jax.objectives.panel_classifier import Augmentation


def get_config(argument: str | None = None) -> ConfigDict:
    parse_variant(argument, ("tiny",))
    config = ConfigDict()
    config.name = "panel-classifier"
    config.seed = 43
    config.objective = "panel_classifier"
    config.dry_run = False  # True: read the data, describe the first batch, and stop
    config.autoencoder = "builtin"  # whose decoded panels it also learns from; "" for none
    config.model = ConfigDict({"channels": (32, 48, 80), "features": 64, "groups": 8})
    config.augmentation = ConfigDict(dataclasses.asdict(Augmentation()))
    config.data = ConfigDict({"size": 96})
    config.profile = profile_section()
    config.train = train_section(
        {
            "steps": 600,
            "batch_size": 32,
            "optimizer": "muon",
            "muon_matrices": r"(resnet/conv_\d|downsample/conv|features)/kernel$",
            "learning_rate": 3e-3,
            "warmup_steps": 30,
            "schedule": "cosine",
            "weight_decay": 0.02,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.99,
            "ema": 0.99,
            "eval_every": 300,
            "checkpoint_every": 100,
            "log_every": 10,
        }
    )
    config.eval = ConfigDict({"examples": 600})
    return config
