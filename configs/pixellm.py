"""PixelLM: answers about a picture in text and masks (arXiv 2312.02228).

    python -m experiments.train --config=configs/pixellm.py                     # tiny, on the embedded pictures
    python -m experiments.train --config=configs/pixellm.py:tiny,data=photos --config.data.folder=stamps
    python -m experiments.train --config=configs/pixellm.py:7b --config.data.tokenizer=llava/tokenizer.model \\
        --config.init_from=clip-vision:clip-vit-large-patch14-336,llava

Variants: tiny (the default; two CPU cores, see the README for time and scores), 7b and 13b (the paper's models, whose
tower and language model are frozen: init_from names folders of released weights or an imported checkpoint, see
docs/weights.md; :7b,data=builtin --config.allow_random_frozen=True --config.data.tokenizer=small tries everything out
without any).
Options: data=builtin, photos (the cut-outs of tuxpaint-stamps-default) or mixture (the paper's data sets below
--config.data.folder, the default of 7b and 13b), see docs/data.md.
"""

from ml_collections import ConfigDict

from configs import as_config, parse_variant, profile_section, train_section
from pixelstory_jax.models.pixellm import PixelLMConfig


def get_config(argument: str | None = None) -> ConfigDict:
    variant, options = parse_variant(argument, ("tiny", "7b", "13b"), data="")
    config = ConfigDict()
    config.name = f"pixellm-{variant}"
    config.seed = 1
    config.objective = "pixellm"
    config.dry_run = False  # True: read the data, describe the first batch, and stop
    config.allow_random_frozen = False  # True for dry runs: frozen parts may start from random initialisation
    config.loss = ConfigDict({"language": 1.0, "bce": 2.0, "dice": 0.5, "refinement": 2.0})  # the paper's
    config.data = ConfigDict(
        {
            "name": options["data"] or ("builtin" if variant == "tiny" else "mixture"),
            "folder": "",  # data=photos: the unpacked package; data=mixture: the data sets, see docs/data.md
            "photos": "",  # annotated photos for the out-of-domain check (docs/data.md); empty: as found
            "tokenizer": "small",
            "style": "plain",
            "conversations": 4,  # drawn per picture
            "questions": 4,  # rows Q of a picture; a conversation is one row
            "length": 100,  # T tokens of a row, image tokens included
            "slots": 8,  # S target masks of a picture, over its questions
            "kinds": ConfigDict(
                {
                    "one": 3.0,
                    "several": 4.0,
                    "category": 2.5,
                    "attribute": 2.0,
                    "relation": 1.0,
                    "count": 1.5,
                    "absent": 2.0,
                    "absent_group": 1.0,
                    "follow_up": 0.7,
                }
            ),
        }
    )
    if config.data.name == "mixture":
        config.data.update(
            {
                "folder": config.data.folder or "dataset",
                "wording": "released",  # or varied
                "questions": 3,
                "asked": 3,  # questions about a picture, and
                "asked_targets": 3,  # names in one of them
                # Weights of groups, whose sets are drawn equally often; those of the released training command.
                "mixture": ConfigDict(
                    {
                        "semantic": {
                            "weight": 2.0,
                            "sets": ("ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"),
                        },
                        "referring": {"weight": 9.0, "sets": ("refclef", "refcoco", "refcoco+", "refcocog")},
                        "conversation": {"weight": 2.0, "sets": ("llava_instruct_150k",)},
                        "reasoning": {"weight": 4.0, "sets": ("muse",)},
                    }
                ),
            }
        )
    config.eval = ConfigDict(
        {
            # What is asked: of the embedded pictures, or benchmarks of the folder (docs/evaluation.md).
            "splits": ("refcoco|val", "muse|val") if config.data.name == "mixture" else ("test", "unseen", "photos"),
            "examples": 100,  # questions per kind and split in the final evaluation
            "quick_examples": 24,  # the same during training
            "batch_size": 32,
            "max_new_tokens": 64,
            "sheet": 10,  # examples on the PNG sheet
            "seed": 1000,
        }
    )
    config.profile = profile_section()
    config.train = train_section(
        {
            "steps": 1300,
            "batch_size": 8,
            "optimizer": "adamw",
            "learning_rate": 1.5e-3,
            "learning_rate_multipliers": ConfigDict(),
            "warmup_steps": 50,
            "schedule": "cosine",
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.98,
            "eval_every": 450,
            "checkpoint_every": 225,
            "log_every": 10,
            "mesh": ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}),
        }
    )
    if variant == "tiny":
        config.model = as_config(PixelLMConfig.tiny())
        config.init_from = "builtin"  # the shipped tower and language model; "" (with trained.vision=True): random
        config.trained = ConfigDict({"vision": False, "language_model": True})
        config.loss.dice = 1.0
        if config.data.name == "mixture":
            config.data.update({"length": 160, "slots": 16})  # three questions with three masks each fit
        config.train.optimizer = "muon"
        config.train.muon_matrices = r"kernel(_\d)?$"
        # The language model's layers are trained already. The prompts of the mask decoder start ten times weaker than
        # its other tokens, so their projector learns fastest.
        config.train.learning_rate_multipliers = ConfigDict(
            {"llama/layers": 0.4, "text_projector": 8.0, "token_weights": 5.0, "mask_decoder": 3.0, "neck": 3.0}
        )
        return config

    preset = PixelLMConfig.pixellm_7b if variant == "7b" else PixelLMConfig.pixellm_13b
    config.model = as_config(preset(lora_rank=8))
    config.init_from = ""  # weights have to be named (docs/weights.md): the tower and the language model are frozen
    config.trained = ConfigDict({"vision": False, "language_model": False})
    config.data.update({"style": "llava_v1", "length": 512, "slots": 16, "tokenizer": "tokenizer.model"})
    config.eval.update({"examples": 500, "max_new_tokens": 512})
    config.train.update(
        {
            "steps": 5000,
            "batch_size": 160,
            "learning_rate": 3e-4,
            "warmup_steps": 100,
            "schedule": "linear",
            "weight_decay": 0.0,
            "b2": 0.95,
            "eval_every": 500,
            "checkpoint_every": 500,
        }
    )
    config.train.mesh.update({"data": 1, "fsdp": -1})
    return config
