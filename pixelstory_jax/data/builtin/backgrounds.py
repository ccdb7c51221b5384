"""Backgrounds of the composed scenes: procedural textures and crops of the embedded photos, NumPy and Pillow only."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin import things

PHOTOS = things.FOLDER / "assets" / "backgrounds"
_PHOTO_SHARE = 0.4


@functools.cache
def photos(held_out: bool) -> tuple[Image.Image, ...]:
    """The embedded photo backgrounds, those of training or those kept for evaluation, in the order of their names."""
    prefix = "test_" if held_out else "train_"
    images = []
    for path in sorted(PHOTOS.glob(prefix + "*.webp")):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return tuple(images)


def draw_background(rng: np.random.Generator, height: int, width: int, held_out: bool) -> Image.Image:
    """A random RGB background of the given size; ``held_out`` chooses photos that training never shows."""
    if rng.random() < _PHOTO_SHARE:
        return _photo(rng, height, width, photos(held_out))
    makers = (_gradient, _noise, _stripes, _checks, _blobs, _plain)
    maker = makers[rng.choice(len(makers), p=(0.2, 0.25, 0.15, 0.1, 0.2, 0.1))]
    return maker(rng, height, width)


def _photo(rng: np.random.Generator, height: int, width: int, choice: tuple[Image.Image, ...]) -> Image.Image:
    photo = choice[rng.integers(len(choice))]
    # A random window of the right shape between half and all of what fits.
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.5, 1.0)
    w, h = width * scale, height * scale
    left, top = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
    image = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Half of the photos are tinted: the grey ones would otherwise teach that colour means object.
    if rng.random() < 0.5:
        tint = np.asarray(_colour(rng), np.float32) / 255
        gain = (0.35 + tint) * rng.uniform(0.8, 1.2)
        image = image.point([min(255, int(value * gain[band])) for band in range(3) for value in range(256)])
    return image


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour, float32 in 0..255, of any hue; a quarter are nearly grey."""
    colour = rng.uniform(0, 255, 3).astype(np.float32)
    saturation = 0.15 if rng.random() < 0.25 else rng.uniform(0.3, 1.0)
    return colour.mean() + (colour - colour.mean()) * np.float32(saturation)


def _mix(weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> Image.Image:
    """Blends two colours by a weight map [H, W] in 0..1, through a palette of 256 steps."""
    steps = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    palette = (first * (1 - steps) + second * steps).clip(0, 255).astype(np.uint8)
    indices = (np.clip(weight, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(palette[indices])


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y = np.linspace(0, height / max(height, width), height, dtype=np.float32)[:, None]
    x = np.linspace(0, width / max(height, width), width, dtype=np.float32)[None]
    return y, x


def _plain(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(int(c) for c in _colour(rng)))


def _gradient(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    y, x = _axes(height, width)
    angle = rng.uniform(0, 2 * math.pi)
    slope = np.float32(math.cos(angle)) * (x - 0.5) + np.float32(math.sin(angle)) * (y - 0.5)
    return _mix(slope + 0.5, _colour(rng), _colour(rng))


def _noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth noise: a few octaves of coarse random grids, enlarged."""
    total = np.zeros((height, width), np.float32)
    cells, weight = int(rng.integers(2, 9)), 0.6
    for _ in range(3):
        grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR)
        total += np.asarray(layer, np.float32) * np.float32(weight / 255)
        cells, weight = cells * 3, weight * 0.5
    return _mix(total, _colour(rng), _colour(rng))


def _stripes(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    y, x = _axes(height, width)
    angle, count = rng.uniform(0, math.pi), rng.uniform(3, 14)
    phase = np.float32(math.cos(angle) * count) * x + np.float32(math.sin(angle) * count) * y
    # A triangle wave: unlike a sine it comes out the same on every processor.
    wave = np.abs(phase % 1 - np.float32(0.5)) * 4 - 1
    sharpness = np.float32(rng.uniform(0.5, 6))
    return _mix(wave * sharpness * 0.5 + 0.5, _colour(rng), _colour(rng))


def _checks(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    y, x = _axes(height, width)
    count = np.float32(rng.uniform(3, 12))
    shift = rng.uniform(0, 1, 2).astype(np.float32)
    cells = (np.floor(y * count + shift[0]) + np.floor(x * count + shift[1])) % 2
    return _mix(cells * np.float32(rng.uniform(0.2, 1)), _colour(rng), _colour(rng))


def _blobs(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    y, x = _axes(height, width)
    field = np.zeros((height, width), np.float32)
    for _ in range(int(rng.integers(3, 9))):
        centre, radius = rng.uniform(0, 1, 2).astype(np.float32), np.float32(rng.uniform(0.05, 0.3))
        distance = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / radius**2
        field = np.maximum(field, np.clip((1.2 - distance) * 4, 0, 1))
    return _mix(field, _colour(rng), _colour(rng))
