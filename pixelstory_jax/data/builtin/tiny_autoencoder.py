"""The tiny autoencoder that the tiny StoryDiffusion works in the latents of.

Trained by configs/autoencoder_tiny.py; docs/autoencoder.md tells how, and how well it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixelstory_jax.interop.autoencoder_table import read_autoencoder_file
from pixelstory_jax.models.autoencoder import AutoencoderConfig

TINY_START = "tiny_autoencoder"  # config.init_from: only this autoencoder, all else at random
TINY_AUTOENCODER = Path(__file__).parent / "assets" / "tiny_autoencoder.safetensors"


def read_tiny_autoencoder() -> tuple[AutoencoderConfig, dict[str, Any]]:
    """Sizes, with the measured scale of the latents, and float32 parameters of the shipped autoencoder.

    Raises:
      WeightsError: the file is missing or damaged.
    """
    return read_autoencoder_file(TINY_AUTOENCODER)
