"""The tiny vision tower and language model that configs/pixellm.py:tiny starts from, in two stages like CLIP and LLaVA.

    python -m experiments.train --config=configs/pretrain_tiny.py:tower --workdir=runs/tower
    python -m experiments.ship_pretrained --workdir=runs/tower --out=tower.safetensors
    python -m experiments.train --config=configs/pretrain_tiny.py:language --config.init_from=tower.safetensors \\
        --workdir=runs/language
    python -m experiments.ship_pretrained --workdir=runs/language --out=tiny_start.safetensors

Scenes of the embedded pictures, trained names and training scenes only. docs/pretraining.md holds times, scores and the
log of the run that made the shipped weights.
"""

from ml_collections import ConfigDict

from configs import as_config, parse_variant, profile_section, train_section
from pixelstory_jax.models.pixellm import PixelLMConfig


def get_config(argument: str | None = None) -> ConfigDict:
    variant, _ = parse_variant(argument, ("tower", "language"))
    config = ConfigDict()
    config.name = f"pretrain-tiny-{variant}"
    config.seed = 17
    config.objective = "pretraining"
    config.dry_run = False  # True: read the data, describe the first batch, and stop
    config.init_from = ""
    config.model = as_config(PixelLMConfig.tiny())
    config.train_tower = True
    config.dense_weight = 1.0  # of what the patches show
    config.alignment_weight = 0.0  # of the nearness of image tokens to the embeddings of their names
    config.data = ConfigDict(
        {
            "name": "builtin",
            "folder": "",
            "tokenizer": "small",
            "style": "plain",
            "conversations": 1,
            "questions": 3,  # rows of a picture: a caption, boxes in words, and the conversations
            "length": 88,
            "boxes_in_captions": False,
            "presence": 0,  # questions of a row about what may not be there
            "kinds": ConfigDict(
                {"category": 3.0, "attribute": 2.0, "relation": 2.0, "count": 1.0, "absent": 1.6, "absent_group": 0.4}
            ),
        }
    )
    config.profile = profile_section()
    config.train = train_section(
        {
            "steps": 1800,
            "batch_size": 16,
            "optimizer": "muon",  # learns names from less than half of the pictures that AdamW needs
            "muon_matrices": r"(^|/)layers/.*kernel$",
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
    if variant == "language":
        config.train_tower = False
        config.dense_weight = 0.0
        config.alignment_weight = 1.0
        config.data.update({"questions": 4, "conversations": 2, "boxes_in_captions": True, "length": 132})
        config.data.presence = 4
        config.data.kinds.update({"several": 2.0, "absent": 1.0, "absent_group": 1.0})
        config.train.update({"steps": 3000, "learning_rate": 2e-3, "warmup_steps": 40, "eval_every": 500})
    return config
