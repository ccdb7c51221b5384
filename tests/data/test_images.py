"""Every kind of picture gives the right pixels or one sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.images import ImageError, fit_canvas, fit_mask, fitted_size, open_image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def colours(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_rgb_from_path_bytes_array_and_pil(tmp_path):
    pixels = colours()
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    for source in (path, str(path), path.read_bytes(), pixels, Image.fromarray(pixels)):
        opened = open_image(source)
        assert opened.dtype == np.uint8
        np.testing.assert_array_equal(opened, pixels)


def test_palette_and_palette_with_transparency():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (200, 30, 10)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(open_image(encoded(palette, "PNG")), pixels)
    black_index = palette.getpixel((0, 3))
    opened = open_image(encoded(palette, "PNG", transparency=black_index))
    np.testing.assert_array_equal(opened[0, 0], (200, 30, 10))
    np.testing.assert_array_equal(opened[3, 3], (255, 255, 255))


def test_cmyk_jpeg_keeps_its_colour():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(open_image(encoded(red, "JPEG")).astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8] = (250, 0, 0)
    # The stored pixels are the inverse of the rotation that the tag asks for.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(open_image(data), upright)


def test_sixteen_bit_one_bit_grey_and_float():
    sixteen = Image.fromarray(np.array([[0, 32896], [65535, 257]], np.uint16))
    np.testing.assert_array_equal(open_image(encoded(sixteen, "PNG"))[..., 1], [[0, 128], [255, 1]])
    one_bit = Image.fromarray(np.array([[True, False]]))
    np.testing.assert_array_equal(open_image(encoded(one_bit, "PNG"))[..., 0], [[255, 0]])
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    np.testing.assert_array_equal(open_image(encoded(grey, "PNG")), [[[7] * 3, [9] * 3]])
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    np.testing.assert_array_equal(open_image(encoded(floats, "TIFF"))[..., 2], [[0, 128, 255]])
    wide = Image.fromarray(np.array([[0, 65535]], np.int32))
    np.testing.assert_array_equal(open_image(encoded(wide, "TIFF"))[..., 2], [[0, 255]])


def test_the_transparent_grey_of_a_sixteen_bit_png_is_white():
    """Of the samples 300 and 301, equal in 8 bit, only the first is transparent."""
    grey = Image.fromarray(np.array([[300, 301, 40_000]], np.uint16))
    np.testing.assert_array_equal(open_image(encoded(grey, "PNG"))[0, :, 0], [1, 1, 156])
    opened = open_image(encoded(grey, "PNG", transparency=300))
    np.testing.assert_array_equal(opened, [[[255] * 3, [1] * 3, [156] * 3]])
    assert opened.dtype == np.uint8


def test_transparency_goes_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 255, 128)
    opened = open_image(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(opened[0, :2], [[255] * 3, [0] * 3])
    assert abs(int(opened[0, 2, 0]) - 127) <= 1
    premultiplied = open_image(Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8)).convert("La"))
    np.testing.assert_array_equal(premultiplied, [[[255] * 3, [10] * 3]])
    grey_alpha = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8))
    np.testing.assert_array_equal(open_image(encoded(grey_alpha, "PNG"))[0, :, 0], [255, 10])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(open_image(data)[4, 4], (255, 0, 0))


def test_one_pixel_and_a_long_strip():
    canvas, size = fit_canvas(open_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), 16)
    assert size == (16, 16) and (canvas == (9, 8, 7)).all()
    strip, size = fit_canvas(open_image(encoded(Image.new("RGB", (20_000, 20), (9, 8, 7)), "PNG")), 448)
    assert size == (1, 448) and (strip[0] == (9, 8, 7)).all() and not strip[1:].any()
    _, size = fit_canvas(np.zeros((20_000, 20, 3), np.uint8), 448)
    assert size == (448, 1)


def test_unusable_files_get_one_sentence_with_their_name(tmp_path):
    whole = encoded(Image.fromarray(colours(64, 64)), "PNG")
    cases = {
        "cut.png": whole[: len(whole) // 2],
        "header.png": whole[:20],
        "text.jpg": b"this is not a picture",
        "empty.png": b"",
        "cut.jpg": encoded(Image.fromarray(colours(64, 64)), "JPEG")[:900],
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }
    broken = bytearray(whole)
    broken[40:400] = bytes(360)
    cases["broken.png"] = bytes(broken)
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=name) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match=r"no picture at .*absent\.png"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="float64"):
        open_image(np.zeros((4, 4, 3)))


@pytest.mark.parametrize("side", [9_500, 40_000])
def test_decompression_bomb_is_refused_before_decoding(side):
    # A one-bit picture: its file is small, its pixels would not be.
    header = f"P4\n{side} {side}\n".encode()
    with pytest.raises(ImageError, match="more than"):
        open_image(header + bytes(100))


def test_fit_canvas_is_the_released_geometry():
    picture = colours(300, 200)
    canvas, size = fit_canvas(picture, 448)
    assert size == (448, int(200 * 448 / 300 + 0.5)) == (448, 299)
    assert not canvas[:, 299:].any()
    resized = Image.fromarray(picture).resize((299, 448), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(canvas[:, :299], np.asarray(resized))


def test_fit_mask_keeps_area_and_thin_objects():
    mask = np.zeros((400, 300), bool)
    mask[100:300, 48:148] = True
    fitted = fit_mask(mask, 100)
    assert fitted.dtype == np.uint8 and fitted.shape == (100, 100)
    assert abs(int(fitted.sum()) - 50 * 25) <= 8 and not fitted[:, 75:].any()
    thin = np.zeros((400, 400), bool)
    thin[17, 250] = True
    assert fit_mask(thin, 50).sum() >= 1
    assert not fit_mask(np.zeros((40, 30), bool), 64).any()


def test_fit_mask_is_that_of_the_whole_picture_resized_at_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, canvas = rng.integers(1, 150, 2), int(rng.integers(8, 150))
        mask = np.zeros(size, bool)
        top, left = (int(rng.integers(side)) for side in size)
        patch = mask[top : top + int(rng.integers(1, 60)), left : left + int(rng.integers(1, 60))]
        patch[...] = rng.random(patch.shape) < rng.choice([0.02, 0.5, 1.0])
        height, width = fitted_size(mask.shape, canvas)
        coverage = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        covered = np.asarray(coverage)
        expected = covered >= 0.5
        if not expected.any() and covered.max() > 0:
            expected = covered == covered.max()
        np.testing.assert_array_equal(fit_mask(mask, canvas)[:height, :width], expected)
        assert fit_mask(mask, canvas).sum() == expected.sum()
