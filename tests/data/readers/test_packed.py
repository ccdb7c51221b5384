"""Packed data sets: what is written, that it reads as the folder does, and what a stopped run leaves."""

from __future__ import annotations

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.asking import Asking
from pixelstory_jax.data.checking import UNUSABLE
from pixelstory_jax.data.images import fit_mask
from pixelstory_jax.data.mixture import Group, Mixture
from pixelstory_jax.data.packing import PackingError, check, pack
from pixelstory_jax.data.readers import READERS, open_folder, open_reader
from pixelstory_jax.data.readers.packed import Packed, PackedSet
from pixelstory_jax.data.readers.reader import LayoutError, Reader, open_picture
from pixelstory_jax.data.readers.registry import packed_folder
from tests.data.readers.all_miniatures import MAKERS
from tests.data.readers.miniature_semantic import make_ade20k


@pytest.fixture
def root(tmp_path) -> Path:
    make_ade20k(tmp_path)
    return tmp_path


def pack_ade20k(root: Path, split: str = "train", **options) -> Path:
    reader = open_folder("ade20k", root, split)
    folder = packed_folder("ade20k", root, split)
    pack(reader, range(len(reader)), folder, source=str(root), **options)
    return folder


def assert_same(one: Reader, other: Reader, numbers: dict[int, int]) -> None:
    """Annotations, decoded masks and pixels of picture k of one and numbers[k] of the other."""
    for index, counterpart in numbers.items():
        left, right = one[index], other[counterpart]
        bare = [
            dataclasses.replace(
                annotation,
                ignored=None,
                regions=tuple(dataclasses.replace(region, mask=()) for region in annotation.regions),
            )
            for annotation in (left, right)
        ]
        assert bare[0] == bare[1]
        for k in range(len(left.regions)):
            np.testing.assert_array_equal(left.mask(k), right.mask(k))
        ignored = [annotation.ignored_mask() for annotation in (left, right)]
        assert (ignored[0] is None) == (ignored[1] is None)
        if ignored[0] is not None:
            np.testing.assert_array_equal(*ignored)
        pictures = [open_picture(*which, "picture") for which in ((one, index), (other, counterpart))]
        np.testing.assert_array_equal(*pictures)


def test_packed_and_folder_read_the_same(root):
    folder = pack_ade20k(root, per_shard=2)
    packed, plain = open_reader("ade20k", root), open_folder("ade20k", root)
    assert isinstance(packed, Packed) and (packed.name, packed.split, len(packed)) == ("ade20k", "train", 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "ade20k-train-00000-of-00002.array_record",
        "ade20k-train-00001-of-00002.array_record",
        "set.json",
    ]
    assert_same(plain, packed, {0: 0, 1: 1, 2: 2})
    assert packed.picture(0) == plain.picture(0)
    with pytest.raises(IndexError, match="no picture 3, it holds 3"):
        packed[3]


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in MAKERS for split in READERS[name].splits])
def test_every_data_set_reads_the_same_packed(name, split, tmp_path):
    """What is left out is what the check names, and the others keep their order."""
    MAKERS[name](tmp_path)
    try:
        plain = open_folder(name, tmp_path, split)
    except LayoutError:
        pytest.skip("The miniature does not have this split")
    folder = packed_folder(name, tmp_path, split)
    report = pack(plain, range(len(plain)), folder, source="", per_shard=2)
    packed = open_reader(name, tmp_path, split)
    left_out = {problem.index for problem in report.problems if problem.kind in UNUSABLE}
    kept = [index for index in range(len(plain)) if index not in left_out]
    assert len(packed) == len(kept) == report.usable > 0
    assert_same(plain, packed, {index: place for place, index in enumerate(kept)})
    assert check(packed, range(len(packed))).usable == len(kept)


def test_any_thread_and_process_reads(root):
    pack_ade20k(root, per_shard=1)
    packed = open_reader("ade20k", root)
    want = [(packed[k], packed.picture(k)) for k in range(3)]
    copied = pickle.loads(pickle.dumps(packed))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda k: (copied[k % 3], copied.picture(k % 3)), range(300)))
    assert got == want * 100


def test_a_mixture_draws_the_same_from_both(root):
    drawn = []
    for _ in range(2):
        mixture = Mixture([Group("semantic", 1.0, (open_reader("ade20k", root),))], Asking(), seed=3)
        drawn.append([mixture[index] for index in range(6)])
        if len(drawn) == 1:
            pack_ade20k(root)
    for (one, asked), (other, asked_of_packed) in zip(*drawn, strict=True):
        assert asked == asked_of_packed and one.provenance == other.provenance
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.masks, other.masks)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record")}


def test_the_same_pictures_give_the_same_bytes_in_one_process_and_in_two(root, tmp_path_factory):
    first = pack_ade20k(root, per_shard=2)
    again = tmp_path_factory.mktemp("again") / "packed"
    pack(open_folder("ade20k", root), range(3), again, source="elsewhere", per_shard=2, processes=2)
    assert shard_bytes(first) == shard_bytes(again)
    described = PackedSet.read(first)
    assert [shard.pictures for shard in described.shards] == [2, 1]
    assert described.counts == {"pictures": 3, "left_out": 0} and described.source == str(root)


def test_pictures_are_made_smaller_with_their_masks(root):
    pack_ade20k(root, side=64)
    packed, plain = open_reader("ade20k", root), open_folder("ade20k", root)
    for index in range(3):
        small, large = packed[index], plain[index]
        assert max(small.size) == 64 and open_picture(packed, index, "").shape[:2] == small.size
        assert (small.requests, small.provenance) == (large.requests, large.provenance)
        for k in range(len(large.regions)):
            np.testing.assert_array_equal(fit_mask(small.mask(k), 64), fit_mask(large.mask(k), 64))
    assert check(packed, range(3)).usable == 3


def test_what_cannot_be_used_is_left_out(root):
    (root / "ade20k/images/training/ADE_train_00000001.jpg").write_bytes(b"no picture")
    reader = open_folder("ade20k", root)
    folder = packed_folder("ade20k", root, "train")
    report = pack(reader, range(3), folder, source="", per_shard=1)  # the shard of the second one is empty
    assert report.counts["usable"] == 2 and [problem.index for problem in report.problems] == [1]
    assert PackedSet.read(folder).counts == {"pictures": 2, "left_out": 1}
    assert_same(reader, Packed(folder), {0: 0, 2: 1})


def test_nothing_is_packed_where_nothing_can_be_used(root):
    for path in root.glob("ade20k/images/training/*"):
        path.unlink()
    folder = packed_folder("ade20k", root, "train")
    assert pack(open_folder("ade20k", root), range(3), folder, source="").usable == 0
    assert [*folder.parent.iterdir()] == []


class Interrupted:
    """A reader that is stopped at a picture."""

    def __init__(self, reader: Reader, at: int) -> None:
        self.reader, self.at, self.name, self.split, self.read = reader, at, reader.name, reader.split, []

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.at:
            raise KeyboardInterrupt
        return self.reader[index]

    def picture(self, index):
        return self.reader.picture(index)


def test_a_stopped_run_goes_on_and_leaves_no_half_shard(root, tmp_path_factory):
    whole = shard_bytes(pack_ade20k(root, per_shard=1))
    folder = tmp_path_factory.mktemp("other") / "packed" / "ade20k-train"
    reader = Interrupted(open_folder("ade20k", root), at=1)
    with pytest.raises(KeyboardInterrupt):
        pack(reader, range(3), folder, source="", per_shard=1)
    assert not folder.exists()
    (partial,) = folder.parent.iterdir()
    assert shard_bytes(partial).keys() == {"ade20k-train-00000-of-00003.array_record"}
    again = Interrupted(open_folder("ade20k", root), at=-1)
    done: list[int] = []
    report = pack(again, range(3), folder, source="", per_shard=1, progress=done.append)
    assert again.read == [1, 2] and done == [1, 1, 1] and report.pictures == 3
    assert shard_bytes(folder) == whole and [*folder.parent.iterdir()] == [folder]


def test_another_plan_starts_anew(root):
    folder = packed_folder("ade20k", root, "train")
    with pytest.raises(KeyboardInterrupt):
        pack(Interrupted(open_folder("ade20k", root), at=1), range(3), folder, source="", per_shard=1)
    again = Interrupted(open_folder("ade20k", root), at=-1)
    pack(again, range(3), folder, source="", per_shard=1, side=64)
    assert again.read == [0, 1, 2]


def test_an_existing_set_is_not_replaced(root):
    folder = pack_ade20k(root)
    with pytest.raises(PackingError, match="exists already; remove it to pack the data set anew"):
        pack_ade20k(root)
    assert Packed(folder)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "00001-of-00002.array_record is missing, set.json beside it speaks of"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "has 1,000 bytes, set.json beside it speaks of 131"),
        (lambda path: path.with_name("set.json").unlink(), "There is no .*set.json"),
        (lambda path: path.with_name("set.json").write_text("{"), "set.json cannot be read as JSON"),
        (lambda path: path.with_name("set.json").write_text('{"format": 9}'), "has format 9, this version reads 1"),
        (lambda path: path.with_name("set.json").write_text('{"format": 1}'), "does not describe a packed data set"),
    ],
)
def test_an_incomplete_packed_set_is_refused(root, spoil, words):
    folder = pack_ade20k(root, per_shard=2)
    spoil(folder / "ade20k-train-00001-of-00002.array_record")
    with pytest.raises(LayoutError, match=words):
        open_reader("ade20k", root)


def test_changed_bytes_are_found(root):
    folder = pack_ade20k(root)
    (path,) = folder.glob("*.array_record")
    content = bytearray(path.read_bytes())
    place = content.find(open_folder("ade20k", root).picture(1)[:40])
    content[place + 20] ^= 1
    path.write_bytes(content)
    packed = open_reader("ade20k", root)
    with pytest.raises(AnnotationError, match="Picture 1 of .*ade20k-train cannot be read: Corrupted"):
        packed[1]
    report = check(packed, range(3))
    assert report.usable == 2
    assert {problem.kind for problem in report.problems} == {"annotation", "shard"}
    assert "has changed since it was packed" in report.problems[-1].reason
    assert json.dumps(report.summary())
