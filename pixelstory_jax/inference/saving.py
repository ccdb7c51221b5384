"""Answers as files: an overlay, one PNG per mask, and JSON. Each file appears whole or not at all."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelstory_jax.data.masks import encode_rle, mask_polygons
from pixelstory_jax.inference.answers import Target
from pixelstory_jax.inference.overlay import Exchange, draw_answers

DESCRIPTION = "answer.json"


def save_answers(
    folder: Path, image: np.ndarray, exchanges: Sequence[Exchange], details: dict[str, Any] | None = None
) -> list[Path]:
    """Writes a conversation about one picture into `folder`, replacing what an earlier call wrote there.

    overlay.png       the picture with the masks, question, answer and legend of every turn
    mask_1_apple.png  one mask per target, 0 and 255, at the size of the picture; turn_2_mask_1_... in later turns
    answer.json       `details`, size of the picture, and per turn the question, text, phrases, and per target score,
                      box (x, y, width, height), COCO run lengths (exact) and polygons (outer borders)

    Returns the paths. Raises OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _earlier_files(folder)
    files: dict[str, bytes] = {"overlay.png": png_bytes(draw_answers(image, exchanges))}
    turns = []
    for number, exchange in enumerate(exchanges, start=1):
        targets = []
        for k, target in enumerate(exchange.answer.targets, start=1):
            name = f"{f'turn_{number}_' if number > 1 else ''}mask_{k}{_slug(target.phrase)}.png"
            files[name] = png_bytes(target.mask.astype(np.uint8) * 255)
            targets.append({**_describe(target), "file": name})
        turns.append(
            {
                "question": exchange.question,
                "text": exchange.answer.text,
                "phrases": exchange.answer.phrases,
                "targets": targets,
            }
        )
    description = {**(details or {}), "size": list(image.shape[:2]), "turns": turns, "files": [*files]}
    files[DESCRIPTION] = (json.dumps(description, indent=1) + "\n").encode()
    for name, content in files.items():
        write_whole(folder / name, content)
    for name in earlier - files.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in files]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def png_bytes(picture: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W] or [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _describe(target: Target) -> dict[str, Any]:
    return {
        "phrase": target.phrase,
        "score": round(target.score, 6),
        "box": list(target.box),
        "area": int(np.count_nonzero(target.mask)),
        "rle": encode_rle(target.mask),
        "polygons": mask_polygons(target.mask),
    }


def _slug(phrase: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", phrase.lower()).strip("_")[:40].strip("_")
    return f"_{words}" if words else ""


def _earlier_files(folder: Path) -> set[str]:
    """Names of the mask files that an earlier call wrote, as its JSON lists them."""
    try:
        listed = json.loads((folder / DESCRIPTION).read_text())["files"]
        return {name for name in listed if re.fullmatch(r"(turn_\d+_)?mask_\d+\w*\.png", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
