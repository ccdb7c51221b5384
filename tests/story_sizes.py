"""A StoryDiffusion that compiles in seconds: its sizes, its config, and parameters that are nowhere zero."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs import as_config
from configs.storydiffusion import get_config
from pixelstory_jax.inference.painter import Painter
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from tests.models.small import random_like

SIDE = 32  # pixels of a panel: 8 x 8 latents, whose up blocks share 4 x 4 tokens
STEPS = 2
SIZES = StoryDiffusionConfig(
    UNetConfig(
        channels=(8, 16),
        depths=(0, 1),
        heads=(1, 1),
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        context_width=8,
        pooled_width=0,
        groups=4,
    ),
    AutoencoderConfig(block_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, groups=4, scaling_factor=0.7),
    ClipTextConfig(vocab=1024, length=24, width=8, layers=1, heads=1, mlp_width=16, eos_id=1023),
)


def smallest_story_config() -> ConfigDict:
    """The config of the tiny StoryDiffusion with these sizes."""
    config = get_config()
    config.model = as_config(SIZES)
    config.data.update({"size": SIDE, "panels": 3, "encoded": 0})
    config.eval.update({"stories": 3, "quick_stories": 2, "sweep_stories": 2, "steps": STEPS, "batch_size": 2})
    config.train.update({"batch_size": 2, "steps": 2})
    return config


def smallest_story_training() -> ConfigDict:
    """The same U-Net in the latents of the shipped autoencoder, which training starts with."""
    config = get_config()
    config.model.unet = as_config(dataclasses.replace(SIZES.unet, context_width=config.model.unet.context_width))
    config.data.update({"panels": 2, "encoded": 4})
    config.eval.update({"stories": 2, "quick_stories": 2, "sweep_stories": 1, "rates": (), "steps": STEPS})
    config.eval.update({"batch_size": 2, "sheet": 1})
    config.train.update({"batch_size": 2, "optimizer": "adamw"})
    return config


@functools.cache
def story_params() -> dict[str, Any]:
    """Random parameters with pictures of middling grey and clear differences between panels."""
    return random_like(jax.eval_shape(StoryDiffusion(SIZES).init, jax.random.key(0)))


def story_painter() -> Painter:
    return Painter.from_config(smallest_story_config(), story_params())


def save_checkpoint(workdir: Path, added: Mapping[str, float] | None = None, **changes: Any) -> Path:
    """A workdir as training leaves it, with one checkpoint; `added` to parameters, `changes` of its config."""
    config = {**json.loads(smallest_story_config().to_json()), **changes}
    params = unflatten(
        {path: np.asarray(leaf) + (added or {}).get(path, 0) for path, leaf in flatten(story_params()).items()}
    )
    items = {"params": ocp.args.PyTreeSave(params), "config": ocp.args.JsonSave(config)}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(workdir / "checkpoints" / "best" / "2", args=ocp.args.Composite(**items))
    return workdir
