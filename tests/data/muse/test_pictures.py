"""Which pictures and instances of a COCO-format file can be asked about."""

from __future__ import annotations

import json

import pytest

from pixelstory_jax.data.muse.pictures import Choice, InstancesError, picture_file, read_pictures, readable
from tests.data.muse.annotated import ODD, write_annotated


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    return write_annotated(tmp_path_factory.mktemp("annotated"), 4)


def file_of(tmp_path, annotations, image=None):
    images = [{"id": 1, "file_name": "a.jpg", "height": 100, "width": 200} | (image or {})]
    whole = {"category_id": 7, "bbox": [0, 0, 50, 50], "segmentation": [[0, 0, 50, 0, 50, 50]]}
    content = {
        "images": images,
        "annotations": [{"image_id": 1} | whole | annotation for annotation in annotations],
        "categories": [{"id": 7, "name": "Fire_hydrant"}, {"id": 8, "name": "dog"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_pictures_with_two_or_more_clear_instances(annotated):
    path, folder = annotated
    pictures = read_pictures(path, Choice())
    assert [picture.file_name for picture in pictures] == [*(f"{number:04d}.png" for number in range(4)), ODD[0]]
    assert [picture_file(picture, folder) is not None for picture in pictures] == [True] * 4 + [False]


def test_crowds_small_and_shapeless_things_are_not_asked_about(tmp_path):
    path = file_of(
        tmp_path,
        [{}, {}, {}, {"segmentation": []}, {"category_id": 8, "iscrowd": 1}, {"category_id": 8, "area": 3}],
    )
    (picture,) = read_pictures(path, Choice())
    assert [instance.name for instance in picture.instances] == ["fire hydrant"] * 3
    assert picture.unclear == {"dog"}
    (few,) = read_pictures(path, Choice(most=2))
    assert len(few.instances) == 2 and few.unclear == {"dog", "fire hydrant"}
    assert not read_pictures(path, Choice(fewest=4))


@pytest.mark.parametrize(
    "bbox, box",
    [
        ([150, 50, 100, 100], (150, 50, 50, 50)),
        ([-20, -30, 60, 60], (0, 0, 40, 30)),
        ([0, 0, 50.5, 20], (0, 0, 50.5, 20)),
    ],
)
def test_boxes_are_cut_at_the_border(tmp_path, bbox, box):
    (picture,) = read_pictures(file_of(tmp_path, [{"bbox": bbox, "area": 900.0}, {}]), Choice())
    assert picture.instances[0].box == box


@pytest.mark.parametrize("bbox", [[float("nan"), 0, 50, 50], [300, 0, 50, 50], [0, 0, 0, 50], [0, 0, -50, 50]])
def test_boxes_that_are_none_are_no_instances(tmp_path, bbox):
    (picture,) = read_pictures(file_of(tmp_path, [{"bbox": bbox}, {}, {}]), Choice())
    assert len(picture.instances) == 2


@pytest.mark.parametrize(
    "category, name",
    [
        ("traffic_light", "traffic light"),
        ("bow_(decorative_ribbons)", "bow"),
        ("TV", "TV"),
        ("Potted Plant", "potted plant"),
    ],
)
def test_names(category, name):
    assert readable(category) == name


def test_where_pictures_are(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "1.jpg").touch()
    (tmp_path / "2.jpg").touch()
    for fields, found in (
        ({"file_name": "val2017/1.jpg"}, "val2017/1.jpg"),
        ({"file_name": None, "coco_url": "http://images.cocodataset.org/val2017/1.jpg"}, "val2017/1.jpg"),
        ({"file_name": "elsewhere/2.jpg"}, "2.jpg"),
        ({"file_name": "../2.jpg"}, "2.jpg"),
        ({"file_name": "3.jpg"}, None),
    ):
        (picture,) = read_pictures(file_of(tmp_path, [{}, {}], fields), Choice())
        assert picture_file(picture, tmp_path) == (found and tmp_path / found)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "There is no file of annotations"),
        ("{", "cannot be read as JSON"),
        ("[]", "lists named images, annotations, categories are expected"),
        ('{"images": [], "annotations": []}', "lists named images"),
        ('{"images": [{"height": 1}], "annotations": [], "categories": []}', "there is no 'id'"),
        ('{"images": [{"id": 1, "height": 0, "width": 5}], "annotations": [], "categories": []}', "picture 1 is 5 x 0"),
    ],
)
def test_files_that_are_not_in_the_format(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InstancesError, match=words):
        read_pictures(path, Choice())
