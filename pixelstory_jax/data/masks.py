"""Masks in the forms in which they are stored: COCO run lengths, polygons, boxes.

Masks are bool [H, W]. Run lengths count pixels down the columns (COCO's order), starting with a run of zeros; the
compressed form is COCO's string. Polygons are flat lists [x0, y0, x1, y1, ...] in COCO's continuous coordinates:
pixel (row i, column j) covers the square from (j, i) to (j+1, i+1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

REACH = 1 << 20
"""Pixels around a polygon at most: COCO's code keeps all points on the way, and a wrong one could take all memory."""


def encode_rle(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """COCO run-length encoding of bool [H, W]: {"size": [H, W], "counts": str, or list[int] when not compressed}."""
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts = [int(run) for run in np.diff(bounds)] if flat.size else []
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": [int(side) for side in mask.shape], "counts": _pack(counts) if compressed else counts}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """bool [H, W] from either form of COCO run lengths; ValueError if the runs do not fill the size."""
    height, width = rle["size"]
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    runs = _unpack(counts) if isinstance(counts, str) else np.asarray(counts, np.int64)
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise ValueError(
            f"The run lengths cover {runs.sum()} pixels, but a mask of {height} x {width} has {height * width}."
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box (x, y, width, height) of bool [H, W]; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0, 0, 0, 0
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top


def mask_polygons(mask: np.ndarray) -> list[list[int]]:
    """The outer border of every (4-connected) part of bool [H, W], along the pixel edges, largest part first.

    COCO's polygons know no holes: they are filled here, and only the run lengths keep them.
    """
    rings = [(area, ring) for ring in _borders(np.asarray(mask, bool)) if (area := _signed_area(ring)) > 0]
    rings.sort(key=lambda pair: -pair[0])
    return [[coordinate for corner in ring for coordinate in corner] for _, ring in rings]


def fill_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W]: the pixels whose centre lies inside any of the flat polygons (even-odd rule within each)."""
    height, width = size
    mask = np.zeros(size, bool)
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64).reshape(-1, 2)
        # Each border crossing of the line through the centres of a row switches inside and outside from there on.
        switches = np.zeros((height, width + 1), np.int32)
        for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if y0 == y1:
                continue
            first, last = np.ceil(np.clip(sorted((y0, y1)), 0, height) - 0.5).astype(int)
            rows = np.arange(first, last)
            crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            np.add.at(switches, (rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)), 1)
        mask |= np.cumsum(switches, axis=1)[:, :width] % 2 == 1
    return mask


def coco_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of polygons united, as COCO's own code draws them: to the pixel what published scores are counted on.

    Args:
      polygons: flat lists of at least three corners each; they may lie outside of the picture. None: an empty mask.

    Raises:
      ValueError: a list that is no polygon.
    """
    from pycocotools import mask as coco

    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"A polygon needs three or more corners x, y, this one is {list(polygon)[:8]}.")
        corners = np.asarray(polygon, np.float64).reshape(-1, 2)
        way = np.abs(np.diff(corners, axis=0, append=corners[:1])).sum()
        if not (np.abs(corners).max() <= REACH and way <= REACH):  # also where one is no number
            raise ValueError(f"A polygon reaches farther than {REACH:,} pixels, it begins {list(polygon)[:8]}.")
    if not polygons:
        return np.zeros(size, bool)
    runs = coco.frPyObjects([list(map(float, polygon)) for polygon in polygons], *size)
    return coco.decode(coco.merge(runs)).astype(bool)


def outlined_polygon(corners: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of a polygon [[x, y], ...] that is filled and outlined, corners on the centres of pixels.

    Coordinates are cut to whole numbers and lines are a pixel wide, as `fillPoly` and `polylines` of OpenCV draw them.

    Raises:
      ValueError: there is no corner, or one that is no pair of numbers of 32 bits.
    """
    points = np.trunc(np.asarray(corners, np.float64))
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not (np.abs(points) < 1 << 31).all():
        raise ValueError(f"A polygon needs corners x, y, this one is {list(corners)[:4]}.")
    mask = fill_polygons([(points + 0.5).ravel().tolist()], size)
    for start, end in zip(points.astype(int), np.roll(points, -1, axis=0).astype(int), strict=True):
        _draw_line(mask, start, end)
    return mask


def _draw_line(mask: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    """Sets the pixels of a line between two points (x, y), drawn from left to right; ties go to the start's side."""
    if start[0] > end[0]:
        start, end = end, start
    step, length = np.sign(end - start), np.abs(end - start)
    long = int(length[1] > length[0])  # the axis along which there is a pixel in every row or column
    limit = mask.shape[1 - long]
    # Only the part inside the picture: a corner may lie far away.
    reach = sorted(((0 - start[long]) * step[long], (limit - 1 - start[long]) * step[long])) if length[long] else (0, 0)
    along = np.arange(max(0, reach[0]), min(length[long], reach[1]) + 1)
    across = (2 * length[1 - long] * along + length[long] - 1) // (2 * length[long]) if length[long] else along
    points = np.empty((len(along), 2), int)
    points[:, long] = start[long] + step[long] * along
    points[:, 1 - long] = start[1 - long] + step[1 - long] * across
    inside = points[((points >= 0) & (points < mask.shape[::-1])).all(axis=1)]
    mask[inside[:, 1], inside[:, 0]] = True


def _pack(counts: list[int]) -> str:
    """COCO's string: differences to the count before the last, five bits per character, low bits first."""
    characters = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            bits = value & 0x1F
            value >>= 5
            more = value != (-1 if bits & 0x10 else 0)
            characters.append(chr(48 + (bits | 0x20 if more else bits)))
    return "".join(characters)


def _unpack(packed: str) -> np.ndarray:
    """The counts int64 of COCO's string."""
    bits = np.frombuffer(packed.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    if ((bits < 0) | (bits >= 64)).any():
        character = packed[int(np.argmax((bits < 0) | (bits >= 64)))]
        raise ValueError(f"{character!r} does not occur in COCO's compressed run lengths.")
    ends = np.flatnonzero(bits & 0x20 == 0)  # the last character of each number
    if len(bits) and (not len(ends) or ends[-1] != len(bits) - 1):
        raise ValueError("The compressed run lengths end in the middle of a number.")
    lengths = np.diff(ends, prepend=-1)
    if lengths.max(initial=0) > 12:  # 60 bits
        raise ValueError("The compressed run lengths hold a number that is too large.")
    places = np.arange(len(bits)) - np.repeat(ends - lengths + 1, lengths)
    counts = np.add.reduceat((bits & 0x1F) << 5 * places, ends - lengths + 1) if len(ends) else ends
    counts -= np.where(bits[ends] & 0x10, np.int64(1) << 5 * lengths, 0)
    for first in (1, 2):  # differences to the count before the last, from the fourth on
        counts[first::2] = np.cumsum(counts[first::2])
    return counts


def _borders(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed rings of corner points (x, y) along the pixel edges, with the inside on the right of the walk.

    Outer borders therefore run clockwise on the screen, borders of holes counter-clockwise. Where two parts touch at
    a corner the walk turns right, which keeps them apart.
    """
    padded = np.pad(mask, 1)
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    starts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # A unit step leaves from (x, y) to the right where the pixel below is inside and the one above is not, and so on.
    for where, offset, step in (
        (inside & ~above, (0, 0), (1, 0)),
        (above & ~inside, (1, 0), (-1, 0)),
        (inside & ~left, (0, 1), (0, -1)),
        (left & ~inside, (0, 0), (0, 1)),
    ):
        for y, x in np.argwhere(where).tolist():
            starts.setdefault((x + offset[0], y + offset[1]), []).append(step)
    rings = []
    while starts:
        origin = point = next(iter(starts))
        step = starts[point][0]
        ring, previous = [], (0, 0)
        while True:
            steps = starts[point]
            right = (-previous[1], previous[0])
            step = right if right in steps else steps[0]
            steps.remove(step)
            if not steps:
                del starts[point]
            if step != previous:
                ring.append(point)
            point, previous = (point[0] + step[0], point[1] + step[1]), step
            if point == origin and (point not in starts or (-step[1], step[0]) not in starts[point]):
                break
        rings.append(ring)
    return rings


def _signed_area(ring: list[tuple[int, int]]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise([*ring, ring[0]])) / 2
