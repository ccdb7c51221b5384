"""Fewer pairs, more evenly spread over the number of their targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def balanced(counts: Sequence[int], factor: float, size: int, seed: int) -> list[int]:
    """Which pairs are kept, in order.

    Args:
      counts: the number of targets of each pair.
      factor: no number of targets keeps more than `factor` times the mean number of pairs; 0 keeps all.
      size: so many pairs in all at most, taken as evenly as they go; 0 for no such limit.
    """
    there = Counter(counts)
    if not there:
        return []
    level = max(1, int(factor * len(counts) / len(there))) if factor else len(counts)
    if size:
        level = min(level, _level(list(there.values()), size))
    order = np.random.default_rng(seed).permutation(len(counts))
    taken: Counter[int] = Counter()
    kept = []
    for position in map(int, order):
        count = counts[position]
        if taken[count] < level:
            taken[count] += 1
            kept.append(position)
    return sorted(kept[:size] if size else kept)


def _level(amounts: Sequence[int], size: int) -> int:
    """The smallest level at which min(amount, level), summed up, reaches `size`."""
    low, high = 1, max(amounts)
    while low < high:
        middle = (low + high) // 2
        if sum(min(amount, middle) for amount in amounts) >= size:
            high = middle
        else:
            low = middle + 1
    return low
