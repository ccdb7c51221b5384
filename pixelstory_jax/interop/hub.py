"""Where weights come from: a path, or an id of the Hugging Face hub where `huggingface_hub` and a network are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pixelstory_jax.interop.tensors import WeightsError

SETTINGS = (".json", ".model", ".txt", ".jinja")
TIMEOUT = 20.0  # seconds
NEVER = ("safety_checker/", "onnx/", "original/", "vae_1_0/", "vae_encoder/", "vae_decoder/")


def wanted_files(names: Sequence[str]) -> list[str]:
    """Of the files of a repository those that are read here: settings, tokenizers, and one edition of the weights.

    Safetensors rather than pickles, whole precision rather than variants (`model.fp16.safetensors`), and of a pipeline
    its parts rather than the same model in one file.
    """
    weights = [name for name in names if name.endswith((".safetensors", ".bin")) and not name.startswith(NEVER)]
    if "model_index.json" in names:
        weights = [name for name in weights if "/" in name]
    folders = {name.rpartition("/")[0] for name in weights}
    chosen: list[str] = []
    for folder in folders:
        own = [name for name in weights if name.rpartition("/")[0] == folder]
        own = [name for name in own if name.endswith(".safetensors")] or own
        chosen += [name for name in own if not _is_variant(name)] or own
    settings = [name for name in names if name.endswith(SETTINGS) and not name.startswith(NEVER)]
    return sorted(chosen) + settings


def _is_variant(name: str) -> bool:
    """Whether something stands between stem and suffix, as in model.fp16-00001-of-00002.safetensors."""
    return name.rpartition("/")[2].count(".") > 1


def resolve_source(source: str) -> Path:
    """The file or folder that `source` names; a hub id, as openai/clip-vit-large-patch14, is fetched into its cache.

    What follows an id names a folder or a file in it: maverickrzw/PixelLM-7B/hf_model.

    Raises:
      WeightsError: no such path, and no such id or no way to fetch it; one sentence.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?", source)
    if not match:
        raise WeightsError(f"There is no file or folder {source}.")
    repository, inside = match.groups()
    found = _fetched(source, repository, inside) / (inside or "")
    if not found.exists():
        raise WeightsError(f"{repository} on the Hugging Face hub has no {inside}.")
    return found


def _fetched(source: str, repository: str, inside: str | None) -> Path:
    """Where the cache of the hub has a repository, or a part of it."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise WeightsError(
            f"There is no folder {source}; if it is an id of the Hugging Face hub, pip install huggingface_hub first."
        ) from None
    names, unreachable = [inside, f"{inside}/*"] if inside else None, None
    try:
        if not inside:
            files = HfApi().model_info(repository, timeout=TIMEOUT).siblings or ()
            names = wanted_files([file.rfilename for file in files])
    except Exception as error:  # without a network: all that the cache has
        unreachable = error
    try:
        return Path(snapshot_download(repository, allow_patterns=names, local_files_only=names is None))
    except Exception as error:
        cause = unreachable or error
        reason = " ".join(str(cause).split()).split(". ")[0].rstrip(".")
        raise WeightsError(
            f"There is no folder {source}, and it cannot be fetched from the Hugging Face hub nor found in its cache "
            f"({type(cause).__name__}: {reason[:160]})."
        ) from error
