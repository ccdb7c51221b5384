"""Pictures from files of any kind, and their place on the square canvas that the models see.

H, W  height and width of the picture as it is stored (after EXIF rotation)
C     side of the canvas
h, w  height and width of the resized picture inside the canvas (top left corner; the rest is padding)

The geometry is that of PixelLM's released code (paper section 3.2 calls it padding): the long side becomes C, PIL's
antialiased bilinear filter, zeros to the right and below. Colours stay uint8; `models.pixellm.normalise_pixels` applies
the statistics on the device, after which the padding is set to zero.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_000_000
"""Pictures with more pixels are refused: a few kilobytes can claim to be gigabytes."""

# Only formats that Pillow decodes by itself: EPS, for one, would start another program on an untrusted file.
_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "GIF",
    "WEBP",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
    "JPEG2000",
    "AVIF",
)

ImageSource = str | os.PathLike[str] | bytes | np.ndarray | Image.Image


class ImageError(ValueError):
    """A picture that cannot be used; the message is one sentence that names the file and the reason."""


def open_image(source: ImageSource) -> np.ndarray:
    """Reads a picture as uint8 RGB [H, W, 3].

    Takes a path, the bytes of a file, a PIL image or an array ([H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8, or
    bool). EXIF rotation is applied, transparent parts are put on white, 16-bit samples are scaled to 8 bit, of an
    animation the first frame is taken. Raises `ImageError` for everything that is not a picture.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the given picture")
    if isinstance(source, bytes):
        return _decode(source, "the given bytes")
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder; the name of a picture file is needed.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"There is no picture at {path}.") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from None
    return _decode(data, str(path))


def fit_canvas(image: np.ndarray, canvas: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes uint8 [H, W, 3] so that the long side is `canvas`: (uint8 [C, C, 3] with zero padding, (h, w))."""
    height, width = fitted_size(image.shape[:2], canvas)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    padded = np.zeros((canvas, canvas, 3), np.uint8)
    padded[:height, :width] = np.asarray(resized)
    return padded, (height, width)


def fit_mask(mask: np.ndarray, canvas: int) -> np.ndarray:
    """The true mask [H, W] (bool or 0/1) on the canvas: uint8 0/1 [C, C].

    A canvas pixel belongs to the mask where the object covers at least half of it, so that shrinking keeps the
    area. An object too thin for that keeps the one pixel that it covers most.
    """
    padded = np.zeros((canvas, canvas), np.uint8)
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return padded
    height, width = fitted_size(mask.shape[:2], canvas)
    # First along the rows, then along the columns, as Pillow does; rows and columns without an object are left out.
    within = slice(rows[0], rows[-1] + 1)
    across = _resized(mask[within].astype(bool), (width, within.stop - within.start))
    filled = np.flatnonzero(across.any(axis=0))
    beside = slice(filled[0], filled[-1] + 1)
    whole = np.zeros((mask.shape[0], beside.stop - beside.start), np.float32)
    whole[within] = across[:, beside]
    covered = _resized(whole, (whole.shape[1], height))
    fitted = covered >= 0.5
    padded[:height, beside] = fitted if fitted.any() else covered == covered.max()
    return padded


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 [h, w] of numbers [H, W], at the size (w, h)."""
    image = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def fitted_size(size: tuple[int, ...], canvas: int) -> tuple[int, int]:
    """(h, w) that a picture of `size` (H, W) has on the canvas; at least one pixel each way."""
    scale = canvas * 1.0 / max(size)
    height, width = (min(canvas, max(1, int(side * scale + 0.5))) for side in size[:2])
    return height, width


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) that `open_image` gives a picture, from the head of its file; errors as there."""
    try:
        with path.open("rb") as file, _open(file, str(path)) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if sideways else (image.height, image.width)
    except FileNotFoundError:
        raise ImageError(f"There is no picture at {path}.") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from None


def _decode(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise ImageError(f"{name} is empty, not a picture.")
    with _open(io.BytesIO(data), name) as image:
        return _to_rgb(image, name)


def _open(file: BinaryIO, name: str) -> Image.Image:
    """A picture of which only the head is read yet."""
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels, the most that is accepted.") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a format that is known here (PNG, JPEG, WebP, ...).") from None
    except Exception as error:  # decoders of damaged headers raise almost anything
        raise ImageError(f"{name} is damaged and cannot be read as a picture ({_reason(error)}).") from None


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels, more than the {MAX_PIXELS:,} that are accepted."
        )
    if not image.width or not image.height:
        raise ImageError(f"{name} has no pixels.")
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            samples = np.asarray(image)
            grey = _eight_bit(samples)
            if "transparency" in image.info:  # of a PNG: the one sample that is transparent
                grey = np.where(samples == image.info["transparency"], np.uint8(255), grey)
            return np.repeat(grey[..., None], 3, axis=2)
        if image.mode == "LAB":
            profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
            assert converted is not None
            return np.array(converted)
        if image.mode == "La":  # grey times alpha, which Pillow converts to nothing else
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise ImageError(f"{name} is too large for the memory of this machine.") from None
    except Exception as error:  # as above: truncated data, broken palettes, impossible strips, ...
        raise ImageError(f"{name} is damaged or cut short ({_reason(error)}).") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which would be copied
    except Exception:  # unreadable EXIF data says nothing about the pixels
        return image


def _eight_bit(samples: np.ndarray) -> np.ndarray:
    """Samples of more than 8 bits as uint8, by the full range of their type (floats: 0..1, or 0..255 if larger)."""
    if samples.dtype.kind == "f":
        samples = np.nan_to_num(samples.astype(np.float64), posinf=0.0, neginf=0.0)
        top = 1.0 if samples.max() <= 1 else max(255.0, samples.max())
    elif samples.dtype.itemsize == 2:
        top = 65535.0
    else:  # 32-bit integers hold 16-bit pictures more often than anything else
        top = 255.0 if samples.max() <= 255 else max(65535.0, float(samples.max()))
    return np.clip(samples / top * 255.0 + 0.5, 0, 255).astype(np.uint8)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not is_picture or not array.size:
        raise ImageError(
            f"A picture given as an array must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {_describe(array)}."
        )
    return _to_rgb(Image.fromarray(array), "the given picture")


def _describe(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:120] or type(error).__name__
