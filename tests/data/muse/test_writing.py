"""What is written is what readers of MUSE read, and a page to look at."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixelstory_jax.data.annotations import decode_mask
from pixelstory_jax.data.muse.building import select, write_drafts
from pixelstory_jax.data.muse.checks import Limits
from pixelstory_jax.data.muse.pair import Mention, Pair
from pixelstory_jax.data.muse.pictures import Choice, Instance, Picture, picture_file, read_pictures
from pixelstory_jax.data.muse.sheet import contact_sheet
from pixelstory_jax.data.muse.statistics import statistics, table
from pixelstory_jax.data.muse.writers import RuleWriter
from pixelstory_jax.data.muse.writing import Entry, as_json, rephrased, write_entries
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.reader import open_picture
from tests.data.muse.annotated import write_annotated

SPLITS = ("train", "val", "test_few", "test_many")


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    path, folder = write_annotated(tmp_path_factory.mktemp("annotated"), 9)
    found = [(picture, picture_file(picture, folder)) for picture in read_pictures(path, Choice())[0]]
    sources = [(picture, file) for picture, file in found if file]
    done = []
    drafts = write_drafts(sources, RuleWriter(3, 0), 1, lambda: None, done.append)
    assert done == list(range(1, 10))
    return select(sources, drafts, Limits(), 0.0, 0, 0)[0]


@pytest.mark.parametrize("split", SPLITS)
def test_reader_of_muse_reads_it(entries, tmp_path, split):
    write_entries(entries, tmp_path, split)
    reader = open_reader("muse", tmp_path, split)
    assert len(reader) == len(entries)
    for number, entry in enumerate(entries):
        annotation = reader[number]
        assert open_picture(reader, number, "it").shape[:2] == annotation.size
        for request, pair in zip(annotation.requests, entry.pairs, strict=True):
            assert request.words == (pair.question,)
            for region, mention in zip(request.targets, pair.mentions, strict=True):
                instance = entry.picture.instances[mention.number]
                assert annotation.regions[region].rephrased == rephrased(mention)
                expected = decode_mask(instance.segmentation, annotation.size)
                np.testing.assert_array_equal(annotation.mask(region), expected)
            told = [part for part in request.answer if isinstance(part, str)]
            assert [part for part in request.answer if isinstance(part, int)] == list(request.targets)
            assert "".join(told).replace(" ", "") == pair.plain.replace(" ", "")


def test_schema(entries):
    entry = as_json(entries[0])
    assert list(entry) == ["file_name", "height", "width", "ann_list", "questions", "answers", "text_answers"]
    for instances, text in zip(entry["answers"], entry["text_answers"], strict=True):
        assert text.count("{seg}") == len(instances) >= 2
        assert set(instances[0]) == {"category_id", "category_name", "bbox", "segmentation", "rephrased_name"}


@pytest.mark.parametrize(
    "url, field, place",
    [
        ("", "file_name", "train2014/a.jpg"),
        ("http://images.cocodataset.org/train2017/b.jpg", "coco_url", "train2017/b.jpg"),
        ("http://images.cocodataset.org/val2017/b.jpg", "coco_url", "val2017/b.jpg"),
        ("http://images.cocodataset.org/train2014/b.jpg", "file_name", "train2014/a.jpg"),
    ],
)
def test_names_of_pictures(tmp_path, url, field, place):
    instance = Instance("cup", "cup", 1, (0, 0, 9, 9), 81, [[0, 0, 9, 0, 9, 9]])
    pair = Pair("Which are they?", (Mention("The one", 0), " and ", Mention("the other", 1)))
    file = tmp_path / "here.jpg"
    file.write_bytes(b"picture")
    entry = Entry(Picture("a.jpg", url, 20, 30, (instance, instance)), file, (pair,))
    path = write_entries([entry], tmp_path / "out", "train")
    assert field in json.loads(path.read_text())[0]
    reader = open_reader("muse", tmp_path / "out")
    assert reader.picture(0) == b"picture" and reader[0].provenance.picture.endswith(place)


def test_pictures_are_never_replaced_by_others(entries, tmp_path):
    write_entries(entries, tmp_path, "train")
    before = {path: path.resolve() for path in tmp_path.rglob("*.png")}
    write_entries(entries, tmp_path, "train")
    assert {path: path.resolve() for path in tmp_path.rglob("*.png")} == before
    link = next(iter(before))
    link.unlink()
    link.write_bytes(b"another picture")
    with pytest.raises(ValueError, match="exists and is another picture than"):
        write_entries(entries, tmp_path, "train")
    twice = Entry(entries[0].picture, entries[1].file, entries[0].pairs)
    with pytest.raises(ValueError, match="would both be train2014/0000.png"):
        write_entries([entries[0], twice], tmp_path / "other", "train")


def test_statistics(entries):
    numbers = statistics(entries, {"too few targets": 3})
    pairs = [pair for entry in entries for pair in entry.pairs]
    assert numbers["pairs"] == len(pairs) == sum(numbers["pairs_by_targets"].values())
    assert numbers["targets"] == sum(len(pair.targets) for pair in pairs) == sum(numbers["categories"].values())
    assert numbers["rejected"] == {"too few targets": 3}
    assert "too few targets" in table(json.loads(json.dumps(numbers)))


def test_contact_sheet(entries):
    sheet = contact_sheet(entries[:4], columns=2)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 700 and sheet.shape[0] > 700
    assert (sheet.reshape(-1, 3).std(0) > 20).all()


def test_contact_sheet_refuses_pictures_of_another_size(entries):
    first = entries[0].picture
    other = next(e for e in entries if (e.picture.height, e.picture.width) != (first.height, first.width))
    wrong = Entry(first, other.file, entries[0].pairs)
    with pytest.raises(ValueError, match="its annotations are for"):
        contact_sheet([wrong])
