"""A whole text-to-image pipeline from one file in the original latent-diffusion layout (.safetensors, .ckpt)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from pixelstory_jax.data.clip_tokenizer import ClipTokenizer
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.interop.autoencoder_table import autoencoder_config
from pixelstory_jax.interop.clip_text_table import PREFIX, clip_text_config
from pixelstory_jax.interop.diffusers_folder import FOLDERS, TOKENIZERS, PipelineFolder
from pixelstory_jax.interop.ldm_tables import TEXT, TEXT_2, UNET, ldm_table
from pixelstory_jax.interop.settings import read_json
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import map_tensors
from pixelstory_jax.interop.unet_table import config_from_diffusers
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig

CONV_IN = f"{UNET}input_blocks.0.0.weight"
NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
PUBLISHED = {"sd15": StoryDiffusionConfig.sd15, "sdxl": StoryDiffusionConfig.sdxl}
PICTURE_SIZES = {"sd15": 512, "sdxl": 1024}
CONFIGS: dict[str, Callable[..., Any]] = {  # of each part, from its config.json
    "unet": config_from_diffusers,
    "autoencoder": autoencoder_config,
    "text": clip_text_config,
    "text_2": clip_text_config,
}
_OTHERS = {
    "conditioner.embedders.0.model.": "the refiner of SDXL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "edm_mean": "Playground 2.5",
    f"{UNET}joint_blocks.": "Stable Diffusion 3",
    f"{UNET}double_blocks.": "FLUX",
    "text_encoders.": "a pipeline of another generation",
}


def ldm_kind(tensors: TensorMap) -> str:
    """Whether a file is "sd15" or "sdxl", by its keys.

    Raises:
      WeightsError: it is another model, one for other tasks, or only a part of a model.
    """
    known = " and ".join(NAMES.values())
    for start, name in _OTHERS.items():
        if any(key.startswith(start) for key in tensors):
            raise WeightsError(f"This file is {name} ({start}…); {known} can be read.")
    if CONV_IN not in tensors:
        raise WeightsError(
            f"This file has no {CONV_IN}; a whole checkpoint of {known} in the original layout was expected."
        )
    channels = tensors[CONV_IN].shape[1:2]
    if channels != (4,):
        task = " (inpainting)" if channels == (9,) else ""
        raise WeightsError(f"{CONV_IN} takes {channels[0]} channels{task}; {known} with 4 can be read.")
    for kind, start in {"sdxl": TEXT_2, "sd15": TEXT["sd15"]}.items():
        if any(key.startswith(start) for key in tensors):
            return kind
    raise WeightsError(f"This file has a U-Net but no text encoder: {TEXT['sd15']}… or {TEXT_2}… was expected.")


def read_ldm(
    file: str | os.PathLike[str], settings: str | os.PathLike[str] | None, sampler: str | None = None
) -> PipelineFolder:
    """Reads a Stable Diffusion 1.5 or SDXL checkpoint.

    Args:
      file: the checkpoint.
      settings: a pipeline folder of diffusers for what a single file lacks: the tokenizers, the scheduler (if it has
        one; else that of the published models), and sizes (unet/config.json and so on) where they differ from the
        published ones. Weights in it are not read.
      sampler: read the scheduler's settings as this kind, as `read_pipeline` does.

    Raises:
      WeightsError: no tokenizers, a file of another kind, or tensors that do not fit.
      ValueError: settings that the networks do not have.
    """
    tensors = open_tensors(file)
    try:
        kind = ldm_kind(tensors)
        folder, tokenizers = _tokenizers(kind, settings)
        config = _config(kind, folder)
        params = _map(kind, config, tensors)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    index = _optional(folder / "model_index.json")
    return PipelineFolder(
        config=config,
        params=params,
        tokenizers=tokenizers,
        sampler=_sampler(folder, sampler, tensors),
        picture_size=_picture_size(kind, folder, config),
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", kind == "sdxl" and not index)),
    )


def _tokenizers(kind: str, settings: str | os.PathLike[str] | None) -> tuple[Path, dict[str, ClipTokenizer]]:
    names = {name: folder for name, folder in TOKENIZERS.items() if kind == "sdxl" or name == "text"}
    wanted = " and ".join(names.values())
    if settings is None:
        raise WeightsError(
            f"A single file has no tokenizers; give a pipeline folder of {NAMES[kind]} with {wanted} as settings."
        )
    root = Path(settings)
    absent = [folder for folder in names.values() if not (root / folder).is_dir()]
    if absent:
        raise WeightsError(
            f"The settings {root} have no folder {' and '.join(absent)}; {NAMES[kind]} needs {wanted} of a pipeline."
        )
    return root, {name: ClipTokenizer.from_folder(root / folder) for name, folder in names.items()}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _config(kind: str, folder: Path) -> StoryDiffusionConfig:
    """The published sizes, or those of the folder where it names them."""
    paths = {
        name: folder / part / "config.json" for name, part in FOLDERS.items() if kind == "sdxl" or name != "text_2"
    }
    found: dict[str, Any] = {name: CONFIGS[name](read_json(path)) for name, path in paths.items() if path.is_file()}
    return replace(PUBLISHED[kind](), **found)


def _map(kind: str, config: StoryDiffusionConfig, tensors: TensorMap) -> LazyParams:
    start = TEXT[kind]
    has_prefix = any(key.startswith(start + PREFIX) for key in tensors)
    shapes = jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0))
    return map_tensors(ldm_table(config, has_prefix), tensors, shapes)


def _sampler(folder: Path, kind: str | None, tensors: TensorMap) -> SamplerConfig:
    """The folder's, but with what marks in the file say of the U-Net's training."""
    path = folder / "scheduler" / "scheduler_config.json"
    options = read_json(path) if path.is_file() else SamplerConfig().to_diffusers()
    if "v_pred" in tensors:
        options = {**options, "prediction_type": "v_prediction"}
    if "ztsnr" in tensors:
        options = {**options, "rescale_betas_zero_snr": True}
    return SamplerConfig.from_diffusers(options, kind)


def _picture_size(kind: str, folder: Path, config: StoryDiffusionConfig) -> int:
    latents = _optional(folder / "unet" / "config.json").get("sample_size")
    return int(latents) * config.autoencoder.reduction if latents else PICTURE_SIZES[kind]
