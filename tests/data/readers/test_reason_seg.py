from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.masks import outlined_polygon
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from pixelstory_jax.data.readers.reason_seg import draw_shapes
from tests.data.readers import miniature_language
from tests.data.readers.miniature import save_picture, scene

FOLDER = "reason_seg/ReasonSeg"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    miniature_language.make_reason_seg(folder)
    return folder


def test_questions_share_the_mask_of_a_picture(root):
    reader = open_reader("reason_seg", root)
    assert len(reader) == 3
    for number in range(3):
        annotation, file = reader[number], miniature_language.reasoning_file(number)
        assert annotation.task == "reasoning" and annotation.size == scene(number).image.shape[:2]
        assert [request.words[0] for request in annotation.requests] == file["text"]
        assert {request.targets for request in annotation.requests} == {(0,)}
        assert {request.is_sentence for request in annotation.requests} == {number != 1}
        explained = {request.explanation for request in annotation.requests}
        assert explained == {"One gives what shines." if number == 0 else ""}
        labels = draw_shapes(file["shapes"], annotation.size)
        np.testing.assert_array_equal(annotation.mask(0), labels == 1)
        np.testing.assert_array_equal(annotation.ignored_mask(), labels == 255)
        assert labels[0, 7] == 1 and (labels == 255).any() and (labels == 0).any()
        assert open_picture(reader, number, "it").shape == (*annotation.size, 3)


def test_files_of_other_letters_and_missing_files(root):
    reader = open_reader("reason_seg", root, "val")
    assert reader[0].requests[0].words == ("Which of these would a fiancé give, 0?",)
    with pytest.raises(AnnotationError, match="There is no .*4_gift.json"):
        reader[1]
    assert len(open_reader("reason_seg", root, "test")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('{"text": []}', "needs text, is_sentence and shapes .* 'shapes'"),
        ('{"text": "x", "is_sentence": true, "shapes": []}', "needs text.* no list of texts"),
        ('{"text": [], "is_sentence": true, "shapes": []}', "has no text"),
        ('{"text": ["x"], "is_sentence": true, "shapes": [{"label": "target", "points": []}]}', "A polygon needs"),
        ("[]", "needs text, is_sentence and shapes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    miniature_language.make_reason_seg(tmp_path)
    (tmp_path / FOLDER / "train/1_gift.json").write_text(content)
    reader = open_reader("reason_seg", tmp_path)
    with pytest.raises(AnnotationError, match=f"1_gift.json.*{message}"):
        reader[1]
    assert reader[0].regions and reader[2].regions


@pytest.mark.parametrize("missing", ["train", "explanatory/train.json"])
def test_an_incomplete_folder_says_what_is_expected(missing, tmp_path):
    miniature_language.make_reason_seg(tmp_path)
    (tmp_path / FOLDER / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=f"no .*{missing}. Expected are:\n  {FOLDER}/train"):
        open_reader("reason_seg", tmp_path)


def test_a_turned_photo_has_the_size_that_it_is_seen_in(tmp_path):
    miniature_language.make_reason_seg(tmp_path)
    path = tmp_path / FOLDER / "train/1_gift.jpg"
    save_picture(np.zeros((40, 70, 3), np.uint8), path)
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    reader = open_reader("reason_seg", tmp_path)
    assert reader[1].size == (70, 40) == open_picture(reader, 1, "it").shape[:2]


# Polygons. The drawings are those of OpenCV 5.0 (`polylines`, then `fillPoly`).

DRAWN = {
    "triangle": (
        [[1, 1], [9.9, 3.2], [4, 7]],
        """
        ............
        .###........
        .#######....
        ..########..
        ..#######...
        ...#####....
        ...###......
        ....#.......
        ............
        """,
    ),
    "crossed": (
        [[0, 0], [11, 8], [11, 0], [2.5, 7.9]],
        """
        #..........#
        ###.......##
        .###....####
        .####..#####
        .###########
        .#####.#####
        ..##....####
        ..#......###
        ...........#
        """,
    ),
    "line": (
        [[2, 6], [10, 1]],
        """
        ............
        ..........#.
        ........##..
        .......#....
        .....##.....
        ...##.......
        ..#.........
        ............
        """,
    ),
    "point": (
        [[3.7, 2.2]],
        """
        ......
        ......
        ...#..
        ......
        ......
        """,
    ),
    "concave": (
        [[0, 0], [13, 0], [13, 8], [7, 2], [1, 8]],
        """
        ##############
        ##############
        ##############
        #######.######
        ######...#####
        .####.....####
        .###.......###
        .##.........##
        .#...........#
        """,
    ),
    "steep": (
        [[5, 0], [6, 8], [2, 8], [4, 3]],
        """
        .....#...
        .....#...
        ....##...
        ....##...
        ....##...
        ...####..
        ...####..
        ..#####..
        ..#####..
        """,
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_polygons_are_drawn_as_by_opencv(name):
    corners, picture = DRAWN[name]
    rows = picture.split()
    drawn = outlined_polygon(corners, (len(rows), len(rows[0])))
    assert ["".join(".#"[pixel] for pixel in row.astype(int)) for row in drawn] == rows


def test_the_largest_shape_lies_below():
    def square(low, high):
        return [[low, low], [high, low], [high, high], [low, high]]

    shapes = [
        {"label": "ignore this", "points": square(4, 5)},
        {"label": "target", "points": square(1, 8)},
        {"label": "Ignore", "points": square(0, 9)},
        {"label": "FLAG", "points": square(0, 9)},
    ]
    for order in ([0, 1, 2, 3], [2, 1, 0, 3]):
        labels = draw_shapes([shapes[place] for place in order], (10, 10))
        assert np.unique(labels[4:6, 4:6]) == 255 and labels[1, 1] == 1 == labels[8, 8] and labels[0, 0] == 255
