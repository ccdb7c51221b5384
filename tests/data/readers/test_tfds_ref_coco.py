import pickle

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from pixelstory_jax.data.readers.tfds_folder import parse_example
from tests.data.readers import miniature_language
from tests.data.readers.miniature import scene
from tests.data.readers.miniature_language import annotation_id, example_bytes, sentences

NAME = "tfds:ref_coco/refcoco_unc"
FILE = "ref_coco/refcoco_unc/1.1.0/ref_coco-train.tfrecord-00001-of-00002"


@pytest.mark.parametrize(("config", "kind"), [("refcoco_unc", "tfrecord"), ("refcocog_umd", "array_record")])
def test_objects_are_regions_and_expressions_requests(config, kind, tmp_path):
    miniature_language.make_prepared(tmp_path, config, kind)
    reader = pickle.loads(pickle.dumps(open_reader(f"tfds:ref_coco/{config}", tmp_path)))
    assert len(reader) == 3 and len(open_reader(f"tfds:ref_coco/{config}", tmp_path, "val")) == 1
    for number in range(3):
        annotation, things = reader[number], scene(number)
        said = [(one, place) for place, name in enumerate(things.names) for one in sentences(number, place, name)]
        assert [(request.words[0], request.targets, request.id) for request in annotation.requests] == [
            (one["raw"], (place,), str(one["sent_id"])) for one, place in said
        ]
        for place, mask in enumerate(things.masks):
            np.testing.assert_array_equal(annotation.mask(place), mask)
            assert annotation.regions[place].id == str(annotation_id(number, place))
        assert open_picture(reader, number, "it").shape == things.image.shape == (*annotation.size, 3)


def test_a_damaged_record_leaves_the_others(tmp_path):
    miniature_language.make_prepared(tmp_path, "refcoco_unc", "tfrecord")
    miniature_language.write_tfrecords(tmp_path / FILE, [b"\x0a\x7f", example_bytes({"image": [b"x"]})])
    reader = open_reader(NAME, tmp_path)
    for number in (2, 3):
        with pytest.raises(AnnotationError, match=f"{NAME}, record {number} of train is damaged"):
            reader[number]
    assert reader[1].requests


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "has 1 files of the split train, which are not all. Expected are:\n  ref_coco"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "00001-of-00002 is cut short or no TFRecord file"),
        (lambda path: path.write_bytes(b"no record"), "00001-of-00002 is cut short or no TFRecord file"),
        (lambda path: path.parent.rename(path.parent.with_name("new")), "has 0 files"),
        (lambda path: path.parents[1].rename(path.parents[2] / "else"), "There is no .*refcoco_unc. Expected are"),
    ],
)
def test_an_incomplete_folder_is_named(damage, message, tmp_path):
    miniature_language.make_prepared(tmp_path, "refcoco_unc", "tfrecord")
    damage(tmp_path / FILE)
    with pytest.raises(LayoutError, match=message):
        open_reader(NAME, tmp_path)


def test_all_kinds_of_values_are_parsed():
    features = {"bytes": [b"", b"\x00" * 300], "floats": [0.5, -2.0], "ints": [0, -1, 1 << 62, -(1 << 63)]}
    assert parse_example(example_bytes(features)) == features
    assert parse_example(b"") == {}


def test_bytes_that_are_no_example_are_refused():
    record = example_bytes({"name": [1, 2, 3], "other": [b"abc"]})
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(record)
        for place in rng.integers(len(damaged), size=3):
            damaged[place] = rng.integers(256)
        try:
            parse_example(bytes(damaged))
        except ValueError:
            continue
