"""The tiny vision tower, projector and language model that the tiny PixelLM starts from.

Trained by configs/pretrain_tiny.py on training scenes only; docs/pretraining.md tells how, and how well it does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pixelstory_jax.data.pipeline import DataError
from pixelstory_jax.interop.safetensors_files import open_safetensors, read_safetensors
from pixelstory_jax.interop.tensors import WeightsError

TINY_START = Path(__file__).parent / "assets" / "tiny_start.safetensors"
SHIPPED_PARTS = ("vision/", "mm_projector/", "llama/")


class StartError(DataError):
    """Starting weights that are missing, damaged or do not hold a part that stays frozen; the text is one sentence."""


def start_name(source: str) -> str:
    """What to call the starting weights that `read_start` finds for `source`."""
    names = {"": "random initialisation", "builtin": "the shipped tiny vision tower and language model"}
    return names.get(source, source)


def is_own_file(source: str) -> bool:
    """Whether `source` is a .safetensors file of parameter paths (no dots in names), or one that cannot be read."""
    if not source.endswith(".safetensors"):
        return False
    try:
        return all("." not in name for name in open_safetensors(source))
    except WeightsError:
        return True


def read_start(source: str) -> dict[str, np.ndarray]:
    """Starting weights by parameter path, in the precision of the file.

    Args:
      source: "builtin" for the shipped file, "" for none (random initialisation), or a .safetensors file of that kind.

    Raises:
      StartError: the file is missing or damaged.
    """
    if not source:
        return {}
    try:
        return read_safetensors(TINY_START if source == "builtin" else source)[0]
    except WeightsError as error:
        raise StartError(f"The starting weights that config.init_from names cannot be read: {error}") from error
