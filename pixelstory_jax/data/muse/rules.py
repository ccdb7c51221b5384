"""Questions written by rules, from names and boxes alone: no model, the same for the same seed.

What they say is true of the annotations: an order, a size or a distance is only claimed where it is beyond doubt, and a
fact ("can be eaten") is only asked for where it is known of every name in the picture whether it holds.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixelstory_jax.data.builtin.wording import NUMBER_WORDS
from pixelstory_jax.data.muse import rule_wording
from pixelstory_jax.data.muse.describing import GAP, SIZE_RATIO, describe, is_ordered, pick_some
from pixelstory_jax.data.muse.knowledge import kind_of
from pixelstory_jax.data.muse.pair import Mention, Pair
from pixelstory_jax.data.muse.pictures import Picture

GEOMETRY = ("order", "size", "nearest", "half")
PLACED_SHARE = 0.35  # of the things that are unique by their name which are still told where they are
MOST_LISTED = 6  # things that a question lists by name
DISTANCE_RATIO = 1.3  # of two distances that people see to be different


def write_pairs(picture: Picture, count: int, seed: int) -> list[Pair]:
    """Up to `count` pairs of different kinds; fewer where the picture does not give more."""
    digest = zlib.crc32(f"{picture.coco_url} {picture.file_name}".encode())
    rng = np.random.default_rng(np.random.SeedSequence((seed, digest)))
    scene = _Scene(picture, describe(picture, rng, PLACED_SHARE), describe(picture, rng, 0.0), rng)
    chances = [pair for kind in KINDS for pair in kind(scene)]
    # Kinds take turns, so that those with many chances do not crowd out the others; geometry comes in one turn later.
    turns: Counter[str] = Counter(dict.fromkeys(GEOMETRY, 1))
    ranked: list[tuple[int, int, Pair]] = []
    for position in rng.permutation(len(chances)):
        pair = chances[int(position)]
        turns[pair.kind] += 1
        ranked.append((turns[pair.kind], len(ranked), pair))
    return [pair for _, _, pair in sorted(ranked, key=lambda entry: entry[:2])[:count]]


@dataclass(frozen=True)
class _Scene:
    """A picture and the randomness of its questions.

    Attributes:
      phrases: of each instance, or None; bare: the same without places, which would give away what is asked.
    """

    picture: Picture
    phrases: Sequence[str | None]
    bare: Sequence[str | None]
    rng: np.random.Generator

    def some(self, only_unique: bool = False) -> list[int]:
        """From 3 to `MOST_LISTED` instances that have a phrase; those that their name alone tells if there are enough.

        `only_unique`: no others, whose phrases say where they are; none if there are too few.
        """
        names = Counter(instance.name for instance in self.picture.instances)
        described = [number for number, phrase in enumerate(self.bare) if phrase]
        unique = [number for number in described if names[self.picture.instances[number].name] == 1]
        chosen = unique if only_unique or len(unique) > 2 else described
        return pick_some(self.rng, chosen, 3, MOST_LISTED) if len(chosen) > 2 else []

    def pair(
        self, kind: str, wordings: rule_wording.Wordings, *answer: Sequence[int], words: Mapping[str, str] | None = None
    ) -> Pair:
        """A pair of one of the wordings; `answer`: the lists of instances of the answer; `words`: for other braces."""
        question, said = wordings[int(self.rng.integers(len(wordings)))]
        phrases = self.bare if kind in GEOMETRY else self.phrases
        return Pair(question.format(**(words or {})), _filled(said, words or {}, answer, self.picture, phrases), kind)


def _facts(scene: _Scene) -> Iterator[Pair]:
    """All things of which a fact holds."""
    holders = {fact: _holders(scene, fact) for fact in rule_wording.FACTS}
    for fact, wordings in rule_wording.FACTS.items():
        if len(holders[fact]) > 1:
            yield scene.pair("fact", wordings, holders[fact])
    for (first, second), wordings in rule_wording.FACT_PAIRS.items():
        one, two = holders[first], holders[second]
        if one and two and not set(one) & set(two):
            yield scene.pair("two facts", wordings, one, two)


def _holders(scene: _Scene, fact: str) -> list[int]:
    """The instances of which a fact holds; none where that is open for a name in the picture, or one has no phrase."""
    instances = scene.picture.instances
    holds = {name: kind_of(name).facts[fact] for name in {i.name for i in instances} | scene.picture.unclear}
    chosen = [number for number, instance in enumerate(instances) if holds[instance.name]]
    open_questions = None in holds.values() or any(holds[name] for name in scene.picture.unclear)
    is_told = not open_questions and all(scene.phrases[number] for number in chosen)
    return _in_order(scene, chosen) if is_told else []


def _all_of_a_name(scene: _Scene) -> Iterator[Pair]:
    """All things of one name."""
    instances = scene.picture.instances
    for name in sorted({instance.name for instance in instances}):
        numbers = [number for number, instance in enumerate(instances) if instance.name == name]
        if len(numbers) > 1 and all(scene.phrases[number] for number in numbers):
            words = {"plural": kind_of(name).plural, "number": NUMBER_WORDS[len(numbers)]}
            yield scene.pair("count", rule_wording.ALL_OF_A_NAME, _in_order(scene, numbers), words=words)


def _orders(scene: _Scene) -> Iterator[Pair]:
    """A few things from left to right, or from top to bottom: both their centres and where they begin."""
    instances = scene.picture.instances
    for axis, side, wordings in (
        (0, scene.picture.width, rule_wording.LEFT_TO_RIGHT),
        (1, scene.picture.height, rule_wording.TOP_TO_BOTTOM),
    ):
        some = scene.some(only_unique=True)
        if not some:
            return
        ordered = sorted(some, key=lambda number: instances[number].centre[axis])
        centres, starts = zip(
            *((instances[number].centre[axis], instances[number].box[axis]) for number in ordered), strict=True
        )
        if is_ordered(centres, GAP * side) and is_ordered(starts, GAP * side / 2):
            yield scene.pair("order", wordings, ordered, words=_listed_words(scene, some))


def _sizes(scene: _Scene) -> Iterator[Pair]:
    """The largest and the smallest of a few."""
    some = scene.some()
    if not some:
        return
    ordered = sorted(some, key=lambda number: -scene.picture.instances[number].area)
    areas = [scene.picture.instances[number].area for number in ordered]
    if areas[0] >= SIZE_RATIO * areas[1] and areas[-2] >= SIZE_RATIO * areas[-1]:
        words = _listed_words(scene, some)
        yield scene.pair("size", rule_wording.SIZES, ordered[:1], ordered[-1:], words=words)


def _nearest(scene: _Scene) -> Iterator[Pair]:
    """Which of a few is closest to another one: by centres, and by the room between the boxes."""
    some = scene.some()
    if not some:
        return
    start, *others = some
    by_centre, by_gap = (
        sorted((measure(scene.picture, start, other), other) for other in others) for measure in (_distance, _gap)
    )
    nearest = by_centre[0][1]
    is_clear = by_centre[1][0] >= DISTANCE_RATIO * max(by_centre[0][0], 1.0)
    if is_clear and _gap(scene.picture, start, nearest) == by_gap[0][0]:
        words = {"start": scene.bare[start] or "", **_listed_words(scene, others)}
        yield scene.pair("nearest", rule_wording.NEAREST, [start], [nearest], words=words)


def _halves(scene: _Scene) -> Iterator[Pair]:
    """What of a few lies wholly in one half of the picture, where the others clearly do not."""
    width = scene.picture.width
    some = scene.some(only_unique=True)
    for near, far in (("left", "right"), ("right", "left")):
        inside = [number for number in some if _reach(scene, number, near) <= 0.48 * width]
        clear = all(_reach(scene, number, near) >= 0.55 * width for number in some if number not in inside)
        if clear and 1 < len(inside) < len(some):
            words = {"near": near, "far": far, **_listed_words(scene, some)}
            yield scene.pair("half", rule_wording.HALF, inside, words=words)


KINDS: tuple[Callable[[_Scene], Iterator[Pair]], ...] = (_facts, _all_of_a_name, _orders, _sizes, _nearest, _halves)


def _reach(scene: _Scene, number: int, side: str) -> float:
    """How far an instance reaches into the picture, from its left or right border."""
    x, _, width, _ = scene.picture.instances[number].box
    return x + width if side == "left" else scene.picture.width - x


def _in_order(scene: _Scene, numbers: Sequence[int]) -> list[int]:
    """Names from left to right by their first thing, and the things of one name as their phrases count them."""
    instances = scene.picture.instances

    def key(number: int) -> tuple[float, float]:
        same = [other for other in numbers if instances[other].name == instances[number].name]
        is_down = any("from the top" in (scene.bare[other] or "") for other in same)
        return min(instances[other].centre[0] for other in same), instances[number].centre[is_down]

    return sorted(numbers, key=key)


def _distance(picture: Picture, one: int, other: int) -> float:
    """Between the centres, in pixels."""
    return math.dist(picture.instances[one].centre, picture.instances[other].centre)


def _gap(picture: Picture, one: int, other: int) -> float:
    """Between the boxes, in pixels; 0 where they overlap."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = picture.instances[one].box, picture.instances[other].box
    return math.hypot(max(0.0, x1 - x0 - w0, x0 - x1 - w1), max(0.0, y1 - y0 - h0, y0 - y1 - h1))


# Lists in words.


def _listed_words(scene: _Scene, numbers: Sequence[int]) -> dict[str, str]:
    phrases = [str(scene.bare[number]) for number in numbers]
    return {joint: _list_text(phrases, joint) for joint in ("and", "or")}


def _list_text(parts: Sequence[str], joint: str) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {joint} {parts[-1]}"


def _filled(
    template: str,
    words: Mapping[str, str],
    lists: Sequence[Sequence[int]],
    picture: Picture,
    phrases: Sequence[str | None],
) -> tuple[str | Mention, ...]:
    """An answer of `rule_wording`, its braces replaced by mentions and words."""
    parts: list[str | Mention] = []
    for piece in re.split(r"(\{\w+\})", template):
        placed = re.fullmatch(r"\{(and|or|be)(\d?)\}", piece, re.IGNORECASE)
        if not placed:
            parts.append(words[piece[1:-1]] if piece.startswith("{") else piece)
            continue
        numbers = lists[int(placed[2] or 1) - 1]
        if placed[1] == "be":
            is_several = len(numbers) > 1 or kind_of(picture.instances[numbers[0]].name).is_plural
            parts.append("are" if is_several else "is")
        else:
            parts += _mentioned(phrases, numbers, placed[1])
    return _joined(parts)


def _mentioned(phrases: Sequence[str | None], numbers: Sequence[int], joint: str) -> Iterator[str | Mention]:
    """ "a, b and c" of mentions; a joint with a capital, "And" or "Or", stands at the start of a sentence."""
    for place, number in enumerate(numbers):
        if place:
            yield f" {joint.lower()} " if place == len(numbers) - 1 else ", "
        phrase = phrases[number] or ""
        yield Mention(phrase[0].upper() + phrase[1:] if place == 0 and joint[0].isupper() else phrase, number)


def _joined(parts: Sequence[str | Mention]) -> tuple[str | Mention, ...]:
    """Neighbouring texts made one, empty ones left out."""
    joined: list[str | Mention] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)
