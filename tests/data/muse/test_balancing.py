"""Pairs spread over the number of their targets."""

from __future__ import annotations

from collections import Counter

import pytest

from pixelstory_jax.data.muse.balancing import balanced

COUNTS = [2] * 60 + [3] * 30 + [4] * 9 + [7]


@pytest.mark.parametrize(
    "factor, size, amounts",
    [
        (0, 0, {2: 60, 3: 30, 4: 9, 7: 1}),
        (1.0, 0, {2: 25, 3: 25, 4: 9, 7: 1}),
        (2.0, 0, {2: 50, 3: 30, 4: 9, 7: 1}),
        (0, 30, {2: 10, 3: 10, 4: 9, 7: 1}),
        (1.0, 1000, {2: 25, 3: 25, 4: 9, 7: 1}),
    ],
)
def test_amounts(factor, size, amounts):
    kept = balanced(COUNTS, factor, size, seed=0)
    assert kept == sorted(kept) and Counter(COUNTS[i] for i in kept) == amounts


def test_size_is_never_exceeded():
    assert [len(balanced(COUNTS, 0, size, 0)) for size in (1, 2, 3, 41, 99, 100, 101)] == [1, 2, 3, 41, 99, 100, 100]


def test_seed_decides_which():
    assert balanced(COUNTS, 1.0, 0, 3) == balanced(COUNTS, 1.0, 0, 3) != balanced(COUNTS, 1.0, 0, 4)
    assert balanced([], 1.0, 5, 0) == []
