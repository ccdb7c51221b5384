"""A whole text-to-image pipeline in a folder as diffusers reads and writes it: networks, tokenizers, sampler."""

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
from pixelstory_jax.interop.autoencoder_table import (
    autoencoder_config,
    autoencoder_settings,
    autoencoder_table,
    current_names,
)
from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_config, clip_text_settings, released_names
from pixelstory_jax.interop.settings import read_json
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_folder import TorchPart
from pixelstory_jax.interop.torch_layout import Params, Table, map_tensors
from pixelstory_jax.interop.unet_table import config_from_diffusers, unet_settings, unet_table
from pixelstory_jax.models.paths import unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig

OTHER_NOISE = ("EDM", "FlowMatch")  # beginnings of class names of schedulers
FOLDERS = {"unet": "unet", "autoencoder": "vae", "text": "text_encoder", "text_2": "text_encoder_2"}
TOKENIZERS = {"text": "tokenizer", "text_2": "tokenizer_2"}
DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_VERSION = "0.30.0"  # written into settings; the names in them are older than that


@dataclass(frozen=True)
class PipelineFolder:
    """What a folder holds.

    Attributes:
      params: by slash path, "unet/…", "autoencoder/…", "text/…" and, in SDXL, "text_2/…". Of a folder they are
        LazyArrays, which are read when they are asked for, in the dtypes of the files.
      tokenizers: by encoder name, "text" and, in SDXL, "text_2".
      picture_size: side in pixels of the pictures that the U-Net was trained on.
      zero_negative: whether an absent negative prompt means zeros instead of the states of an empty text.
    """

    config: StoryDiffusionConfig
    params: dict[str, Any]
    tokenizers: dict[str, ClipTokenizer]
    sampler: SamplerConfig
    picture_size: int
    zero_negative: bool

    def tree(self) -> Params:
        """All parameters, read now: a nested dict of float32 arrays."""
        return unflatten({path: np.asarray(value, np.float32) for path, value in self.params.items()})


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "a diffusers pipeline")


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
    index = _read(root / "model_index.json")
    texts = ["text"]
    if any(index.get("text_encoder_2") or ()):  # diffusers writes [null, null] for a part that is absent
        texts.append("text_2")
    text_settings = {name: _read(root / FOLDERS[name] / "config.json") for name in texts}
    unet = _read(root / "unet" / "config.json")
    size = unet.get("sample_size") or 64
    if not isinstance(size, int):
        raise WeightsError(f"{root / 'unet' / 'config.json'} has sample_size {size!r}; one number is supported.")
    config = StoryDiffusionConfig(
        config_from_diffusers(unet),
        autoencoder_config(_read(root / "vae" / "config.json")),
        **{name: clip_text_config(settings) for name, settings in text_settings.items()},
        text_layer=-2 if "text_2" in texts else -1,
    )
    return PipelineFolder(
        config,
        _open_networks(root, config),
        {name: ClipTokenizer.from_folder(root / TOKENIZERS[name]) for name in texts},
        _sampler(root / "scheduler" / "scheduler_config.json", sampler),
        size * config.autoencoder.reduction,
        bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def _sampler(path: Path, kind: str | None) -> SamplerConfig:
    """The scheduler's settings, read as `kind`; refuses those of models that are noised in another way."""
    settings = _read(path)
    name = str(settings.get("_class_name"))
    if name.startswith(OTHER_NOISE):
        raise WeightsError(f"{path} is of {name}: a model of another kind than Stable Diffusion 1.5 or SDXL.")
    return SamplerConfig.from_diffusers(settings, kind)


def _open_networks(root: Path, config: StoryDiffusionConfig) -> LazyParams:
    """The parameters of all networks, not read yet."""
    shapes = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    params: LazyParams = {}
    for name, table in _tables(config).items():
        folder = root / FOLDERS[name]
        tensors: TensorMap = open_tensors(folder)
        if name == "autoencoder":
            tensors = current_names(tensors)
        elif name != "unet":
            tensors = released_names(tensors)
        try:
            opened = map_tensors(table, tensors, shapes[name])
        except WeightsError as error:
            raise WeightsError(f"{folder}: {error}") from None
        params.update({f"{name}/{path}": value for path, value in opened.items()})
    return params


def pipeline_parts(config: StoryDiffusionConfig) -> list[TorchPart]:
    """The networks of a folder, for `TorchWriter`."""
    stems = {"unet": DIFFUSERS_STEM, "autoencoder": DIFFUSERS_STEM}
    return [
        TorchPart(FOLDERS[name], stems.get(name, "model"), table, f"{name}/") for name, table in _tables(config).items()
    ]


def pipeline_files(pipeline: PipelineFolder) -> dict[str, str]:
    """All that is in a folder besides weights, by its path: settings, scheduler, tokenizers.

    Raises:
      WeightsError: diffusers has no settings for this pipeline.
    """
    _check_expressible(pipeline)
    files = {name: json.dumps(table, indent=2, sort_keys=True) + "\n" for name, table in _settings(pipeline).items()}
    for name, tokenizer in pipeline.tokenizers.items():
        files |= {f"{TOKENIZERS[name]}/{file}": text for file, text in tokenizer.files().items()}
    return files


def _settings(pipeline: PipelineFolder) -> dict[str, dict[str, Any]]:
    """The content of every JSON file of diffusers and transformers, by its path."""
    config, sampler = pipeline.config, pipeline.sampler.to_diffusers()
    size = pipeline.picture_size // config.autoencoder.reduction
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    texts = {"text": config.text} | ({"text_2": config.text_2} if config.text_2 else {})
    absent = ["feature_extractor", "image_encoder"]
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", sampler["_class_name"]],
    }
    if config.text_2:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": pipeline.zero_negative}
    else:
        index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        absent.append("safety_checker")
    files = {
        "unet/config.json": unet_settings(config.unet, size) | version,
        "vae/config.json": autoencoder_settings(config.autoencoder) | {"sample_size": pipeline.picture_size} | version,
        "scheduler/scheduler_config.json": sampler | version,
    }
    for name, text in texts.items():
        table = clip_text_settings(text)
        files[f"{FOLDERS[name]}/config.json"] = table
        index[FOLDERS[name]] = ["transformers", table["architectures"][0]]
        index[TOKENIZERS[name]] = ["transformers", "CLIPTokenizer"]
    return {**files, "model_index.json": index | dict.fromkeys(absent, [None, None]) | version}


def _check_expressible(pipeline: PipelineFolder) -> None:
    """Raises where neither pipeline of diffusers would compute the same."""
    config, names = pipeline.config, {"text"} | ({"text_2"} if pipeline.config.text_2 else set())
    kind, layer = ("StableDiffusionXLPipeline", -2) if config.text_2 else ("StableDiffusionPipeline", -1)
    wrong = []
    if config.text_layer != layer:
        wrong.append(f"it takes text states of layer {layer}, not {config.text_layer}")
    if config.text.projection:
        wrong.append("its first text encoder has no projection")
    if config.text_2 and not config.text_2.projection:
        wrong.append("its second text encoder has a projection")
    if pipeline.zero_negative and not config.text_2:
        wrong.append("an absent negative prompt is an empty text, not zeros")
    if pipeline.picture_size % config.autoencoder.reduction:
        wrong.append(f"pictures are multiples of {config.autoencoder.reduction} pixels, not {pipeline.picture_size}")
    if pipeline.tokenizers.keys() != names:
        wrong.append(f"it has tokenizers for {' and '.join(sorted(names))}, not {sorted(pipeline.tokenizers)}")
    if wrong:
        raise WeightsError(f"This model cannot be written as a {kind}: {'; '.join(wrong)}.")


def _tables(config: StoryDiffusionConfig) -> dict[str, Table]:
    """The mapping table of each network."""
    tables = {"unet": unet_table(config.unet), "autoencoder": autoencoder_table(config.autoencoder), "text": CLIP_TEXT}
    return tables if config.text_2 is None else tables | {"text_2": CLIP_TEXT}
