"""One-to-one matching of predicted and true masks.

P  predictions        T  targets        H, W  height and width
"""

from __future__ import annotations

import numpy as np


def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of rows to columns with the least summed cost (the Hungarian problem).

    Shortest augmenting paths with row and column prices (Jonker and Volgenant 1987, as in Crouse 2016): cubic time.

    Args:
      cost: [P, T], finite.

    Returns:
      (rows, columns), int [min(P, T)] each, rows ascending.

    Raises:
      ValueError: cost is no matrix or holds values that are not finite.
    """
    cost = np.asarray(cost, np.float64)
    if cost.ndim != 2 or not np.isfinite(cost).all():
        raise ValueError(f"A finite cost matrix [P, T] is needed, not one of shape {list(cost.shape)} or with gaps.")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    row_price, column_price = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
    owner = np.full(cost.shape[1], -1)  # the row that holds each column
    for new_row in range(cost.shape[0]):
        distance = np.full(cost.shape[1], np.inf)
        previous = np.full(cost.shape[1], -1)  # the column before this one on the shortest path
        done = np.zeros(cost.shape[1], bool)
        row, column, reached = new_row, -1, 0.0
        while row >= 0:
            through = reached + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], previous[shorter] = through[shorter], column
            column = int(np.argmin(np.where(done, np.inf, distance)))
            reached = distance[column]
            done[column] = True
            row = owner[column]
        # Keep every reduced cost at or above zero, and zero along the path that is taken.
        row_price[new_row] += reached
        for passed in np.flatnonzero(done & (owner >= 0)):
            row_price[owner[passed]] += reached - distance[passed]
        column_price[done] -= reached - distance[done]
        while column >= 0:
            before = int(previous[column])
            owner[column] = owner[before] if before >= 0 else new_row
            column = before
    columns = np.flatnonzero(owner >= 0)
    order = np.argsort(owner[columns])
    return owner[columns][order], columns[order]


def intersections(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel counts of intersection and union of every pair of bool masks [P, H, W] and [T, H, W]: two int [P, T]."""
    # Float32 counts exactly up to 2**24 pixels, float64 beyond any picture.
    exact: type[np.floating] = np.float32 if predicted[0].size < 2**24 else np.float64
    flat_predicted = predicted.reshape(len(predicted), -1)
    flat_true = true.reshape(len(true), -1)
    both = np.asarray(flat_predicted, exact) @ np.asarray(flat_true, exact).T
    areas = np.count_nonzero(flat_predicted, axis=1)[:, None] + np.count_nonzero(flat_true, axis=1)[None]
    intersection = both.astype(np.int64)
    return intersection, areas - intersection


def match_masks(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs predictions with targets so that the sum of IoU is largest.

    Args:
      predicted: bool [P, H, W].
      true: bool [T, H, W].

    Returns:
      (prediction of each pair, target of each pair, IoU of each pair), [min(P, T)] each. Pairs of IoU 0 are kept.
    """
    if not len(predicted) or not len(true):
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0)
    intersection, union = intersections(predicted, true)
    iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    rows, columns = assign(-iou)
    return rows, columns, iou[rows, columns]
