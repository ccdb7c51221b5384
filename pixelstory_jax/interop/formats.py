"""Every layout of weights that can be read: how it is told from the others, and what it becomes.

One function per layout turns a path into `Weights`: sizes, parameters (not read yet), tokenizer files. Names of tensors
are in the mapping tables, settings in the modules beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_config, clip_text_shapes, released_names
from pixelstory_jax.interop.clip_vision_folder import OTHER_PARTS, clip_vision_config, read_clip_vision
from pixelstory_jax.interop.diffusers_folder import PipelineFolder, read_pipeline
from pixelstory_jax.interop.hub import resolve_source
from pixelstory_jax.interop.llama_folder import is_tied, llama_config, llama_shapes, llama_table
from pixelstory_jax.interop.llava_folder import is_hf, llava_config, read_llava, tower_name
from pixelstory_jax.interop.pixellm_folder import ARCHITECTURE, RAW_PREFIX, read_pixellm, read_raw_pixellm
from pixelstory_jax.interop.settings import json_text, read_json
from pixelstory_jax.interop.shapes import check_params
from pixelstory_jax.interop.tensor_files import TORCH_SUFFIXES, open_tensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import map_tensors
from pixelstory_jax.interop.weights import (
    GENERATION,
    OWN_DATA,
    SCHEDULER,
    Weights,
    prefixed,
    tokenizer_files,
)
from pixelstory_jax.training.checkpoints import HERE

TOKENIZER = f"{HERE}/tokenizer"
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
ASKED = ("mm_use_im_start_end", "mm_use_im_patch_token", "image_aspect_ratio")  # how an original LLaVA was asked

FORMATS: dict[str, str] = {
    "pixellm": "PixelLM as released (folder; CLIP from --vision) or as trained (file; LLaVA from --settings)",
    "llava": "LLaVA, original or of transformers (folder)",
    "clip-vision": "CLIPVisionModel or the tower of a CLIPModel (folder)",
    "clip-text": "CLIPTextModel, with projection or without, or that of a CLIPModel (folder)",
    "llama": "LlamaForCausalLM (folder)",
    "gguf": "LLaMA-family GGUF (file)",
    "diffusers-sd15": "Stable Diffusion 1.5 pipeline of diffusers (folder)",
    "diffusers-sdxl": "Stable Diffusion XL pipeline of diffusers (folder)",
    "ldm-sd15": "Stable Diffusion 1.5 in one file (.safetensors, .ckpt; tokenizer from --settings)",
    "ldm-sdxl": "Stable Diffusion XL in one file (.safetensors, .ckpt; tokenizers from --settings)",
}


def detect_format(path: Path) -> str:
    """The name in `FORMATS` of a file or folder.

    Raises:
      WeightsError: it is none of them.
    """
    if path.is_file():
        return _detect_file(path)
    if (path / "model_index.json").is_file():
        two = any(read_json(path / "model_index.json").get("text_encoder_2") or ())
        return "diffusers-sdxl" if two else "diffusers-sd15"
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} is no folder of weights: config.json (transformers) or model_index.json (diffusers) was expected."
        )
    settings = read_json(path / "config.json")
    if ARCHITECTURE in (settings.get("architectures") or ()):
        return "pixellm"
    kind = str(settings.get("model_type"))
    by_type = {
        "llama": "llama",
        "llava": "llava",
        "llava_llama": "llava",
        "clip_vision_model": "clip-vision",
        "clip_text_model": "clip-text",
        "clip": "clip-vision",
    }
    if kind not in by_type:
        raise WeightsError(f"{path} holds a model of type {kind!r}; known are {', '.join(by_type)}.")
    return by_type[kind]


def _detect_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "gguf"
    if path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES:
        from pixelstory_jax.interop.ldm_file import ldm_kind

        tensors = open_tensors(path)
        raw = any(name.startswith(f"{RAW_PREFIX}model.mask_decoder.") for name in tensors)
        return "pixellm" if raw else f"ldm-{ldm_kind(tensors)}"
    raise WeightsError(f"{path} is no file of weights: .safetensors, .ckpt or .gguf was expected.")


def read_weights(
    source: str,
    layout: str = "auto",
    vision: str | None = None,
    settings: str | None = None,
    need_tower: bool = True,
) -> Weights:
    """What a file, folder or hub id holds, in any of the layouts.

    Args:
      layout: a name in `FORMATS`, or "auto".
      vision: where the CLIP tower is, for the layouts that name it only (PixelLM, original LLaVA).
      need_tower: whether PixelLM and LLaVA without their tower are refused; else it is just not there.
      settings: a pipeline folder with the tokenizers, and sizes if they are not the published ones, for single files.

    Raises:
      WeightsError: nothing there, another layout than named, or tensors that do not fit.
    """
    path = resolve_source(source)
    if layout not in (*FORMATS, "auto"):
        raise WeightsError(f"The format {layout!r} is unknown; known are {', '.join(FORMATS)}.")
    found = layout if layout.startswith("clip-") else detect_format(path)
    if layout not in ("auto", found):
        raise WeightsError(f"{source} holds {FORMATS[found]}: format {found}, not {layout}.")
    readers: dict[str, Callable[[], Weights]] = {
        "pixellm": lambda: _pixellm(path, vision, settings, need_tower),
        "llava": lambda: _llava(path, vision, need_tower),
        "clip-vision": lambda: _clip_vision(path),
        "clip-text": lambda: _clip_text(path),
        "llama": lambda: _llama(path),
        "gguf": lambda: _gguf(path),
        "diffusers-sd15": lambda: _pipeline(read_pipeline(path, "ddim"), path),
        "diffusers-sdxl": lambda: _pipeline(read_pipeline(path, "ddim"), path),
        "ldm-sd15": lambda: _ldm(path, settings),
        "ldm-sdxl": lambda: _ldm(path, settings),
    }
    try:
        weights = readers[found]()
        if need_tower:
            check_params(weights.kind, weights.config, weights.params)
        return weights
    except WeightsError as error:
        raise error if str(path) in str(error) else WeightsError(f"{path}: {error}") from error
    except ValueError as error:  # sizes that the networks refuse
        raise WeightsError(f"{path}: {error}") from error


def _language_data(files: Mapping[str, Path | str]) -> dict[str, Any]:
    """Where the tokenizer of an imported language model or text encoder is, and the files around it."""
    name = next((name for name in ("tokenizer.model", "tokenizer.json", "vocab.json") if name in files), None)
    return {**({"files": TOKENIZER} if files else {}), **({"tokenizer": f"{TOKENIZER}/{name}"} if name else {})}


def _generation(settings: Mapping[str, Any], files: Mapping[str, Path | str]) -> dict[str, Path | str]:
    """`files` with a generation_config.json, which older folders have as a part of their settings."""
    marks = {name: settings[name] for name in MARKS if settings.get(name) is not None}
    return {**({GENERATION: json_text({"_from_model_config": True, **marks})} if marks else {}), **files}


def _llama(path: Path) -> Weights:
    settings, tensors = read_json(path / "config.json"), open_tensors(path)
    config = llama_config(settings)
    params = map_tensors(llama_table(is_tied(settings, tensors)), tensors, llama_shapes(config))
    files = _generation(settings, tokenizer_files(path))
    return Weights("llama", config, params, files, _language_data(files))


def _gguf(path: Path) -> Weights:
    from pixelstory_jax.interop.gguf_file import (
        gguf_llama,
        gguf_marks,
        gguf_tokenizer_json,
        gguf_tokenizer_settings,
        open_gguf,
    )

    file = open_gguf(path)
    config, params = gguf_llama(file)
    files: dict[str, Path | str] = _generation(gguf_marks(file.metadata), {})
    notes: tuple[str, ...] = ()
    try:
        files["tokenizer.json"] = gguf_tokenizer_json(file.metadata)
        files["tokenizer_config.json"] = json_text(gguf_tokenizer_settings(file.metadata))
    except WeightsError as error:
        notes = (f"No tokenizer was taken along: {error}",)
    return Weights("llama", config, params, files, _language_data(files), notes=notes)


def _clip_vision(path: Path) -> Weights:
    config = clip_vision_config(read_json(path / "config.json"))
    params = read_clip_vision(config, open_tensors(path))
    return Weights("clip-vision", config, params)


def _clip_text(path: Path) -> Weights:
    settings, tensors = read_json(path / "config.json"), dict(open_tensors(path))
    if "text_config" in settings:  # a whole CLIPModel: its projection is none of the text encoder's own
        settings = {**settings["text_config"], "architectures": ["CLIPTextModel"]}
        others = ("vision_model.", *(part for part in OTHER_PARTS if part != "text_model."))
        tensors = {name: value for name, value in tensors.items() if not name.startswith(others)}
    config = clip_text_config(settings)
    params = map_tensors(CLIP_TEXT, released_names(tensors), clip_text_shapes(config))
    files = tokenizer_files(path)
    return Weights("clip-text", config, params, files, _language_data(files))


def _tower_folder(path: Path, vision: str | None, settings: Mapping[str, Any]) -> Path | None:
    if vision:
        return resolve_source(vision)
    name = tower_name(settings, path)
    if not name:
        return None
    if not Path(name).is_dir():  # an id of a hub: only what a person names is fetched
        raise WeightsError(f"{path} names {name} as its vision tower; give that, or its folder, with --vision.")
    return Path(name)


def _llava(path: Path, vision: str | None, need_tower: bool) -> Weights:
    settings, tensors = read_json(path / "config.json"), open_tensors(path)
    hf = is_hf(settings)
    whole = hf or any(name.startswith("model.vision_tower.") for name in tensors)
    tower = _tower_folder(path, vision, settings) if not hf and (need_tower or vision) else None
    config = llava_config(settings, read_json(tower / "config.json") if tower else None)
    params = read_llava(config, tensors, hf)
    if not whole and tower:
        params |= prefixed(read_clip_vision(config.vision, open_tensors(tower)), "vision/")
    if not whole and not tower and need_tower:
        raise WeightsError(f"{path} holds no vision tower and names none; give the folder of a CLIP with --vision.")
    files = _generation(settings.get("text_config") or settings, tokenizer_files(path))
    asked = {name: settings[name] for name in ASKED if name in settings}
    return Weights("llava", config, params, files, _language_data(files), {"llava": asked})


def _pixellm(path: Path, vision: str | None, settings: str | None, need_tower: bool) -> Weights:
    if path.is_file():
        if not settings:
            raise WeightsError(f"{path} has no settings; give the folder of the LLaVA under it with --settings.")
        base = resolve_source(settings)
        config, params = read_raw_pixellm(path, base)
        files = tokenizer_files(base)
        return Weights("pixellm", config, params, files, {**_language_data(files), "style": "llava_v1"})
    tower = _tower_folder(path, vision, read_json(path / "config.json")) if need_tower or vision else None
    if tower is None and need_tower:
        raise WeightsError(f"{path} holds no vision tower and names none; give the folder of a CLIP with --vision.")
    config, params = read_pixellm(path, tower)
    files = tokenizer_files(path)
    own = read_json(path / "config.json").get(OWN_DATA) or {}
    data = {**_language_data(files), "style": own.get("style", "llava_v1")}
    return Weights("pixellm", config, params, files, data)


def _pipeline(read: PipelineFolder, path: Path) -> Weights:
    parts = {"text": "tokenizer", "text_2": "tokenizer_2"}
    files = {
        f"{parts[name]}/{file.name}": file
        for name in read.tokenizers
        for file in sorted((path / parts[name]).iterdir())
        if file.is_file()
    }
    sampler = {name: value for name, value in vars(read.sampler).items() if name != "schedule"}
    settings = {
        "zero_negative": read.zero_negative,
        "schedule": vars(read.sampler.schedule),
        "sampler": sampler,
    }
    files |= {SCHEDULER: path / SCHEDULER} if (path / SCHEDULER).is_file() else {}
    data = {"tokenizer": TOKENIZER, "size": read.picture_size}
    return Weights("storydiffusion", read.config, read.params, files, data, settings, _left_out(path))


def _left_out(path: Path) -> tuple[str, ...]:
    """What of a pipeline's folder an import changes."""
    notes = [
        "Stories are sampled with DDIM, as the released app does; an export has the scheduler of the source again."
    ]
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    others = [name for name in ("safety_checker", "feature_extractor", "image_encoder") if any(index.get(name) or ())]
    if others:
        notes.append(f"Not taken along: {', '.join(others)}.")
    return tuple(notes)


def _ldm(path: Path, settings: str | None) -> Weights:
    from pixelstory_jax.interop.ldm_file import read_ldm

    folder = resolve_source(settings) if settings else None
    read = read_ldm(path, folder, "ddim")
    return _pipeline(read, folder or path.parent)
