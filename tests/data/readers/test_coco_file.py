"""Files in COCO's annotation format: masks as pycocotools has them, and every kind of damage."""

import copy
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, decode_mask
from pixelstory_jax.data.readers.coco_file import CocoFile, united
from pixelstory_jax.data.readers.reader import LayoutError
from tests.data.readers.miniature import save_json

SIZE = (48, 64)
GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}, {"id": 2, "file_name": "b.jpg"}],
    "categories": [{"id": 1, "name": "cup"}],
    "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}],
}


def opened(content, tmp_path) -> CocoFile:
    save_json(content, tmp_path / "a.json")
    return CocoFile(tmp_path / "a.json", ("a.json",))


def changed(*path, value) -> dict:
    """`GOOD` with another value at the path; None deletes it."""
    content = copy.deepcopy(GOOD)
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def reference_masks(content) -> dict[int, np.ndarray]:
    """pycocotools' mask of every annotation that has a picture and a mask, by its id."""
    api = COCO()
    api.dataset = copy.deepcopy(content)
    api.createIndex()
    usable = {n: one for n, one in api.anns.items() if one["segmentation"] and one["image_id"] in api.imgs}
    return {number: api.annToMask(one).astype(bool) for number, one in usable.items()}


def test_random_polygons_and_run_lengths_are_as_in_pycocotools(tmp_path):
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(60):  # up to three polygons that overlap, partly or wholly outside of the picture
        centres = rng.uniform(-20, 90, (rng.integers(1, 4), 1, 2))
        corners = centres + rng.normal(0, rng.uniform(2, 30), (len(centres), rng.integers(3, 9), 2))
        shapes.append([polygon.ravel().round(2).tolist() for polygon in corners])
    for number in range(20):
        noise = np.asfortranarray(rng.random(SIZE) < rng.random(), np.uint8)
        packed = coco_masks.encode(noise)["counts"].decode()
        starts = np.flatnonzero(np.diff(noise.ravel(order="F"), prepend=0, append=2))
        plain = np.diff(starts, prepend=0).tolist()
        shapes.append({"size": list(SIZE), "counts": packed if number % 2 else plain})
    entries = [
        {"id": (1 << 40) + number, "image_id": 1, "category_id": 1, "segmentation": shape}
        for number, shape in enumerate(shapes)
    ]
    content = GOOD | {"annotations": entries}
    found = opened(content, tmp_path).annotations(0)
    masks = reference_masks(content)
    assert [one.id for one in found] == [str(number) for number in masks] and len(found) == 80
    filled = 0
    for one in found:
        mask = decode_mask(one.mask, SIZE)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, masks[int(one.id)])
        filled += mask.any()
    assert 60 < filled < 80  # some lie outside


def test_pictures_without_annotations_and_annotations_without_picture_are_left_out(tmp_path):
    extra = {"id": 6, "image_id": 99, "category_id": 1, "segmentation": []}
    content = GOOD | {"annotations": [extra, *GOOD["annotations"], *GOOD["annotations"]]}
    file = pickle.loads(pickle.dumps(opened(content, tmp_path)))
    assert len(file) == 1 and file.pictures[0].file == "a.jpg" and file.pictures[0].size == (48, 64)
    assert len(file.annotations(0)) == 1  # the same one twice counts once


@pytest.mark.parametrize("number", [0, (1 << 31) + 1, "000000000042", "b72"])
def test_ids_of_all_kinds(number, tmp_path):
    content = changed("images", 0, "id", value=number)
    content["annotations"][0] |= {"image_id": number, "id": number, "iscrowd": 1, "bbox": [1, 1, 8, 8]}
    (one,) = opened(content, tmp_path).annotations(0)
    assert (one.id, one.category, one.name, one.is_crowd, one.box) == (str(number), "1", "cup", True, (1, 1, 8, 8))


@pytest.mark.parametrize("shape", [[], [[]], [[1, 1, 9, 9]], [[5, 5]]])
def test_polygons_without_three_corners_enclose_nothing(shape, tmp_path):
    (one,) = opened(changed("annotations", 0, "segmentation", value=shape), tmp_path).annotations(0)
    assert len(one.mask) == 0 and not decode_mask(one.mask, SIZE).any()
    (one,) = opened(
        changed("annotations", 0, "segmentation", value=[*shape, [1, 1, 9, 1, 9, 9]]), tmp_path
    ).annotations(0)
    assert decode_mask(one.mask, SIZE).any()


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "holds a list, but a dict is expected"),
        ({}, 'needs a list "categories"'),
        (changed("images", value=None), 'needs a list "images"'),
        (changed("annotations", value={"1": 2}), 'needs a list "annotations"'),
        (changed("annotations", value=[3]), 'needs a list "annotations" of objects'),
        (changed("categories", 0, "name", value=None), "category without id or name"),
        (changed("categories", 0, "name", value=" "), "category without id or name"),
        (changed("categories", value=[{"id": 1, "name": "cup"}, {"id": 1, "name": "mug"}]), "two names: cup and mug"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(content, message, tmp_path):
    with pytest.raises(LayoutError, match=f"a.json .*{message}"):
        opened(content, tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (changed("images", 0, "height", value=None), "picture 1 has no height"),
        (changed("images", 0, "width", value="wide"), "picture 1 invalid literal"),
        (changed("images", 0, "height", value=0), "picture 1 has the size 0 x 64"),
        (changed("images", 0, "file_name", value=None), "picture 1 has no file_name"),
        (changed("images", 0, "file_name", value="../secret.jpg"), "no path inside the folder"),
        (changed("images", 0, "file_name", value="/etc/secret.jpg"), "no path inside the folder"),
        (changed("images", 1, "id", value=1), "picture 1 has two entries that differ"),
        (changed("annotations", 0, "category_id", value=9), "annotation 5 of picture 1 has the category 9"),
        (changed("annotations", 0, "category_id", value=None), "annotation 5 of picture 1 has the category None"),
        (changed("annotations", 0, "segmentation", value=None), "annotation 5 .* has no segmentation"),
        (changed("annotations", 0, "segmentation", value=[1, 1, 9, 1, 9, 9]), "annotation 5 .* has no segmentation"),
        (changed("annotations", 0, "segmentation", value={"size": [48, 64]}), "run lengths without size or counts"),
    ],
)
def test_a_damaged_entry_concerns_its_picture_only(content, message, tmp_path):
    with pytest.raises(AnnotationError, match=f"a.json: .*{message}"):
        opened(content, tmp_path).annotations(0)


@pytest.mark.parametrize(
    "shape",
    [
        [[1, 1, 9, 1, 9, 9, 3]],
        [[1, 1, 9, 1, 9, "x"]],
        [[1, 1, 9, 1, 9, None]],
        [[1, 1, 9, 1, 9, float("nan")]],
        {"size": [64, 48], "counts": [64 * 48]},
        {"size": [48, 64], "counts": [5]},
        {"size": [48, 64], "counts": [-1, 48 * 64 + 1]},
        {"size": [48, 64], "counts": "~"},
        {"size": [48, 64], "counts": None},
        {"size": 5, "counts": [5]},
        {"size": [1 << 40, 1 << 40], "counts": [1 << 80]},
        {"size": [48, 64], "counts": [1 << 80]},
    ],
)
def test_a_mask_that_cannot_be_decoded_is_named(shape, tmp_path):
    (one,) = opened(changed("annotations", 0, "segmentation", value=shape), tmp_path).annotations(0)
    regions, ignored = (Region(one.mask, id=one.id),), united([one.mask, one.mask])
    annotation = Annotation(SIZE, "names", regions, (), Provenance("toy", "train", "a.jpg"), ignored)
    with pytest.raises(AnnotationError, match="toy, a.jpg, mask 5 cannot be decoded"):
        annotation.mask(0)
    with pytest.raises(AnnotationError, match="toy, a.jpg, mask the ignored area cannot be decoded"):
        annotation.ignored_mask()


def test_masks_of_all_kinds_are_united():
    polygon, rle = [[1, 1, 9, 1, 9, 9]], {"size": list(SIZE), "counts": [40, 8, 48 * 64 - 48]}
    both = united([polygon, rle, polygon])
    np.testing.assert_array_equal(decode_mask(both, SIZE), decode_mask(polygon, SIZE) | decode_mask(rle, SIZE))
    assert united([]) is None


def test_lvis_names_its_pictures_by_address_and_windows_by_backslashes(tmp_path):
    content = changed("images", 0, "file_name", value=None)
    content["images"][0] |= {"coco_url": "http://x.org/train2017/01.jpg", "not_exhaustive_category_ids": [3, 4]}
    picture = opened(content, tmp_path).pictures[0]
    assert (picture.file, picture.unsure) == ("train2017/01.jpg", ("3", "4"))
    assert opened(changed("images", 0, "file_name", value="p\\a.jpg"), tmp_path).pictures[0].file == "p/a.jpg"
