from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from tests.data.readers.miniature import maker, save_labels, save_picture, scene

NAMES = {1: "wall", 2: "building, edifice", 5: "tree", 150: "flag"}


def labels_of(number: int) -> np.ndarray:
    """0 where nothing is, things get the classes in turn."""
    things = scene(number)
    labels = np.zeros(things.image.shape[:2], np.uint8)
    for place, mask in enumerate(things.masks):
        labels[mask] = list(NAMES)[place % len(NAMES)]
    return labels


@maker("ade20k")
def make_ade20k(root: Path) -> None:
    """Three pictures for training (one grey, one CMYK), two for validation, whose second has no labels."""
    folder = root / "ade20k"
    for number, (split, mode) in enumerate(
        [("training", "RGB"), ("training", "L"), ("training", "CMYK"), ("validation", "RGB"), ("validation", "RGB")]
    ):
        stem = f"ADE_{split[:5]}_{number:08d}"
        save_picture(scene(number).image, folder / "images" / split / f"{stem}.jpg", mode)
        labels = labels_of(number)
        save_labels(labels * (number != 4), folder / "annotations" / split / f"{stem}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{number}\t0.1\t10\t1\t{name}" for number, name in NAMES.items())]
    (folder / "objectInfo150.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_ade20k(folder)
    return folder


def test_every_class_of_a_picture_is_a_region_and_a_request(root):
    reader = open_reader("ade20k", root)
    assert len(reader) == 3
    for number in range(3):
        annotation, labels = reader[number], labels_of(number)
        assert annotation.size == labels.shape and annotation.task == "names"
        names = {value: name.split(",")[0] for value, name in NAMES.items() if (labels == value).any()}
        assert [region.name for region in annotation.regions] == list(names.values())
        for place, value in enumerate(names):
            np.testing.assert_array_equal(annotation.mask(place), labels == value)
            assert annotation.requests[place].targets == (place,)
        np.testing.assert_array_equal(annotation.ignored_mask(), labels == 0)
        assert open_picture(reader, number, annotation.provenance.picture).shape == (*labels.shape, 3)
        assert (root / annotation.provenance.picture).is_file()


def test_a_picture_without_labels_and_one_that_is_gone_are_named(root, tmp_path):
    reader = open_reader("ade20k", root, "val")
    assert reader[0].regions
    with pytest.raises(AnnotationError, match="ADE_valid_00000004.png shows no class"):
        reader[1]
    make_ade20k(tmp_path)
    (tmp_path / "ade20k/images/training/ADE_train_00000001.jpg").unlink()
    gone = open_reader("ade20k", tmp_path)
    assert gone[1].regions
    with pytest.raises(ImageError, match="no picture at .*ADE_train_00000001.jpg"):
        gone.picture(1)


@pytest.mark.parametrize("missing", ["objectInfo150.txt", "annotations/training", "images/training"])
def test_an_incomplete_folder_says_what_is_expected(missing, tmp_path):
    make_ade20k(tmp_path)
    (tmp_path / "ade20k" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=f"no .*{missing}. Expected are:\n  ade20k/images/training"):
        open_reader("ade20k", tmp_path)
