"""Words for one instance that fit no other thing in its picture: "the dog", "the cup on the left", "the third chair
from the left", "the larger boat"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixelstory_jax.data.muse.knowledge import kind_of
from pixelstory_jax.data.muse.pictures import Instance, Picture
from pixelstory_jax.data.muse.words import names_in

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
GAP = 0.05  # of the picture's side: centres that are closer have no order
SIZE_RATIO = 1.5  # of two areas that people see to be different
EDGE = 0.3  # of the picture's side: what has its centre there is on the left, at the top


def describe(picture: Picture, rng: np.random.Generator, placed_share: float) -> list[str | None]:
    """A phrase for each instance, None where there is no plain one.

    None too where the picture shows more things of that name than are annotated clearly, and where one name could be
    taken for another one ("dog" beside "hot dog", "person" beside "man"). Of the things that their name alone tells,
    `placed_share` are told where they are all the same ("the dog in the lower left corner").
    """
    phrases: list[str | None] = [None] * len(picture.instances)
    names = {instance.name for instance in picture.instances}
    for name in sorted(names - picture.unclear):
        numbers = [number for number, instance in enumerate(picture.instances) if instance.name == name]
        if name in picture.unclear or any(
            name != other and _confusable(name, other) for other in names | picture.unclear
        ):
            continue
        if len(numbers) == 1:
            place = _place(picture, picture.instances[numbers[0]]) if rng.random() < placed_share else ""
            phrases[numbers[0]] = f"the {name}{place}"
        elif not kind_of(name).is_plural:
            for number, phrase in zip(numbers, _several(picture, numbers), strict=True):
                phrases[number] = phrase
    return phrases


def is_ordered(values: Sequence[float], gap: float) -> bool:
    """Whether each value is larger than the one before by at least `gap`."""
    return all(b - a >= gap for a, b in zip(values, values[1:], strict=False))


def _confusable(name: str, other: str) -> bool:
    """Whether a thing of the other name could be meant as well."""
    is_related = kind_of(name).family and kind_of(name).family == kind_of(other).family
    return bool(is_related or names_in(other, [name]) or set(name.split()[-1:]) & set(other.split()[-1:]))


def _place(picture: Picture, instance: Instance) -> str:
    """Where a small thing near the border is, else ""."""
    x, y = instance.centre[0] / picture.width, instance.centre[1] / picture.height
    if instance.box[2] > 0.4 * picture.width or instance.box[3] > 0.4 * picture.height:
        return ""
    across = "left" if x < EDGE else "right" if x > 1 - EDGE else ""
    down = "upper" if y < EDGE else "lower" if y > 1 - EDGE else ""
    if across and down:
        return f" in the {down} {across} corner"
    if across:
        return f" on the {across}"
    return {"upper": " near the top", "lower": " near the bottom", "": ""}[down]


def _several(picture: Picture, numbers: Sequence[int]) -> list[str | None]:
    """Phrases for the things of one name: by their order across, else down, else by size."""
    chosen = [picture.instances[number] for number in numbers]
    name, count = chosen[0].name, len(chosen)
    words: Sequence[str]
    for axis, side in ((0, picture.width), (1, picture.height)):
        order = sorted(range(count), key=lambda i: chosen[i].centre[axis])
        if not is_ordered([chosen[i].centre[axis] for i in order], GAP * side) or count > len(ORDINALS):
            continue
        if count == 2:
            words = (f"the {name} on the left", f"the {name} on the right")
            words = words if axis == 0 else (f"the upper {name}", f"the lower {name}")
        else:
            start = ("from the left", "from the top")[axis]
            words = [f"the {ordinal} {name} {start}" for ordinal in ORDINALS[:count]]
            ends = (("leftmost", "rightmost"), ("uppermost", "lowest"))[axis]
            words[0], words[-1] = (f"the {end} {name}" for end in ends)
        return [words[order.index(i)] for i in range(count)]
    if count == 2:
        small, large = sorted(chosen, key=lambda instance: instance.area)
        if large.area >= SIZE_RATIO * small.area:
            return [f"the {'larger' if instance is large else 'smaller'} {name}" for instance in chosen]
    return [None] * count


def pick_some(rng: np.random.Generator, numbers: Sequence[int], fewest: int, most: int) -> list[int]:
    """Between `fewest` and `most` of the numbers, in a random order; all of them where there are fewer."""
    count = min(len(numbers), int(rng.integers(fewest, most + 1)))
    return [int(number) for number in rng.permutation(np.asarray(numbers, int))[:count]]
