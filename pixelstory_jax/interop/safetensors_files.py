"""Weights in .safetensors files: one function to read, one to write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixelstory_jax.interop.torch_layout import Tensors, WeightsError


def read_safetensors(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a file, and its metadata.

    Raises:
      WeightsError: a file that is absent, truncated or no safetensors file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}).") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (name -> array) under a temporary name beside `path`, then rename it."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        save_file(arrays, str(partial), metadata=dict(metadata or {}))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
