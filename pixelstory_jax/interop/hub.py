"""Where weights come from: a path, or an id of the Hugging Face hub where `huggingface_hub` and a network are."""

from __future__ import annotations

import re
from pathlib import Path

from pixelstory_jax.interop.tensors import WeightsError

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin", "*.gguf")
UNWANTED = ("*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*openvino*", "*.ot", "original/*")


def resolve_source(source: str) -> Path:
    """The file or folder that `source` names; a hub id, as openai/clip-vit-large-patch14, is fetched into its cache.

    Raises:
      WeightsError: no such path, and no such id or no way to fetch it; one sentence.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith((".", "/")):
        raise WeightsError(f"There is no file or folder {source}.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise WeightsError(
            f"There is no folder {source}; if it is an id of the Hugging Face hub, pip install huggingface_hub first."
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise WeightsError(
            f"There is no folder {source}, and it cannot be fetched from the Hugging Face hub nor found in its cache "
            f"({type(error).__name__}: {reason[:160]})."
        ) from error
