"""ADE20K, COCO-Stuff and Mapillary: their folders in miniature, and what is wrong with them."""

import pickle

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers import ade20k, cocostuff, open_reader
from pixelstory_jax.data.readers.label_maps import read_label_map
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from tests.data.readers.miniature import MAKERS, save_json, scene
from tests.data.readers.miniature_semantic import ADE20K, COCOSTUFF, MAPILLARY, labels_of

SETS = {"ade20k": (ADE20K, 0), "cocostuff": (COCOSTUFF, 255), "mapillary": (MAPILLARY, 255)}
COUNTS = {
    ("ade20k", "train"): [0, 1, 2],
    ("ade20k", "val"): [3, 4],
    ("cocostuff", "train"): [0, 1],
    ("cocostuff", "val"): [3],
    ("mapillary", "train"): [0, 1],
    ("mapillary", "val"): [2],
}
"""Scenes of every split."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        MAKERS[name](folder)
    return folder


@pytest.mark.parametrize("name, split", COUNTS)
def test_every_class_of_a_picture_is_a_region_and_a_request(name, split, root):
    names, nothing = SETS[name]
    reader = pickle.loads(pickle.dumps(open_reader(name, root, split)))
    assert len(reader) == len(COUNTS[name, split])
    for place, number in enumerate(COUNTS[name, split]):
        labels = labels_of(number, list(names), nothing)
        if (name, number) == ("ade20k", 4):
            continue  # has no labels, see below
        annotation = reader[place]
        assert annotation.size == labels.shape and annotation.task == "names"
        assert (annotation.provenance.dataset, annotation.provenance.split) == (name, split)
        present = {value: word for value, word in names.items() if word and (labels == value).any()}
        assert [region.name for region in annotation.regions] == list(present.values())
        for region, value in enumerate(present):
            np.testing.assert_array_equal(annotation.mask(region), labels == value)
            assert annotation.requests[region].targets == (region,)
            assert annotation.requests[region].words == (present[value],)
        np.testing.assert_array_equal(annotation.ignored_mask(), ~np.isin(labels, list(present)))
        image = open_picture(reader, place, annotation.provenance.picture)
        annotation.check_size(image)
        assert (root / annotation.provenance.picture).is_file()
        assert np.abs(image.astype(float) - scene(number).image).mean() < 60  # it is the picture of these labels


def test_numbers_of_classes_are_the_official_ones():
    assert len(ade20k.CLASSES) == len(set(ade20k.CLASSES)) == 150
    assert (ade20k.CLASSES[0], ade20k.CLASSES[89], ade20k.CLASSES[149]) == ("wall", "television receiver", "flag")
    assert len(cocostuff.CLASSES) == len(set(cocostuff.CLASSES)) == 182
    assert sum("-" in name for name in cocostuff.CLASSES) == 28
    # Official category numbers: 1 person, 12 street sign (in no picture), 13 stop sign, 92 banner, 182 wood.
    official = {1: "person", 13: "stop sign", 90: "toothbrush", 92: "banner", 157: "sky", 182: "wood"}
    assert {number: cocostuff.CLASSES[number - 1] for number in official} == official


def test_a_picture_without_labels_and_one_that_is_gone_are_named(root, tmp_path):
    reader = open_reader("ade20k", root, "val")
    assert reader[0].regions
    with pytest.raises(AnnotationError, match="ADE_valid_00000004.png shows no class"):
        reader[1]
    MAKERS["ade20k"](tmp_path)
    (tmp_path / "ade20k/images/training/ADE_train_00000001.jpg").unlink()
    gone = open_reader("ade20k", tmp_path)
    assert gone[1].regions
    with pytest.raises(ImageError, match="no picture at .*ADE_train_00000001.jpg"):
        gone.picture(1)


def test_a_picture_that_is_stored_turned_does_not_fit_its_map(tmp_path):
    MAKERS["cocostuff"](tmp_path)
    reader = open_reader("cocostuff", tmp_path)
    path = tmp_path / reader[0].provenance.picture
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.open(path).crop((0, 0, 60, 40)).save(path, exif=exif)
    Image.new("L", (60, 40), 2).save(tmp_path / "cocostuff/train2017" / f"{path.stem}.png")
    with pytest.raises(AnnotationError, match="is 60 x 40 pixels, its annotation is for 40 x 60"):
        reader[0].check_size(open_picture(reader, 0, path.name))


@pytest.mark.parametrize("mode", ["RGB", "LA", "empty", "text"])
def test_what_is_no_map_of_class_numbers_is_named(mode, tmp_path):
    path = tmp_path / "map.png"
    if mode in ("RGB", "LA"):
        Image.new(mode, (4, 4)).save(path)
    else:
        path.write_bytes(b"" if mode == "empty" else b"no picture")
    with pytest.raises(ImageError, match="map.png is (no|damaged and cannot be read as a) map of class numbers"):
        read_label_map(path)


def test_maps_of_more_than_256_classes_are_read(tmp_path):
    numbers = np.array([[0, 300], [70, 65535]], np.uint16)
    Image.fromarray(numbers).save(tmp_path / "map.png")
    np.testing.assert_array_equal(read_label_map(tmp_path / "map.png"), numbers)


@pytest.mark.parametrize(
    "name, missing",
    [
        ("ade20k", "ade20k/annotations/training"),
        ("ade20k", "ade20k/images/training"),
        ("cocostuff", "cocostuff/train2017"),
        ("cocostuff", "coco/train2017"),
        ("mapillary", "mapillary/config_v2.0.json"),
        ("mapillary", "mapillary/training/v2.0/labels"),
    ],
)
def test_an_incomplete_folder_says_what_is_expected(name, missing, tmp_path):
    MAKERS[name](tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=f"no .*{missing}. Expected are:\n  {name}/"):
        open_reader(name, tmp_path)


@pytest.mark.parametrize("content", [{}, {"labels": 3}, {"labels": [{"name": "bird"}]}, {"labels": ["bird"]}])
def test_a_configuration_without_names_is_named(content, tmp_path):
    MAKERS["mapillary"](tmp_path)
    save_json(content, tmp_path / "mapillary/config_v2.0.json")
    with pytest.raises(LayoutError, match='config_v2.0.json needs a list "labels"'):
        open_reader("mapillary", tmp_path)
