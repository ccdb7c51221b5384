"""Which pictures and instances of a COCO-format file can be asked about."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pixelstory_jax.data.muse.pictures import Choice, picture_file, problem_with, read_pictures, readable
from pixelstory_jax.data.readers.reader import LayoutError
from tests.data.muse.annotated import ODD, write_annotated


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    return write_annotated(tmp_path_factory.mktemp("annotated"), 4)


def file_of(tmp_path, annotations, image=None):
    images = [{"id": 1, "file_name": "a.jpg", "height": 100, "width": 200} | (image or {})]
    whole = {"category_id": 7, "bbox": [0, 0, 50, 50], "segmentation": [[0, 0, 50, 0, 50, 50]]}
    content = {
        "images": images,
        "annotations": [{"id": i, "image_id": 1} | whole | annotation for i, annotation in enumerate(annotations)],
        "categories": [{"id": 7, "name": "Fire_hydrant"}, {"id": 8, "name": "dog"}, {"id": 9, "name": "_void_"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_pictures_with_two_or_more_clear_instances(annotated):
    path, folder = annotated
    pictures, problems = read_pictures(path, Choice())
    assert not problems
    assert [picture.file_name for picture in pictures] == [*(f"{number:04d}.png" for number in range(4)), ODD[0]]
    assert [picture_file(picture, folder) is not None for picture in pictures] == [True] * 4 + [False]


def test_crowds_small_and_shapeless_things_are_not_asked_about(tmp_path):
    path = file_of(
        tmp_path,
        [{}, {}, {}, *({"category_id": 8} | odd for odd in ({"segmentation": []}, {"iscrowd": 1}, {"area": 3}))]
        + [{"category_id": 9}],
    )
    ((picture,), _) = read_pictures(path, Choice())
    assert [instance.name for instance in picture.instances] == ["fire hydrant"] * 3
    assert picture.unclear == {"dog"}
    ((few,), _) = read_pictures(path, Choice(most=2))
    assert len(few.instances) == 2 and few.unclear == {"dog", "fire hydrant"}
    assert read_pictures(path, Choice(fewest=4)) == ([], [])


@pytest.mark.parametrize(
    "bbox, box",
    [
        ([150, 50, 100, 100], (150, 50, 50, 50)),
        ([-20, -30, 60, 60], (0, 0, 40, 30)),
        ([0, 0, 50.5, 20], (0, 0, 50.5, 20)),
        (None, (1, 0, 49, 49)),  # then around the mask, a triangle whose corner is no whole pixel
    ],
)
def test_boxes_are_cut_at_the_border(tmp_path, bbox, box):
    ((picture,), _) = read_pictures(file_of(tmp_path, [{"bbox": bbox, "area": 900.0}, {}]), Choice())
    assert picture.instances[0].box == box


@pytest.mark.parametrize("bbox", [[float("nan"), 0, 50, 50], [300, 0, 50, 50], [0, 0, 0, 50], [0, 0, -50, 50]])
def test_boxes_that_are_none_are_no_instances(tmp_path, bbox):
    ((picture,), _) = read_pictures(file_of(tmp_path, [{"bbox": bbox}, {}, {}]), Choice())
    assert len(picture.instances) == 2


@pytest.mark.parametrize(
    "category, name",
    [
        ("traffic_light", "traffic light"),
        ("bow_(decorative_ribbons)", "bow"),
        ("TV", "TV"),
        ("aeroplane", "airplane"),
        ("__ignore__", ""),
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
        ({"file_name": "3.jpg"}, None),
    ):
        ((picture,), _) = read_pictures(file_of(tmp_path, [{}, {}], fields), Choice())
        assert picture_file(picture, tmp_path) == (found and tmp_path / found)


def test_names_that_lvis_has_not_annotated_in_full_are_unclear(tmp_path):
    ((picture,), _) = read_pictures(file_of(tmp_path, [{}, {}], {"not_exhaustive_category_ids": [8]}), Choice())
    assert picture.unclear == {"dog"}


@pytest.mark.parametrize(
    "image, annotation, words",
    [
        ({"height": 0}, {}, "picture 1 has the size 0 x 200"),
        ({"file_name": "../a.jpg"}, {}, "which is no path inside the folder"),
        ({}, {"category_id": 99}, "has the category 99, which the file does not name"),
    ],
)
def test_damaged_entries_are_told(tmp_path, image, annotation, words):
    pictures, (problem,) = read_pictures(file_of(tmp_path, [{}, annotation], image), Choice())
    assert not pictures and words in problem


@pytest.mark.parametrize(
    "size, turned, words", [((200, 100), 1, ""), ((100, 200), 6, ""), ((100, 200), 1, "is 100 x 200")]
)
def test_files_of_another_size(tmp_path, size, turned, words):
    ((picture,), _) = read_pictures(file_of(tmp_path, [{}, {}]), Choice())
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.new("RGB", size).save(tmp_path / "a.jpg", exif=exif)
    problem = problem_with(picture, tmp_path / "a.jpg")
    assert words in problem and bool(words) == bool(problem)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert "cannot be read as a picture" in problem_with(picture, tmp_path / "a.jpg")


def test_files_that_are_not_in_the_format(tmp_path):
    with pytest.raises(LayoutError, match="There is no .*a.json"):
        read_pictures(tmp_path / "a.json", Choice())
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(LayoutError, match='needs a list "categories"'):
        read_pictures(tmp_path / "a.json", Choice())
