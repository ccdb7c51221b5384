"""StoryDiffusion: stories whose panels keep their character (tiny: 25 minutes on 2 CPU cores).

    python -m experiments.train --config=configs/storydiffusion.py
    python -m experiments.train --config=configs/storydiffusion.py:tiny,data=wesnoth --config.data.folder=wesnoth

Variants: tiny (default) trains from random initialisation on the embedded characters; sd15 and sdxl fine-tune released
weights (--config.init_from=SOURCE, a diffusers pipeline, an imported checkpoint or one file, see docs/weights.md) on
stories of yours (docs/data.md), by LoRA unless --config.trained.unet=full.
"""

from ml_collections import ConfigDict

from configs import as_config, parse_variant, profile_section, train_section
from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_AUTOENCODER
from pixelstory_jax.interop.autoencoder_table import read_autoencoder_sizes
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig


def get_config(argument: str | None = None) -> ConfigDict:
    variant, options = parse_variant(argument, ("tiny", "sd15", "sdxl"), data="")
    config = ConfigDict()
    config.name = f"storydiffusion-{variant}"
    config.seed = 17
    config.objective = "storydiffusion"
    config.dry_run = False  # True: read the data, describe the first batch, and stop
    config.zero_negative = variant == "sdxl"  # an absent negative prompt is zeros, not the states of an empty text
    config.schedule = ConfigDict(
        {
            "prediction": "v_prediction" if variant == "tiny" else "epsilon",
            "zero_terminal_snr": variant == "tiny",
        }
    )
    config.sampler = ConfigDict({})
    config.loss = ConfigDict(
        {
            "min_snr": 5.0,
            "drop_caption": 0.1,
            "share": 0.5,
            "rate": 0.5,
            "time_spread": 0.0,
            "time_mean": 0.0,
            "mixed": 0.0,
        }
    )
    config.trained = ConfigDict({"text": variant == "tiny", "unet": "full" if variant == "tiny" else "lora"})
    config.data = ConfigDict(
        {
            "name": options["data"] or ("builtin" if variant == "tiny" else "folder"),
            "folder": "",
            "tokenizer": "small",
            "size": 96,
            "panels": 4,
            "named": 0.25,  # share of stories whose captions say which character it is
            "empty": 0.03,
            "pairs": 0.05,
            "encoded": 2500 if variant == "tiny" else 0,  # different stories, encoded once; 0: new ones all the time
            "draws": 1,  # of stories of your own: examples per story
        }
    )
    config.eval = ConfigDict(
        {
            "stories": 200,
            "quick_stories": 16,
            "sweep_stories": 40,
            "rate": 0.7,
            "rates": (0.3, 0.5),
            "steps": 20,
            "guidance": 3.0,
            "guide_sharing": variant == "tiny",  # guidance strengthens sharing too; the released code does not
            "batch_size": 8,
            "sheet": 6,
            "seed": 1000,
            # For pictures that no classifier knows: what the sheet shows.
            "prompts": (
                "a girl with a blue hat reading a book at home",
                "a girl with a blue hat walking on a road",
                "a girl with a blue hat in a forest",
                "a girl with a blue hat making breakfast",
            ),
        }
    )
    config.profile = profile_section()
    config.train = train_section(
        {
            "steps": 1900,
            "batch_size": 8,
            "optimizer": "muon",
            "muon_matrices": r"^unet/(down|mid|up).*kernel$|^text/layers/.*kernel$",
            "learning_rate": 3e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "b1": 0.9,
            "b2": 0.98,
            "ema": 0.995,
            "eval_every": 700,
            "checkpoint_every": 300,
            "log_every": 10,
        }
    )
    if variant == "tiny":
        config.model = as_config(StoryDiffusionConfig.tiny())
        config.model.autoencoder = as_config(read_autoencoder_sizes(TINY_AUTOENCODER))
        config.init_from = "tiny_autoencoder"
        # Noise at every step lets panels that began as different characters still agree on one.
        config.sampler = ConfigDict(
            {"kind": "dpmpp_2m", "algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"}
        )
        # With zero terminal SNR, min-SNR weights would vanish at the noisiest steps, where sampling begins.
        config.loss.update({"min_snr": 0.0, "share": 0.9, "rate": 0.7, "mixed": 0.5})
        config.loss.update({"time_spread": 1.2, "time_mean": 1.0})
        config.eval.prompts = (
            "a character standing on a beach",
            "a character walking in a forest",
            "a character jumping on the moon",
            "a character climbing in the mountains",
        )
        return config

    size = 1024 if variant == "sdxl" else 512
    preset = StoryDiffusionConfig.sdxl if variant == "sdxl" else StoryDiffusionConfig.sd15
    config.model = as_config(preset(lora_rank=16, lora_alpha=16.0, dtype="bfloat16", remat="full"))
    config.init_from = ""  # a diffusers pipeline or an imported checkpoint has to be named
    config.data.update({"tokenizer": "", "size": size})  # "": those of init_from
    config.eval.update({"steps": 30, "guidance": 5.0, "batch_size": 1, "rate": 0.5, "rates": ()})
    config.train.update(
        {
            "steps": 3000,
            "batch_size": 64,
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "warmup_steps": 100,
            "ema": 0.0,
            "eval_every": 500,
            "checkpoint_every": 500,
        }
    )
    config.train.mesh.update({"data": 1, "fsdp": -1})
    return config
