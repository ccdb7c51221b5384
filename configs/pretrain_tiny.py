"""The tiny vision tower and language model that configs/pixellm.py:tiny starts from.

    python -m experiments.train --config=configs/pretrain_tiny.py --workdir=runs/pretrain

Trains on scenes of the embedded pictures (trained names and training scenes only) from random initialisation;
docs/pretraining.md holds the log of the run that made the shipped weights. `python -m experiments.ship_pretrained
--workdir=runs/pretrain` writes them as pixelstory_jax/data/builtin/assets/tiny_start.safetensors.
"""

from ml_collections import ConfigDict

from configs import as_config
from pixelstory_jax.models.pixellm import PixelLMConfig


def get_config(argument: str | None = None) -> ConfigDict:
    del argument
    config = ConfigDict()
    config.name = "pretrain-tiny"
    config.seed = 17
    config.objective = "pretraining"
    config.init_from = ""
    config.model = as_config(PixelLMConfig.tiny())
    config.dense_weight = 1.0
    config.data = ConfigDict(
        {
            "name": "builtin",
            "folder": "",
            "tokenizer": "small",
            "style": "plain",
            "conversations": 1,
            "questions": 3,  # rows of a picture: a caption, boxes in words, and the conversations
            "length": 88,
            "kinds": ConfigDict({"category": 3.0, "attribute": 2.0, "relation": 2.0, "count": 1.0, "absent": 2.0}),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1800,
            "batch_size": 16,
            "optimizer": "muon",  # learns names from less than half of the pictures that AdamW needs
            "learning_rate": 2.5e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "weight_decay": 0.05,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.98,
            "eval_every": 400,
            "checkpoint_every": 200,
            "log_every": 20,
        }
    )
    config.eval = ConfigDict({"examples": 64})
    return config
