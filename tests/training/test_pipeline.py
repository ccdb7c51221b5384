"""Order, resume, parts and errors of the data pipeline."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pytest

from pixelstory_jax.data.pipeline import DataError, make_iterator
from tests.training.toy import ToySource


def take(iterator, count):
    return [next(iterator)["index"].tolist() for _ in range(count)]


def test_each_epoch_is_another_permutation_of_the_seed():
    first = np.concatenate(take(make_iterator(ToySource(20), 5, seed=7), 8)).reshape(2, 20)
    assert sorted(first[0]) == sorted(first[1]) == list(range(20))
    assert first[0].tolist() != first[1].tolist()
    again = take(make_iterator(ToySource(20), 5, seed=7, threads=3, prefetch=1), 8)
    assert np.concatenate(again).tolist() == first.ravel().tolist()
    assert take(make_iterator(ToySource(20), 5, seed=8), 8) != again


def test_without_shuffle_the_order_is_that_of_the_source():
    assert take(make_iterator(ToySource(5), 3, shuffle=False, threads=0), 3) == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_batches_may_straddle_epochs_and_exceed_the_source():
    batches = take(make_iterator(ToySource(3), 7, seed=1), 3)
    assert all(len(batch) == 7 for batch in batches)
    assert sorted(np.concatenate(batches)) == sorted(list(range(3)) * 7)


def test_position_is_that_of_batches_taken_not_made_ahead():
    whole = take(make_iterator(ToySource(30), 4, seed=2), 12)
    iterator = make_iterator(ToySource(30), 4, seed=2, prefetch=6)
    take(iterator, 5)
    state = iterator.get_state()
    assert state == {"examples": 20}
    resumed = make_iterator(ToySource(30), 4, seed=2)
    resumed.set_state(state)
    assert take(resumed, 7) == whole[5:]
    iterator.set_state({"examples": 8})
    assert take(iterator, 2) == whole[2:4]


def test_parts_of_processes_make_up_the_global_batch():
    whole = take(make_iterator(ToySource(30), 6, seed=2), 6)
    parts = [take(make_iterator(ToySource(30), 6, seed=2, process_index=p, process_count=3), 6) for p in range(3)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("threads", [0, 2])
def test_an_example_that_cannot_be_made_is_named(threads):
    iterator = make_iterator(ToySource(10, broken=6), 5, shuffle=False, threads=threads)
    next(iterator)
    with pytest.raises(DataError, match="Example 6 .*OSError: picture is truncated"):
        next(iterator)


def test_an_example_of_another_shape_is_named():
    class Ragged(ToySource):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {**example, "x": example["x"][:7]} if index == 3 else example

    with pytest.raises(DataError, match=r"Field 'x' of example 3 is float32\[7\], of example 0 float32\[8\]"):
        next(make_iterator(Ragged(10), 5, shuffle=False))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        make_iterator(ToySource(0), 5)
    with pytest.raises(ValueError, match="not a multiple of the 2 processes"):
        make_iterator(ToySource(9), 5, process_count=2)


class Deadly(ToySource):
    """Its example 6 ends whoever makes it: a crash of a decoder, the system where memory runs out."""

    def __init__(self, way):
        super().__init__(10)
        self._way = way

    def __getitem__(self, index):
        if index == 6:
            self._way()
        return super().__getitem__(index)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("way", "message"),
    [(killed, "A worker that makes batches has died .*exit code -9"), (sys.exit, "Example 6 .*SystemExit")],
)
def test_a_worker_process_that_dies_is_told_not_waited_for(way, message):
    iterator = make_iterator(Deadly(way), 5, shuffle=False, processes=2)
    try:
        with pytest.raises(DataError, match=message):
            for _ in range(3):
                next(iterator)
    finally:
        iterator.close()


def test_a_worker_thread_that_leaves_is_told():
    iterator = make_iterator(Deadly(sys.exit), 5, shuffle=False, threads=2)
    with pytest.raises(DataError, match="Example 6 .*SystemExit"):
        for _ in range(3):
            next(iterator)
