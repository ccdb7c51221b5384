"""The tiny vision tower, projector and language model that the tiny PixelLM starts from.

Trained by configs/pretrain_tiny.py on training scenes only; docs/pretraining.md tells how, and how well it does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pixelstory_jax.interop.safetensors_files import read_safetensors

TINY_START = Path(__file__).parent / "assets" / "tiny_start.safetensors"
SHIPPED_PARTS = ("vision/", "mm_projector/", "llama/")


def read_start(source: str) -> tuple[dict[str, np.ndarray], str]:
    """Starting weights by parameter path, and what to call them.

    Args:
      source: "builtin" for the shipped file, "" for none (random initialisation), or a .safetensors file of that kind.

    Raises:
      WeightsError: the file is missing or damaged.
    """
    if not source:
        return {}, "random initialisation"
    path = TINY_START if source == "builtin" else Path(source)
    arrays, _ = read_safetensors(path)
    name = "the shipped tiny vision tower and language model" if source == "builtin" else str(path)
    return {key: array.astype(np.float32) for key, array in arrays.items()}, name
