"""What any source of weights becomes, before it is written as a checkpoint or starts a training run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.interop.tensors import LazyArray, LazyParams, WeightsError
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.llava import LlavaConfig
from pixelstory_jax.models.pixellm import PixelLMConfig
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig

MODELS: dict[str, Any] = {
    "pixellm": PixelLMConfig,
    "llava": LlavaConfig,
    "llama": LlamaConfig,
    "clip-vision": ClipVisionConfig,
    "clip-text": ClipTextConfig,
    "storydiffusion": StoryDiffusionConfig,
}
"""Kind of weights, the `objective` of a saved config -> its sizes."""
DTYPES = ("float32", "bfloat16", "float16")
OWN_DATA = "pixelstory_jax_data"  # in config.json of a PixelLM of ours: fields of a config's section `data`

GENERATION = "generation_config.json"
SCHEDULER = "scheduler/scheduler_config.json"

# Files of a tokenizer or around it that are taken along as they are.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", GENERATION, "processor_config.json"),
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Weights:
    """A network with its parameters, not read yet.

    Attributes:
      kind: one of `MODELS`.
      config: its sizes, a frozen dataclass.
      params: by slash path.
      files: what of a tokenizer comes with it: path inside a folder -> where it is, or its text.
      data: fields of a config's section `data` that the source decides.
      settings: further fields of a config, by dotted name.
      notes: what a person should know.
    """

    kind: str
    config: Any
    params: LazyParams
    files: Mapping[str, Path | str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tokenizer_files(folder: Path) -> dict[str, Path | str]:
    """The files of `TOKENIZER_FILES` that a folder has."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def prefixed(params: LazyParams, prefix: str) -> LazyParams:
    """The same parameters as part of a larger network."""
    return {prefix + path: value for path, value in params.items()}


def without_prefix(params: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The parameters of one part of a network, under its own paths."""
    return {path.removeprefix(prefix): value for path, value in params.items() if path.startswith(prefix)}


def cast_params(params: LazyParams, dtype: str) -> LazyParams:
    """All of them in one precision; "keep" changes nothing.

    Raises:
      WeightsError: an unknown name.
    """
    if dtype == "keep":
        return params
    if dtype not in DTYPES:
        raise WeightsError(f"dtype is {dtype!r}; known are keep, {', '.join(DTYPES)}.")
    return {path: value.astype(np.dtype(dtype), path) for path, value in params.items()}


def grown_rows(value: LazyArray, rows: int, axis: int, seed: int) -> LazyArray:
    """A table of tokens with more tokens than the file has; the new ones are drawn as transformers does, N(0, 0.02)."""
    missing = rows - value.shape[axis]
    if missing <= 0:
        return value
    shape = tuple(rows if number == axis else size for number, size in enumerate(value.shape))
    extra = tuple(missing if number == axis else size for number, size in enumerate(value.shape))

    def read() -> np.ndarray:
        new = np.random.default_rng(seed).normal(0.0, 0.02, extra)
        return np.concatenate([np.asarray(value), new.astype(value.dtype)], axis=axis)

    return LazyArray.whole(shape, value.dtype, read)


def copy_files(files: Mapping[str, Path | str], folder: Path) -> None:
    """Writes `files` (path inside the folder -> where it is, or its text) into a folder, which is made if needed."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_text(content, encoding="utf-8")
