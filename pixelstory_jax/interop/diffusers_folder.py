"""A whole text-to-image pipeline from a folder as diffusers writes it: networks, tokenizers, sampler."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelstory_jax.data.clip_tokenizer import ClipTokenizer
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.interop.autoencoder_table import autoencoder_config, autoencoder_table, current_names
from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_config, released_names
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Params, Table, map_tensors
from pixelstory_jax.interop.unet_table import config_from_diffusers, unet_table
from pixelstory_jax.models.paths import unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig

FOLDERS = {"unet": "unet", "autoencoder": "vae", "text": "text_encoder", "text_2": "text_encoder_2"}
TOKENIZERS = {"text": "tokenizer", "text_2": "tokenizer_2"}


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder holds.

    Attributes:
      params: by slash path, "unet/…", "autoencoder/…", "text/…" and, in SDXL, "text_2/…"; read when they are asked for,
        in the dtypes of the files.
      tokenizers: by encoder name, "text" and, in SDXL, "text_2".
      picture_size: side in pixels of the pictures that the U-Net was trained on.
      zero_negative: whether an absent negative prompt means zeros instead of the states of an empty text.
    """

    config: StoryDiffusionConfig
    params: LazyParams
    tokenizers: dict[str, ClipTokenizer]
    sampler: SamplerConfig
    picture_size: int
    zero_negative: bool

    def tree(self) -> Params:
        """All parameters, read now: a nested dict of float32 arrays."""
        return unflatten({path: np.asarray(value, np.float32) for path, value in self.params.items()})


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
    texts = ["text"]
    if any(index.get("text_encoder_2") or ()):  # diffusers writes [null, null] for a part that is absent
        texts.append("text_2")
    text_settings = {name: _read_json(root / FOLDERS[name] / "config.json") for name in texts}
    unet_settings = _read_json(root / "unet" / "config.json")
    config = StoryDiffusionConfig(
        config_from_diffusers(unet_settings),
        autoencoder_config(_read_json(root / "vae" / "config.json")),
        **{name: clip_text_config(settings) for name, settings in text_settings.items()},
        text_layer=-2 if "text_2" in texts else -1,
    )
    return PipelineFolder(
        config,
        _open_networks(root, config),
        {name: ClipTokenizer.from_folder(root / TOKENIZERS[name]) for name in texts},
        SamplerConfig.from_diffusers(_read_json(root / "scheduler" / "scheduler_config.json"), sampler),
        int(unet_settings.get("sample_size") or 64) * config.autoencoder.reduction,
        bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def _open_networks(root: Path, config: StoryDiffusionConfig) -> LazyParams:
    """The parameters of all networks, not read yet."""
    shapes = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    params: LazyParams = {}
    for name, table in _tables(config).items():
        tensors: TensorMap = open_tensors(root / FOLDERS[name])
        if name == "autoencoder":
            tensors = current_names(tensors)
        elif name != "unet":
            tensors = released_names(tensors)
        try:
            opened = map_tensors(table, tensors, shapes[name])
        except WeightsError as error:
            raise WeightsError(f"{root / FOLDERS[name]}: {error}") from None
        params.update({f"{name}/{path}": value for path, value in opened.items()})
    return params


def _tables(config: StoryDiffusionConfig) -> dict[str, Table]:
    """The mapping table of each network."""
    tables = {"unet": unet_table(config.unet), "autoencoder": autoencoder_table(config.autoencoder), "text": CLIP_TEXT}
    return tables if config.text_2 is None else tables | {"text_2": CLIP_TEXT}
