"""Mixtures of data sets: shares, order, resuming, parts of processes, and pictures that cannot be used."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.asking import Asking
from pixelstory_jax.data.examples import Layout, SegmentationExamples
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.mixture import TRIES, WARNINGS, Group, Mixture
from pixelstory_jax.data.packing import pack
from pixelstory_jax.data.pipeline import DataError, make_iterator
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.registry import packed_folder
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.inference.saving import png_bytes
from tests.data.readers.all_miniatures import MAKERS

SETS = ("ade20k", "cocostuff", "mapillary")
LAYOUT = Layout(canvas=64, questions=3, length=80, slots=9, image_tokens=4)


class Toy:
    """`count` pictures of one colour, of which those in `broken` cannot be used: odd ones for want of a picture."""

    split = "train"

    def __init__(self, name: str, count: int, broken: range | tuple[int, ...] = ()) -> None:
        self.name, self.count, self.broken = name, count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Annotation:
        if index in self.broken and index % 2 == 0:
            raise AnnotationError(f"{self.name}: number {index} is damaged.")
        things = [Region([[0, 0, 4 + k, 0, 4 + k, 4, 0, 4]], name=f"thing {k}") for k in range(3)]
        requests = [Request((region.name,), (k,)) for k, region in enumerate(things)]
        source = Provenance(self.name, self.split, f"{index}.png", str(index))
        return Annotation((8, 10), "names", tuple(things), tuple(requests), source)

    def picture(self, index: int) -> bytes:
        if index in self.broken:
            raise ImageError(f"There is no picture {index}.")
        return png_bytes(np.full((8, 10, 3), index % 256, np.uint8))


def toys(seed: int = 3) -> Mixture:
    groups = [
        Group("both", 3.0, (Toy("first", 7), Toy("second", 500))),
        Group("one", 1.0, (Toy("third", 20),)),
        Group("off", 0.0, (Toy("never", 5),)),
    ]
    return Mixture(groups, Asking(), seed)


def test_shares_are_those_of_the_weights_and_each_set_is_gone_through():
    mixture = toys()
    places = [mixture.place(index) for index in range(10_000)]
    shares = Counter(reader.name for reader, _ in places)
    assert set(shares) == {"first", "second", "third"}
    assert mixture.shares == [3 / 8, 3 / 8, 1 / 4]
    for name, share in zip(("first", "second", "third"), mixture.shares, strict=True):
        assert shares[name] == pytest.approx(10_000 * share, abs=2)
    for reader in mixture.readers:
        order = [picture for which, picture in places if which is reader]
        passes = [order[start : start + len(reader)] for start in range(0, len(order), len(reader))]
        assert all(sorted(one) == list(range(len(reader))) for one in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1]) and passes[0] != passes[1]


def test_an_example_is_a_function_of_seed_and_position():
    mixture, order = toys(), np.random.default_rng(0).permutation(60)
    shown = {int(index): mixture[int(index)] for index in order}
    again = toys()
    for index in range(60):
        (one, asked), (other, asked_again) = shown[index], again[index]
        assert (one.provenance, asked) == (other.provenance, asked_again)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.masks, other.masks)
        assert one.provenance.id == str(again.place(index)[1]) and one.image.max() == int(one.provenance.id) % 256
    other = toys(seed=4)
    assert [again.place(index)[1] for index in range(60)] != [other.place(index)[1] for index in range(60)]
    same_picture = [mixture[index][1] for index in range(600) if mixture.place(index)[1] == 0][:2]
    assert same_picture[0] != same_picture[1]  # what is asked is drawn anew


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SegmentationExamples:
    root: Path = tmp_path_factory.mktemp("data")
    for name in SETS:
        MAKERS[name](root)
    pack(
        open_reader("ade20k", root), range(3), packed_folder("ade20k", root, "train"), source=""
    )  # one of them is packed
    groups = [Group("maps", 2.0, tuple(open_reader(name, root) for name in SETS)), Group("toys", 1.0, (Toy("t", 9),))]
    return SegmentationExamples(Mixture(groups, Asking(), seed=1), small_tokenizer(2), LAYOUT)


def batches(source: SegmentationExamples, count: int, **options) -> list[dict[str, np.ndarray]]:
    iterator = make_iterator(source, 8, seed=5, **options)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_four_processes_together_make_the_batches_of_one(source):
    whole = batches(source, 2)
    assert whole[0]["target_valid"].any(axis=1).all() and not np.array_equal(whole[0]["image"], whole[1]["image"])
    parts = [batches(source, 2, process_index=index, process_count=4) for index in range(4)]
    for number, batch in enumerate(whole):
        assert_equal({name: np.concatenate([part[number][name] for part in parts]) for name in batch}, batch)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_goes_on_in_the_middle_of_a_pass(source, processes):
    whole = batches(source, 5)
    iterator = make_iterator(source, 8, seed=5, processes=processes)
    try:
        for number in range(3):
            assert_equal(next(iterator), whole[number])
        state = iterator.get_state()
    finally:
        iterator.close()
    assert state == {"examples": 24}
    resumed = make_iterator(source, 8, seed=5)
    resumed.set_state(state)
    assert_equal(next(resumed), whole[3])
    assert_equal(next(resumed), whole[4])


def test_what_cannot_be_used_is_passed_over_named_and_always_the_same(caplog):
    def mixture() -> Mixture:
        return Mixture([Group("toys", 1.0, (Toy("toy", 40, broken=range(20)),))], Asking(), seed=2)

    first = mixture()
    with caplog.at_level(logging.WARNING, logger="absl"):
        shown = [first[index][0].provenance for index in range(80)]
    assert {int(one.id) for one in shown} == set(range(20, 40))
    assert first.skipped > 40
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == WARNINGS and all(text.startswith("Passed over: ") for text in warnings)
    assert any("is damaged" in text for text in warnings) and any("There is no picture" in text for text in warnings)
    assert warnings[-1].endswith("(no more such pictures will be named)")
    again = mixture()
    assert [again[index][0].provenance for index in reversed(range(80))] == shown[::-1]


def test_a_set_of_which_nothing_can_be_used_ends_the_run_with_a_sentence():
    mixture = Mixture([Group("toys", 1.0, (Toy("toy", 9, broken=range(9)),))], Asking(), seed=2)
    examples = SegmentationExamples(mixture, small_tokenizer(2), LAYOUT)
    with pytest.raises(
        DataError, match=f"Example . of the data .*: {TRIES} pictures of toy in a row cannot be used, th"
    ):
        next(make_iterator(examples, 2))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "must be non-negative with a positive sum"),
        ([Group("a", 0.0, (Toy("t", 1),))], "positive sum, got {'a': 0.0}"),
        ([Group("a", -1.0, (Toy("t", 1),)), Group("b", 2.0, (Toy("t", 1),))], "must be non-negative"),
        ([Group("a", 1.0, ())], "The group a of the mixture has no data set"),
        ([Group("a", 1.0, (Toy("t", 0),))], r"The data set t \(train\) has no pictures"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(groups, words):
    with pytest.raises(ValueError, match=words):
        Mixture(groups, Asking(), seed=0)
