"""Run lengths, polygons and boxes against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from pixelstory_jax.data.masks import coco_polygons, decode_rle, encode_rle, fill_polygons, mask_box, mask_polygons

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


def random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    masks = [rng.random(size) < share for size in ((1, 1), (7, 5), (40, 33), (64, 96)) for share in (0.03, 0.5, 0.97)]
    masks += [np.zeros((6, 9), bool), np.ones((6, 9), bool), np.ones((1, 1), bool)]
    for _ in range(4):
        canvas = Image.new("1", (700, 500))
        draw = ImageDraw.Draw(canvas)
        for _ in range(3):
            x, y = rng.integers(0, 400, 2)
            draw.ellipse([x, y, x + rng.integers(20, 300), y + rng.integers(20, 200)], fill=1)
        draw.ellipse([200, 200, 260, 240], fill=0)
        masks.append(np.array(canvas))
    return masks


@pytest.mark.parametrize("mask", random_masks())
def test_run_lengths_equal_those_of_coco(mask):
    reference = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    packed = encode_rle(mask)
    assert packed["counts"] == reference["counts"].decode() and packed["size"] == list(mask.shape)
    listed = encode_rle(mask, compressed=False)
    assert coco.frPyObjects(listed, *mask.shape)["counts"] == reference["counts"]
    for rle in (packed, listed, reference):
        np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize("mask", random_masks())
def test_box_equals_that_of_coco(mask):
    assert list(mask_box(mask)) == coco.toBbox(coco.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()


def filled(mask: np.ndarray) -> np.ndarray:
    """The mask without its holes: what no path of side-by-side or diagonal background pixels links to the frame."""
    outside = np.pad(np.zeros_like(mask), 1, constant_values=True)
    free = np.pad(~mask, 1, constant_values=True)
    while True:
        grown = outside.copy()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                grown |= np.roll(outside, (dy, dx), (0, 1))
        grown &= free
        if (grown == outside).all():
            return ~outside[1:-1, 1:-1]
        outside = grown


@pytest.mark.parametrize("mask", random_masks())
def test_polygons_give_the_mask_back(mask):
    polygons = mask_polygons(mask)
    rebuilt = fill_polygons(polygons, mask.shape)
    np.testing.assert_array_equal(rebuilt | mask, rebuilt)
    if mask.size < 2000:
        np.testing.assert_array_equal(rebuilt, filled(mask))
    large = [polygon for polygon in polygons if len(polygon) > 4]
    if large:
        by_coco = coco.decode(coco.merge(coco.frPyObjects(large, *mask.shape))).astype(bool)
        np.testing.assert_array_equal(by_coco, rebuilt)


def test_polygons_with_free_corners_are_close_to_coco():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.random(9)) * 2 * np.pi
        radius = rng.uniform(60, 110, 9)
        points = np.stack([128 + radius * np.cos(angles), 128 + radius * np.sin(angles)], -1)
        polygon = points.ravel().tolist()
        ours = fill_polygons([polygon], (256, 240))
        theirs = coco.decode(coco.frPyObjects([polygon], 256, 240))[..., 0].astype(bool)
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97


def test_exact_border_of_a_known_shape():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    mask[2, 1] = False
    (polygon,) = mask_polygons(mask)
    assert set(zip(polygon[::2], polygon[1::2], strict=True)) == {(1, 1), (4, 1), (4, 3), (2, 3), (2, 2), (1, 2)}
    assert mask_polygons(np.zeros((3, 3), bool)) == []


def test_broken_run_lengths_are_refused():
    with pytest.raises(ValueError, match="cover 5 pixels"):
        decode_rle({"size": [2, 3], "counts": [2, 3]})
    with pytest.raises(ValueError, match="middle of a number"):
        decode_rle({"size": [2, 3], "counts": "o"})
    with pytest.raises(ValueError, match="does not occur"):
        decode_rle({"size": [2, 3], "counts": " "})


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([0, 0, 5, 5], "needs three or more corners"),
        ([0, 0, 5, 5, 0, 5, 1], "needs three or more corners"),
        ([0, 0, 1e9, 0, 0, 5], "reaches farther than"),
        ([1e9, 1e9] * 3, "reaches farther than"),
        ([0, 0, float("nan"), 5, 5, 5], "reaches farther than"),
        ([0, 0, float("inf"), 5, 5, 5], "reaches farther than"),
        ([0, 0, 1e5, 1e5] * 20, "reaches farther than"),
    ],
)
def test_polygons_that_would_take_all_memory_are_refused(polygon, message):
    with pytest.raises(ValueError, match=message):
        coco_polygons([[0, 0, 5, 0, 5, 5], polygon], (10, 10))


def test_polygons_are_united_and_cut_at_the_border():
    mask = coco_polygons([[0, 0, 6, 0, 6, 6, 0, 6], [4, 4, 500, 4, 500, 500, 4, 500]], (8, 8))
    assert mask.dtype == bool and mask[0, 0] and mask[5, 5] and mask[7, 7] and not mask[7, 0] and not mask[0, 7]
    assert not coco_polygons([], (3, 4)).any()
