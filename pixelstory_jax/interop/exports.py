"""Checkpoints of this package as folders that PyTorch programs load: every layout that can be written.

One function per layout plans an `Export`: which parameters go into which files by which table, and the texts around
them. `write_export` then moves one parameter at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.sources import build_tokenizer
from pixelstory_jax.data.tokenizers import SMALL_VOCABULARY, Tokenizer
from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_settings
from pixelstory_jax.interop.clip_vision_folder import clip_vision_settings, complete_tower, preprocessor_settings
from pixelstory_jax.interop.diffusers_folder import PipelineFolder, pipeline_files, pipeline_parts
from pixelstory_jax.interop.llama_folder import generation_settings, llama_settings, llama_table
from pixelstory_jax.interop.llava_folder import (
    llava_hf_settings,
    llava_hf_table,
    llava_settings,
    llava_table,
    processor_settings,
)
from pixelstory_jax.interop.pixellm_folder import (
    FLOAT32_PARTS,
    OWN_PATHS,
    OWN_WEIGHTS,
    added_tokens,
    differences,
    pixellm_settings,
    tokenizer_settings,
)
from pixelstory_jax.interop.safetensors_files import write_safetensors
from pixelstory_jax.interop.settings import json_text, read_json
from pixelstory_jax.interop.shapes import check_params
from pixelstory_jax.interop.tables import CLIP_VISION, pixellm
from pixelstory_jax.interop.tensors import LazyParams, WeightsError
from pixelstory_jax.interop.torch_folder import TorchPart, TorchWriter
from pixelstory_jax.interop.weights import (
    GENERATION,
    OWN_DATA,
    SCHEDULER,
    copy_files,
    prefixed,
    tokenizer_files,
    without_prefix,
)
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig

GONE = "is not there any more; name it with --tokenizer."
TOWER_FOLDER = "clip_vision_tower"  # the original code takes a name for a CLIP that has "clip" in it
EXPORTS: dict[str, tuple[str, ...]] = {
    "pixellm": ("pixellm",),
    "llava": ("llava",),
    "llava-hf": ("llava",),
    "llama": ("llama", "llava", "pixellm"),
    "clip-vision": ("clip-vision", "llava", "pixellm"),
    "clip-text": ("clip-text", "storydiffusion"),
    "diffusers-sd15": ("storydiffusion",),
    "diffusers-sdxl": ("storydiffusion",),
}
"""Layout -> kinds of checkpoints that it can be written from."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
      kind: of the checkpoint (`weights.MODELS`). model: its sizes. config: the whole saved config.
      params: by slash path, without low-rank additions.
      dtype: of the files, or "keep".
      tower: what the settings of PixelLM and original LLaVA call their CLIP; None for the folder written beside.
      out: the folder as it will be called.
    """

    kind: str
    model: Any
    config: Mapping[str, Any]
    params: LazyParams
    dtype: str = "keep"
    tower: str | None = None
    out: str = ""

    def file_dtype(self, params: LazyParams) -> str:
        """What the settings call the precision of a network's files: that of most of its numbers."""
        if self.dtype != "keep":
            return self.dtype
        sizes: dict[str, int] = {}
        for value in params.values():
            sizes[str(value.dtype)] = sizes.get(str(value.dtype), 0) + value.nbytes
        return max(sizes, key=lambda name: sizes[name])


@dataclass(frozen=True)
class Export:
    """A folder to be written.

    Attributes:
      parts: its files of tensors. params: what goes into them. files: the others, by path inside the folder.
      float32: beginnings of torch keys that stay float32 whatever the rest has.
      own: parameters for a file of ours that PyTorch programs do not read.
      notes: what a person should know.
    """

    parts: tuple[TorchPart, ...]
    params: LazyParams
    files: Mapping[str, Path | str] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    own: LazyParams = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_export(layout: str, source: Source) -> Export:
    """The folder of a layout.

    Raises:
      WeightsError: an unknown layout, one that this kind of model does not have, or sizes that it cannot express.
    """
    if layout not in EXPORTS:
        raise WeightsError(f"The format {layout!r} is unknown; known are {', '.join(EXPORTS)}.")
    if source.kind not in EXPORTS[layout]:
        fitting = [name for name, kinds in EXPORTS.items() if source.kind in kinds]
        raise WeightsError(
            f"A checkpoint of {source.kind!r} cannot be written as {layout}; it can be as {' or '.join(fitting)}."
            if fitting
            else f"A checkpoint of {source.kind!r} has no PyTorch layout."
        )
    check_params(source.kind, source.model, source.params)
    planners: dict[str, Callable[[Source], Export]] = {
        "pixellm": _pixellm,
        "llava": _llava,
        "llava-hf": _llava_hf,
        "llama": _llama,
        "clip-vision": _clip_vision,
        "clip-text": _clip_text,
    }
    return planners[layout](source) if layout in planners else _pipeline(layout, source)


def write_export(
    folder: Path,
    export: Export,
    dtype: str,
    max_shard_size: int,
    progress: Callable[[str, int], None] | None = None,
) -> None:
    """Writes an export into an existing folder, one parameter at a time.

    Raises:
      WeightsError: a parameter does not fit, or its numbers do not fit into the dtype.
    """

    def wanted(key: str) -> Any:
        if key.startswith(export.float32):
            return np.dtype(np.float32)
        return None if dtype == "keep" else np.dtype(dtype)

    with TorchWriter(folder, export.parts, export.params, wanted, max_shard_size, progress) as writer:
        for path, value in export.params.items():
            writer.write(path, value)
    if export.own:
        write_safetensors(folder / OWN_WEIGHTS, {path: np.asarray(value) for path, value in export.own.items()})
    copy_files(export.files, folder)


def _language_model(source: Source) -> tuple[LlamaConfig, LazyParams]:
    if source.kind == "llama":
        return source.model, source.params
    return source.model.llama, without_prefix(source.params, "llama/")


def _language_dtype(source: Source) -> str:
    return source.file_dtype(_language_model(source)[1])


def _is_tied(params: LazyParams) -> bool:
    """Whether embedding and head hold the same numbers."""
    embedding, head = params["embedding"], params["head"]
    if embedding.dtype != head.dtype or embedding.shape != head.shape[::-1]:
        return False
    return bool(np.array_equal(np.asarray(embedding), np.asarray(head).T))


def _llama(source: Source) -> Export:
    config, params = _language_model(source)
    tied = _is_tied(params)
    vocabulary = vocabulary_files(source)
    generation = generation_settings()
    if isinstance(vocabulary.get(GENERATION), Path):  # the source's own
        generation = read_json(Path(vocabulary[GENERATION]))
    marks = {name: generation[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in generation}
    files = {
        **vocabulary,
        "config.json": json_text(llama_settings(config, tied, source.file_dtype(params)) | marks),
        GENERATION: json_text(generation),
    }
    return Export((TorchPart("", "model", llama_table(tied)),), params, files)


def _tower(source: Source) -> tuple[ClipVisionConfig, LazyParams]:
    """The vision tower as a CLIPVisionModel has it; a last layer that we do not have, and nobody reads, is zero."""
    if source.kind == "clip-vision":
        return source.model, source.params
    config, params = source.model.vision, without_prefix(source.params, "vision/")
    return complete_tower(config, params, config.layers + (not config.has_final_norm))


def _tower_files(config: ClipVisionConfig, dtype: str) -> dict[str, Path | str]:
    return {
        "config.json": json_text(clip_vision_settings(config, dtype)),
        "preprocessor_config.json": json_text(preprocessor_settings(config.canvas)),
    }


def _clip_vision(source: Source) -> Export:
    config, params = _tower(source)
    notes: tuple[str, ...] = ()
    if config.layers != (source.model if source.kind == "clip-vision" else source.model.vision).layers:
        notes = ("The last layer and the final norm, which this model does not have, are zero and the identity.",)
    return Export(
        (TorchPart("", "model", CLIP_VISION),), params, _tower_files(config, source.file_dtype(params)), notes=notes
    )


def _clip_text(source: Source) -> Export:
    whole = source.kind == "clip-text"
    config = source.model if whole else source.model.text
    params = source.params if whole else without_prefix(source.params, "text/")
    files: dict[str, Path | str] = {"config.json": json_text(clip_text_settings(config))}
    if whole:
        files |= vocabulary_files(source)
    return Export((TorchPart("", "model", CLIP_TEXT),), params, files)


def _beside(files: Mapping[str, Path | str]) -> dict[str, Path | str]:
    return {f"{TOWER_FOLDER}/{name}": content for name, content in files.items()}


def _tower_name(source: Source) -> str:
    return source.tower or str((Path(source.out) / TOWER_FOLDER).absolute())


def _with_tower(source: Source) -> tuple[TorchPart, LazyParams, dict[str, Path | str]]:
    """The folder of the tower beside a model that names it only."""
    config, params = _tower(source)
    part = TorchPart(TOWER_FOLDER, "model", CLIP_VISION, "vision/")
    return part, prefixed(params, "vision/"), _beside(_tower_files(config, source.file_dtype(params)))


def _without_tower(params: LazyParams) -> LazyParams:
    return {path: value for path, value in params.items() if not path.startswith("vision/")}


def _llava(source: Source) -> Export:
    tower, tower_params, tower_files = _with_tower(source)
    files = {
        "config.json": json_text(
            llava_settings(source.model, _tower_name(source), _language_dtype(source)) | source.config.get("llava", {})
        ),
        GENERATION: json_text(generation_settings()),
        **vocabulary_files(source),
        **tower_files,
    }
    model = TorchPart("", "model", llava_table(source.model.projector))
    return Export((model, tower), _without_tower(source.params) | tower_params, files)


def _llava_hf(source: Source) -> Export:
    files = {
        "config.json": json_text(llava_hf_settings(source.model, _language_dtype(source))),
        GENERATION: json_text(generation_settings()),
        "preprocessor_config.json": json_text(preprocessor_settings(source.model.vision.canvas)),
        "processor_config.json": json_text(processor_settings(source.model)),
        **vocabulary_files(source),
    }
    return Export((TorchPart("", "model", llava_hf_table()),), source.params, files)


def _pixellm(source: Source) -> Export:
    config = source.model
    tower, tower_params, tower_files = _with_tower(source)
    files = {
        "config.json": json_text(
            pixellm_settings(config, _tower_name(source), _language_dtype(source)) | {OWN_DATA: _asked_as(source)}
        ),
        GENERATION: json_text(generation_settings()),
        **vocabulary_files(source),
        **tower_files,
    }
    model = TorchPart("", "model", pixellm(config.scales, config.decoder.depth))
    params = _without_tower(source.params)
    own = {path: params.pop(path) for path in OWN_PATHS if path in params}
    notes = tuple(f"Other numbers in the original code: {text}." for text in differences(config))
    return Export((model, tower), params | tower_params, files, FLOAT32_PARTS, own, notes)


def _asked_as(source: Source) -> dict[str, Any]:
    """How the model was trained to be asked, which no field of the original settings names."""
    data = source.config.get("data", {})
    return {name: data[name] for name in ("style",) if name in data}


def vocabulary_files(source: Source) -> dict[str, Path | str]:
    """The tokenizer of a checkpoint, as files.

    Raises:
      WeightsError: the file that the config names is gone.
    """
    data = source.config.get("data", {})
    name = data.get("tokenizer")
    if source.kind == "pixellm" and name:
        return _pixellm_vocabulary(source, name)
    if not name and not data.get("files"):
        return {}
    folder = Path(data.get("files") or Path(name).parent)
    if not folder.is_dir():
        raise WeightsError(f"The tokenizer of the checkpoint, {name}, {GONE}")
    return tokenizer_files(folder)


def _pipeline(layout: str, source: Source) -> Export:
    from ml_collections import ConfigDict

    from pixelstory_jax.inference.painter import Painter

    if (layout == "diffusers-sdxl") != (source.model.text_2 is not None):
        other = "diffusers-sdxl" if source.model.text_2 else "diffusers-sd15"
        raise WeightsError(
            f"The checkpoint has {'two text encoders' if source.model.text_2 else 'one text encoder'}; "
            f"use the format {other}."
        )
    config = ConfigDict(source.config)
    try:
        painter = Painter.from_config(config, {})
    except ValueError as error:
        raise WeightsError(
            f"The tokenizers of the checkpoint cannot be read ({error}); name their pipeline's folder with --tokenizer."
        ) from error
    pipeline = PipelineFolder(
        source.model, source.params, painter.tokenizers, painter.sampler, config.data.size, painter.zero_negative
    )
    files: dict[str, Path | str] = dict(pipeline_files(pipeline))
    own = Path(config.data.tokenizer or "") / SCHEDULER
    if config.data.tokenizer and own.is_file():  # of the pipeline that was imported
        files |= _with_scheduler(files, own)
    return Export(tuple(pipeline_parts(source.model)), source.params, files)


def _with_scheduler(files: Mapping[str, Path | str], scheduler: Path) -> dict[str, Path | str]:
    """The files of a pipeline that differ with another scheduler."""
    index = json.loads(str(files["model_index.json"]))
    index["scheduler"] = ["diffusers", read_json(scheduler)["_class_name"]]
    return {SCHEDULER: scheduler, "model_index.json": json_text(index)}


def _pixellm_vocabulary(source: Source, name: str) -> dict[str, Path | str]:
    from ml_collections import ConfigDict

    if name != "small" and not Path(name).is_file():
        raise WeightsError(f"The tokenizer of the checkpoint, {name}, {GONE}")
    tokenizer = build_tokenizer(ConfigDict(source.config["data"]), source.model.group)
    settings = tokenizer_settings(tokenizer, source.model.llama.max_length)
    for entry in settings["added_tokens_decoder"].values():  # as in training, where the slow tokenizer did so
        entry.update(lstrip=True, rstrip=True)
    files: dict[str, Path | str] = {"added_tokens.json": json_text(added_tokens(tokenizer))}
    if name == "small" or name.endswith(".json"):
        file = SMALL_VOCABULARY if name == "small" else Path(name)
        vocabulary = json.loads(file.read_text(encoding="utf-8"))
        vocabulary["added_tokens"], marks = _added_entries(vocabulary, tokenizer, settings["added_tokens_decoder"])
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, **marks}
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in vocabulary["added_tokens"]
        }
        files["tokenizer.json"] = json.dumps(vocabulary, ensure_ascii=False)
    else:
        marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        files["tokenizer.model"] = Path(name)
    files["special_tokens_map.json"] = json_text(marks)
    files["tokenizer_config.json"] = json_text(settings)
    return files


def _added_entries(
    vocabulary: Mapping[str, Any], tokenizer: Tokenizer, own: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The added tokens of a `tokenizer.json` with those of ours, and its marks."""
    from tokenizers import Tokenizer as Vocabulary

    entries = {entry["id"]: entry for entry in vocabulary["added_tokens"]}
    entries |= {int(id_): {"id": int(id_), **entry} for id_, entry in own.items()}
    words = Vocabulary.from_str(json.dumps(vocabulary))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
    marks = {f"{mark}_token": words.id_to_token(id_) for mark, id_ in ids.items()}
    return [entries[id_] for id_ in sorted(entries)], marks


def bare_model(model: Any) -> Any:
    """The sizes without low-rank additions, as they are after merging."""
    if hasattr(model, "llama"):
        return dataclasses.replace(model, llama=bare_model(model.llama))
    if hasattr(model, "unet"):
        return dataclasses.replace(model, unet=dataclasses.replace(model.unet, lora_rank=0))
    if hasattr(model, "lora"):
        return dataclasses.replace(model, lora=dataclasses.replace(model.lora, rank=0))
    return model
