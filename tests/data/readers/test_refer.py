import pickle
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.masks import coco_polygons
from pixelstory_jax.data.readers import open_reader, refer
from pixelstory_jax.data.readers.plain_pickle import read_plain_pickle
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from pixelstory_jax.data.templates import SHORT_QUESTIONS
from tests.data.readers import miniature_language
from tests.data.readers.miniature import scene

SETS = ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in SETS:
        miniature_language.make_referring(folder, refer.NAMES[name])
    return folder


@pytest.mark.parametrize("name", SETS)
def test_every_expression_is_a_request_for_its_annotation(root, name):
    reader = open_reader(name, root)
    assert len(reader) == 5
    for number in (0, 1, 2):
        annotation, things = reader[number], scene(number)
        assert annotation.size == things.image.shape[:2] and annotation.task == "names"
        assert annotation.provenance.id == str(miniature_language.LARGE + number)
        assert open_picture(reader, number, "it").shape == things.image.shape
        assert (root / annotation.provenance.picture).is_file()
        requests = [request for request in annotation.requests if len(request.targets) == 1]
        assert len(requests) == 2 * len(things.masks)
        for request in requests:
            place = (int(request.id) - miniature_language.LARGE) % 100 // 2
            (target,) = request.targets
            assert request.words[0] in (
                f"The {things.names[place]} number {place}",
                f"{things.names[place]} {place}, café",
            )
            assert annotation.regions[target].id == str(miniature_language.annotation_id(number, place))
            assert annotation.regions[target].name == f"category {place}"
            if name == "refclef":
                np.testing.assert_array_equal(
                    annotation.mask(target), things.masks[place] if number == 0 or place else expected(number)
                )
            elif number and not place:
                np.testing.assert_array_equal(annotation.mask(target), expected(number))


def expected(number: int) -> np.ndarray:
    """The odd first masks: parts that overlap and reach out of the picture, and nothing."""
    mask = scene(number).masks[0]
    return coco_polygons(miniature_language.beyond(mask), mask.shape) if number == 1 else np.zeros(mask.shape, bool)


def test_several_targets_and_none(root):
    annotation = open_reader("grefcoco", root)[0]
    both, none = annotation.requests[-4], annotation.requests[-1]
    ids = [annotation.regions[target].id for target in both.targets]
    assert ids == [str(miniature_language.annotation_id(0, place)) for place in (1, 0)]
    assert none.targets == () and "unicorn" in none.words[0]


def test_a_list_of_grefcoco_may_be_a_pickle(tmp_path):
    miniature_language.make_referring(tmp_path, "grefcoco|unc")
    file = tmp_path / "refer_seg/grefcoco/grefs(unc).json"
    from_json = open_reader("grefcoco", tmp_path)[0]
    file.with_suffix(".p").write_bytes(pickle.dumps(refer.read_json(file, (), list), protocol=2))
    file.unlink()
    assert open_reader("grefcoco", tmp_path)[0].requests == from_json.requests


@pytest.mark.parametrize("name", SETS)
def test_one_damaged_picture_leaves_the_others(root, name):
    reader = open_reader(name, root)
    with pytest.raises(
        AnnotationError, match=f"^{name.replace('+', '.')}, picture 1099511627779: instances.json does not"
    ):
        reader[3]
    with pytest.raises(ImageError, match="no picture at"):
        reader.picture(4)
    assert reader[4].requests


def test_a_picture_that_instances_lack_or_that_lies_elsewhere(tmp_path):
    miniature_language.make_referring(tmp_path, "refcoco|unc")
    file = tmp_path / "refer_seg/refcoco/instances.json"
    text = file.read_text().replace(f'"id": {miniature_language.LARGE},', '"id": 7,')
    file.write_text(text.replace("COCO_train2014_000000000001.jpg", "../../secret.jpg"))
    reader = open_reader("refcoco", tmp_path)
    with pytest.raises(AnnotationError, match="picture 1099511627776: there are expressions for it"):
        reader[0]
    with pytest.raises(ImageError, match="secret.jpg' is named as a picture, but it is no path inside"):
        reader[1]
    assert reader[2].requests


@pytest.mark.parametrize(
    "damage",
    [{"ann_id": [[7]]}, {"ann_id": None}, {"sentences": None}, {"sentences": [7]}, {"sentences": [{"sent": 7}]}],
)
def test_a_damaged_reference_leaves_the_other_pictures(tmp_path, damage):
    miniature_language.make_referring(tmp_path, "refcoco|unc")
    file = tmp_path / "refer_seg/refcoco/refs(unc).p"
    references = read_plain_pickle(file, (), list)
    references[0] |= damage
    file.write_bytes(pickle.dumps(references))
    reader = open_reader("refcoco", tmp_path)
    with pytest.raises(AnnotationError, match="^refcoco, picture 1099511627776"):
        reader[0]
    assert reader[1].requests


@pytest.mark.parametrize(
    ("own", "splits"),
    [("train", {"train"}), ("val", {"val"}), ("testAB", {"testA", "testB", "test"}), ("test", {"test"})],
)
def test_splits_follow_refer(own, splits):
    assert {
        split for split in ("train", "val", "testA", "testB", "testC", "test") if refer._belongs(own, split)
    } == splits


@pytest.mark.parametrize("name", ["refcoco|google", "refcocog|google", "refclef|berkeley"])
def test_other_lists_of_expressions(tmp_path, name):
    miniature_language.make_referring(tmp_path, name)
    for split in refer.SPLITS[name]:
        assert len(open_reader(name, tmp_path, split)) == (5 if split == "train" else 1)
    with pytest.raises(
        LayoutError, match=rf"no .*refs\((unc|umd)\).p. Expected are:\n  refer_seg/{name.split('|')[0]}"
    ):
        open_reader(name.split("|")[0], tmp_path)


@pytest.mark.parametrize("missing", ["refcoco/refs(unc).p", "refcoco/instances.json", "images/mscoco"])
def test_an_incomplete_folder_says_what_is_expected(missing, tmp_path):
    miniature_language.make_referring(tmp_path, "refcoco|unc")
    (tmp_path / "refer_seg" / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(LayoutError, match=r"Expected are:\n  refer_seg/refcoco/refs\(unc\).p"):
        open_reader("refcoco", tmp_path)


def test_multi_referring_asks_for_6_5_4_expressions_in_turn(root):
    single, multi = open_reader("refcoco", root, "val")[0], open_reader("multi_refcoco", root, "val")[0]
    words = [request.words[0].lower() for request in single.requests]
    targets = [request.targets[0] for request in single.requests]
    assert sum((request.targets for request in multi.requests), ()) == tuple(targets)
    assert [len(request.targets) for request in multi.requests] == sizes(len(words))
    first = multi.requests[0]
    assert first.words[0] == ", ".join(words[:5]) + " and " + words[5]
    assert first.answer == (*sum(((target, ", ") for target in targets[:5]), ())[:-1], " and ", targets[5], ".")
    assert f"What is {first.words[0]} in this image? Please output segmentation mask." == SHORT_QUESTIONS[3].format(
        c=first.words[0]
    )


def sizes(count: int) -> list[int]:
    chunks = []
    while count:
        chunks.append(min(count, (6, 5, 4)[len(chunks) % 3]))
        count -= chunks[-1]
    return chunks


def test_readers_survive_pickling(root):
    reader = open_reader("refcoco", root)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy[0].requests == reader[0].requests and copy.picture(0) == reader.picture(0)


# Pickles of plain values.


def test_a_pickle_of_python_2_is_read(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsS'id'\np4\nL1099511627776L\nsa.")
    assert read_plain_pickle(path, (), list) == [{"sent": "café", "id": 1 << 40}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system, but only lists"),
        (pickle.dumps([np.float64(1.0)]), "asks for numpy.*, but only lists"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "asks for builtins.eval"),
        (b"(i__builtin__\neval\n.", "asks for (builtins|__builtin__).eval"),
        (pickle.dumps([1, 2])[:-3], "is damaged and cannot be read as a pickle"),
        (b"", "is damaged"),
        (pickle.dumps({"a": 1}), "holds a dict, but a list is expected"),
    ],
)
def test_a_pickle_of_anything_else_is_refused(data, message, tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(data)
    with pytest.raises(LayoutError, match=message):
        read_plain_pickle(path, (), list)
