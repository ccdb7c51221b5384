import json

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.asking import Asking, ask_about
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.muse import check_entry, read_entry
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from tests.data.readers import miniature_language
from tests.data.readers.miniature import save_json, scene


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    miniature_language.make_muse(folder)
    return folder


@pytest.mark.parametrize(("split", "count"), [("train", 4), ("val", 2), ("test_few", 2), ("test_many", 2)])
def test_instances_are_regions_and_questions_requests(root, split, count):
    reader = open_reader("muse", root, split)
    assert len(reader) == count
    for number in range(min(count, 3)):
        annotation = reader[number]
        picture = int(annotation.provenance.picture[-5])
        things = scene(picture)
        assert open_picture(reader, number, "it").shape == things.image.shape
        assert annotation.size == things.image.shape[:2] and annotation.task == "questions"
        assert [region.name for region in annotation.regions] == list(things.names)
        rephrased = [f"The {name} at {place}" for place, name in enumerate(things.names)]
        assert [region.rephrased for region in annotation.regions] in (rephrased, [""] * len(rephrased))
        for place, mask in enumerate(things.masks):
            if picture == 2 and split == "train":  # run lengths
                np.testing.assert_array_equal(annotation.mask(place), mask)
            assert (annotation.mask(place) & mask).sum() == mask.sum()
        first, second = annotation.requests
        assert first.words == ("What could be lifted first?",) and first.is_sentence and first.targets == (1, 0)
        assert second.targets == (1,)


def test_text_answers_put_a_region_for_every_mark(root):
    with_text, without = (open_reader("muse", root)[number] for number in range(2))
    assert with_text.requests[0].answer == ("Lift the second ", 1, ", then the first ", 0, ".")
    assert with_text.requests[1].answer == (1, " again")
    assert [request.answer for request in without.requests] == [None, None]


def test_pictures_come_from_the_folder_that_the_entry_says(root):
    reader = open_reader("muse", root)
    folders = [reader[number].provenance.picture.split("/")[-2] for number in range(3)]
    assert folders == ["train2014", "train2017", "val2017"]


def test_without_text_the_answer_is_made_of_names(root):
    annotation = open_reader("muse", root)[2]
    image, rng = scene(2).image, np.random.default_rng(0)
    said = set()
    for _ in range(300):
        for (turn,) in ask_about(image, annotation, rng, Asking()).conversations:
            said.update(piece for piece in turn.answer if isinstance(piece, str))
            assert turn.text.startswith(("What could be lifted first? ", "What then? "))
    name = annotation.regions[1].name
    assert f"The {name} at 1 is " in said and f"{name} is " in said  # rephrased mostly, but not always
    assert f"Sure, the {name} at 1 are " in said


def test_a_picture_whose_text_has_a_mark_too_many_is_named(root):
    reader = open_reader("muse", root)
    with pytest.raises(
        AnnotationError,
        match=r"muse_train.json, entry 3: text_answers\[1\] should be a text with one {seg} for each of 1 instances.",
    ):
        reader[3]


def drop(field):
    return lambda entry: entry.pop(field)


def put(field, value):
    return lambda entry: entry.update({field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("file_name"), "file_name or coco_url should be the name of a picture"),
        (put("height", "480"), "height should be a number of pixels"),
        (put("width", True), "width should be a number of pixels"),
        (drop("ann_list"), "ann_list should be a list"),
        (put("questions", []), "questions should be at least one question"),
        (put("questions", [" ", "What?"]), r"questions\[0\] should be a question"),
        (lambda entry: entry["answers"].pop(), "answers should be as many as the 2 questions, not 1"),
        (lambda entry: entry["text_answers"].pop(), "text_answers should be a list as long as the 2 questions"),
        (put("text_answers", [3, "{seg}"]), r"text_answers\[0\] should be a text with one {seg}"),
        (lambda entry: entry["answers"][0][1].pop("category_name"), r"answers\[0\]\[1\] has no category_name"),
        (lambda entry: entry["ann_list"][2].update(segmentation="x"), r"ann_list\[2\] has no segmentation"),
        (lambda entry: entry["answers"][1].insert(0, 5), r"answers\[1\]\[0\] should be an instance"),
        (lambda entry: entry["answers"][1][0].pop("rephrased_name"), r"answers\[1\]\[0\] has no rephrased_name"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    entry = json.loads(json.dumps(miniature_language.muse_entry(0, {"file_name": "a.jpg"}, True)))
    check_entry(entry, "here")
    change(entry)
    with pytest.raises(AnnotationError, match=f"^here: {message}"):
        check_entry(entry, "here", needs_rephrased=True)


def test_an_instance_whose_rephrased_name_is_in_answers_only_is_one_region():
    entry = json.loads(json.dumps(miniature_language.muse_entry(0, {"file_name": "a.jpg"}, True)))
    regions, requests = read_entry(entry)
    for instance in entry["ann_list"]:
        del instance["rephrased_name"]
    again, asked = read_entry(entry)
    targets = {target for request in requests for target in request.targets}
    assert asked == requests and len(again) == len(regions) > len(targets)
    assert [bool(region.rephrased) for region in again] == [number in targets for number in range(len(again))]


def test_an_answer_without_text_needs_instances():
    entry = miniature_language.muse_entry(0, {"file_name": "a.jpg"}, False)
    entry["answers"][1] = []
    with pytest.raises(AnnotationError, match=r"answers\[1\] should be a list of instances"):
        check_entry(entry, "here")


def test_files_may_lie_beside_the_folder(root, tmp_path):
    miniature_language.make_muse(tmp_path)
    (tmp_path / "muse/muse_val.json").rename(tmp_path / "muse_val.json")
    assert open_reader("muse", tmp_path, "val")[0].requests == open_reader("muse", root, "val")[0].requests


def test_a_missing_picture_leaves_its_annotation(tmp_path):
    miniature_language.make_muse(tmp_path)
    for path in (tmp_path / "refer_seg/images/mscoco/images/train2017").iterdir():
        path.unlink()
    reader = open_reader("muse", tmp_path)
    assert reader[1].regions
    with pytest.raises(ImageError, match="no picture at .*train2017"):
        reader.picture(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"no .*muse_val.json. Expected are:\n  muse/muse_train.json"), ({}, "holds a dict"), ([], "no entries")],
)
def test_an_incomplete_folder_says_what_is_expected(content, message, tmp_path):
    miniature_language.make_muse(tmp_path)
    (tmp_path / "muse/muse_val.json").unlink()
    if content is not None:
        save_json(content, tmp_path / "muse/muse_val.json")
    with pytest.raises(LayoutError, match=message):
        open_reader("muse", tmp_path, "val")
