"""A whole text-to-image pipeline from a folder as diffusers writes it: networks, tokenizers, sampler."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from pixelstory_jax.data.clip_tokenizer import ClipTokenizer
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.interop.autoencoder_table import autoencoder_config, read_autoencoder
from pixelstory_jax.interop.clip_text_table import clip_text_config, read_clip_text
from pixelstory_jax.interop.safetensors_files import read_safetensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import Params, read_torch_tensors
from pixelstory_jax.interop.unet_table import config_from_diffusers, unet_table
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig

UNET_FILES = "diffusion_pytorch_model.safetensors"
TEXT_FILES = "model.safetensors"


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder holds.

    Attributes:
      tokenizers: by encoder name, "text" and, in SDXL, "text_2".
      picture_size: side in pixels of the pictures that the U-Net was trained on.
      zero_negative: whether an absent negative prompt means zeros instead of the states of an empty text.
    """

    config: StoryDiffusionConfig
    params: Params
    tokenizers: dict[str, ClipTokenizer]
    sampler: SamplerConfig
    picture_size: int
    zero_negative: bool


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or error}); a diffusers pipeline has it."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}).") from error


def read_pipeline(folder: str | os.PathLike[str], sampler: str | None = None) -> PipelineFolder:
    """Reads a Stable Diffusion 1.5 or SDXL pipeline.

    Args:
      folder: with model_index.json and the folders unet, vae, text_encoder, tokenizer, scheduler (and text_encoder_2,
        tokenizer_2).
      sampler: read the scheduler's settings as this kind ("ddim" as the StoryDiffusion apps do); None for its own.

    Raises:
      WeightsError: a file is missing or does not fit.
      ValueError: settings that the networks do not have.
    """
    root = Path(folder)
    index = _read_json(root / "model_index.json")
    texts = {"text": ("text_encoder", "tokenizer")}
    if any(index.get("text_encoder_2") or ()):  # diffusers writes [null, null] for a part that is absent
        texts["text_2"] = ("text_encoder_2", "tokenizer_2")
    text_settings = {name: _read_json(root / part / "config.json") for name, (part, _) in texts.items()}
    unet_settings = _read_json(root / "unet" / "config.json")
    config = StoryDiffusionConfig(
        config_from_diffusers(unet_settings),
        autoencoder_config(_read_json(root / "vae" / "config.json")),
        **{name: clip_text_config(settings) for name, settings in text_settings.items()},
        text_layer=-2 if "text_2" in texts else -1,
    )
    shapes = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    unet, _ = read_safetensors(root / "unet" / UNET_FILES)
    params = {
        "unet": read_torch_tensors(unet_table(config.unet), unet, shapes["unet"]),
        "autoencoder": read_autoencoder(config.autoencoder, read_safetensors(root / "vae" / UNET_FILES)[0]),
    }
    encoders: Mapping[str, Any] = {"text": config.text, "text_2": config.text_2}
    for name, (part, _) in texts.items():
        params[name] = read_clip_text(encoders[name], read_safetensors(root / part / TEXT_FILES)[0])
    return PipelineFolder(
        config,
        params,
        {name: ClipTokenizer.from_folder(root / part) for name, (_, part) in texts.items()},
        SamplerConfig.from_diffusers(_read_json(root / "scheduler" / "scheduler_config.json"), sampler),
        int(unet_settings.get("sample_size") or 64) * config.autoencoder.reduction,
        bool(index.get("force_zeros_for_empty_prompt", False)),
    )
