"""Questions about a scene with answers whose named objects carry mask slots, and scenes with questions as a source.

Nothing ambiguous is asked: a group, attribute or colour question needs a definite value for every object of the scene,
a relation needs clear margins, and a name that is asked for alone occurs once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from pixelstory_jax.data.builtin import wording
from pixelstory_jax.data.builtin.scenes import SPLITS, Scene, compose, scene_rng
from pixelstory_jax.data.builtin.things import ATTRIBUTES, COLOURS, Thing, ThingLibrary, builtin_library

KINDS = ("one", "several", "category", "attribute", "relation", "count", "absent", "absent_group", "follow_up")

# How often each kind is asked where nothing else is said.
KIND_WEIGHTS: dict[str, float] = {
    "one": 0.26,
    "several": 0.18,
    "category": 0.14,
    "attribute": 0.12,
    "relation": 0.10,
    "count": 0.06,
    "absent": 0.06,
    "absent_group": 0.02,
    "follow_up": 0.06,
}

SIDE_MARGIN = 0.15  # share of the picture between centres from which "left of" is clear
SIDE_SLACK = 0.04  # objects that are not named must lie at most this far on the asked side
AREA_MARGIN = 1.35  # the largest has at least this many times the area of the next
NEAREST_MARGIN = 0.75  # the nearest is at most this share of the next distance away
MAX_TARGETS = 6
# Backgrounds may show grass, leaves or flowers out of focus: their absence is never claimed.
_NEVER_ABSENT_GROUPS = frozenset({"plant", "flower"})


@dataclasses.dataclass(frozen=True)
class Question:
    """One turn of a conversation.

    answer: text pieces and ints; int k is the mask slot of scene object k and follows the phrase that names it, e.g.
    ("The apple ", 2, " and the car ", 0, "."). plain_answer is the same in words only. targets are the ints of the
    answer in order; an answer about something that is not there has none.
    """

    kind: str
    text: str
    answer: tuple[str | int, ...]
    plain_answer: str
    targets: tuple[int, ...]


Conversation = tuple[Question, ...]


def question(kind: str, text: str, answer: Sequence[str | int]) -> Question:
    """A question whose plain answer and targets are read off the answer."""
    targets = tuple(piece for piece in answer if isinstance(piece, int))
    return Question(kind, text, tuple(answer), wording.plain(answer), targets)


def ask(
    scene: Scene,
    kind: str,
    rng: np.random.Generator,
    absent_from: Sequence[Thing] = (),
) -> Conversation | None:
    """Draws a conversation of the given kind about a scene, or None where the scene does not allow one.

    Args:
      scene: with at least one object.
      kind: one of ``KINDS``; "follow_up" gives two turns, the others one. "absent_group" asks for a group or attribute
        that nothing has. It is only safe where all that can be seen is in ``scene.things``: a photo of a person has
        shoes without an annotation.
      rng: decides object, template and wording.
      absent_from: names that "absent" may ask for; those in the scene, or confusable with one, are left out.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of question {kind!r}, expected one of {', '.join(KINDS)}")
    if not scene.things:
        return None
    if kind == "follow_up":
        return _ask_two_turns(scene, rng, absent_from)
    turn = ask_absent(scene, rng, absent_from) if kind == "absent" else _ONE_TURN[kind](scene, rng)
    return None if turn is None else (turn,)


# Facts that hold clearly.


def unique_objects(scene: Scene) -> list[int]:
    """Objects whose name occurs once."""
    return [number for number, name in enumerate(scene.names) if scene.names.count(name) == 1]


def left_to_right(scene: Scene, members: Collection[int]) -> list[int]:
    return sorted(members, key=lambda number: float(scene.centres[number, 0]))


def members(values: Sequence[bool | None]) -> list[int] | None:
    """The objects for which a fact is true, or None where it is debatable for any object."""
    return None if any(value is None for value in values) else [n for n, value in enumerate(values) if value]


def group_members(scene: Scene, group: str) -> list[int] | None:
    return members([thing.belongs(group) for thing in scene.things])


def attribute_members(scene: Scene, attribute: str) -> list[int] | None:
    return members([thing.has(attribute) for thing in scene.things])


def colour_members(scene: Scene, colour: str) -> list[int] | None:
    return members([thing.is_coloured(colour) for thing in scene.things])


def extreme(scene: Scene, what: str, among: Collection[int] | None = None) -> int | None:
    """The largest, smallest, leftmost, rightmost, highest or lowest object by a clear margin, or None."""
    among = list(range(len(scene.things))) if among is None else list(among)
    if len(among) < 2:
        return None
    if what in ("largest", "smallest"):
        values, margin = np.log(scene.areas.astype(np.float64)), np.log(AREA_MARGIN)
        sign = 1.0 if what == "largest" else -1.0
    else:
        axis, sign = {"leftmost": (0, -1.0), "rightmost": (0, 1.0), "highest": (1, -1.0), "lowest": (1, 1.0)}[what]
        values, margin = scene.centres[:, axis].astype(np.float64), SIDE_MARGIN * _extent(scene)[axis]
    ranked = sorted(among, key=lambda number: -sign * values[number])
    clear = sign * (values[ranked[0]] - values[ranked[1]]) > margin
    return ranked[0] if clear else None


def beside(scene: Scene, side: str, reference: int) -> list[int] | None:
    """Objects clearly left of, right of, above or below another (or the nearest one); None where it is not clear.

    An empty list means that nothing lies on that side.
    """
    offsets = scene.centres - scene.centres[reference]
    others = [number for number in range(len(scene.things)) if number != reference]
    if side == "nearest":
        distances = sorted((float(np.hypot(*offsets[number])), number) for number in others)
        if len(distances) < 2 or distances[0][0] > NEAREST_MARGIN * distances[1][0]:
            return None
        return [distances[0][1]]
    axis, sign = {"left": (0, -1.0), "right": (0, 1.0), "above": (1, -1.0), "below": (1, 1.0)}[side]
    shares = {number: sign * float(offsets[number, axis]) / _extent(scene)[axis] for number in others}
    if any(SIDE_SLACK < share <= SIDE_MARGIN for share in shares.values()):
        return None
    return [number for number in others if shares[number] > SIDE_MARGIN]


def _extent(scene: Scene) -> tuple[int, int]:
    return scene.image.shape[1], scene.image.shape[0]


# One function a kind.


def _answer(scene: Scene, rng: np.random.Generator, targets: Sequence[int]) -> tuple[str | int, ...]:
    frame = wording.pick_weighted(rng, wording.ANSWERS)
    return wording.with_slots(frame, [scene.things[target] for target in targets], targets)


def _one(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = unique_objects(scene)
    return _one_about(scene, rng, unique[rng.integers(len(unique))]) if unique else None


def _one_about(scene: Scene, rng: np.random.Generator, target: int) -> Question:
    thing = scene.things[target]
    if rng.random() < 0.15:
        answer = wording.with_slots(wording.pick_weighted(rng, wording.YES_ANSWERS), [thing], [target])
        return question("one", wording.fill(wording.pick(rng, wording.YES_NO), thing), answer)
    return question("one", wording.fill(wording.pick(rng, wording.ONE), thing), _answer(scene, rng, [target]))


def _several(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = unique_objects(scene)
    if len(unique) < 2:
        return None
    count = 3 if len(unique) > 2 and rng.random() < 0.4 else 2
    targets = [int(number) for number in rng.permutation(unique)[:count]]
    names = wording.listed([f"the {scene.things[target].name}" for target in targets])
    text = wording.pick(rng, wording.SEVERAL).format(list=names)
    return question("several", text, _answer(scene, rng, targets))


def _category(scene: Scene, rng: np.random.Generator) -> Question | None:
    chosen = _pick_members(scene, rng, tuple(wording.GROUPS), group_members)
    if chosen is None:
        return None
    group, targets = chosen
    singular, plural = wording.GROUPS[group]
    text = wording.pick(rng, wording.CATEGORY).format(s=singular, p=plural)
    return question("category", text, _answer(scene, rng, targets))


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_colour = _pick_members(scene, rng, COLOURS, colour_members)
    chosen = _pick_members(scene, rng, ATTRIBUTES, attribute_members)
    if by_colour is not None and (chosen is None or rng.random() < 0.4):
        text = wording.pick(rng, wording.COLOUR).format(colour=by_colour[0])
        return question("attribute", text, _answer(scene, rng, by_colour[1]))
    if chosen is None:
        return None
    return question("attribute", wording.pick(rng, wording.ATTRIBUTES[chosen[0]][0]), _answer(scene, rng, chosen[1]))


def _pick_members(
    scene: Scene,
    rng: np.random.Generator,
    choices: Sequence[str],
    find: Callable[[Scene, str], list[int] | None],
) -> tuple[str, list[int]] | None:
    """A random group, attribute or colour with members in the scene, and these from left to right."""
    for place in rng.permutation(len(choices)):
        found = find(scene, choices[place])
        if found and len(found) <= MAX_TARGETS:
            return choices[place], left_to_right(scene, found)
    return None


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.things) < 2:
        return None
    names = tuple(wording.RELATION)
    unique = unique_objects(scene)
    for place in rng.permutation(len(names)):
        relation = names[place]
        if relation in wording.FOLLOW_RELATION:
            for reference in rng.permutation(unique):
                found = beside(scene, relation, int(reference))
                if found and len(found) <= 3:
                    text = wording.fill(wording.pick(rng, wording.RELATION[relation]), scene.things[reference])
                    return question("relation", text, _answer(scene, rng, left_to_right(scene, found)))
        else:
            target = extreme(scene, relation)
            if target is not None:
                return question(
                    "relation", wording.pick(rng, wording.RELATION[relation]), _answer(scene, rng, [target])
                )
    return None


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    options: list[tuple[str, list[int]]] = []
    for group in wording.GROUPS:
        found = group_members(scene, group)
        # "The jeans" and "the grapes" are not one thing each.
        if found and all(scene.things[number].number == "count" for number in found):
            options.append((wording.counted(group), found))
    for thing in {thing.name: thing for thing in scene.things}.values():
        if thing.number == "count":
            same = [number for number, name in enumerate(scene.names) if name == thing.name]
            # A name that occurs twice is the more telling question.
            options += [(thing.plural, same)] * (3 if len(same) > 1 else 1)
    if all(thing.number == "count" for thing in scene.things):
        options.append(("things", list(range(len(scene.things)))))
    options = [option for option in options if len(option[1]) <= MAX_TARGETS]
    if not options:
        return None
    plural, found = options[rng.integers(len(options))]
    targets = left_to_right(scene, found)
    number = wording.NUMBER_WORDS[len(targets)]
    answer = wording.with_slots(
        wording.pick_weighted(rng, wording.COUNT_ANSWERS),
        [scene.things[target] for target in targets],
        targets,
        be="is" if len(targets) == 1 else "are",
        number=number,
        Number=number.capitalize(),
    )
    return question("count", wording.pick(rng, wording.COUNT).format(p=plural), answer)


# What is not there.


def ask_absent(scene: Scene, rng: np.random.Generator, absent_from: Sequence[Thing]) -> Question | None:
    """A question about a name that is not in the scene."""
    thing = absent_thing(scene, rng, absent_from)
    return None if thing is None else _absent_about(rng, thing)


def _absent_about(rng: np.random.Generator, thing: Thing) -> Question:
    frame = wording.pick_weighted(rng, wording.ABSENT_ANSWERS)
    answer = wording.fill(frame, thing)
    draw = rng.random()
    if draw < 0.12 and thing.number == "count":
        text = wording.pick(rng, wording.COUNT).format(p=thing.plural)
        return question("absent", text, (frame.format(be="are", c=thing.plural),))
    if draw < 0.3:
        text, prefix = wording.pick(rng, wording.YES_NO), "No, t" if rng.random() < 0.7 else "T"
        return question("absent", wording.fill(text, thing), (prefix + answer[1:],))
    return question("absent", wording.fill(wording.pick(rng, wording.ONE), thing), (answer,))


def absent_thing(scene: Scene, rng: np.random.Generator, absent_from: Sequence[Thing]) -> Thing | None:
    """A thing that is not in the scene and cannot be confused with one that is; half the time of a category there."""
    absent = [thing for thing in absent_from if not any(thing.confusable(other) for other in scene.things)]
    if not absent:
        return None
    if rng.random() < 0.5:
        categories = {thing.category for thing in scene.things}
        absent = [thing for thing in absent if thing.category in categories] or absent
    return absent[rng.integers(len(absent))]


def ask_absent_group(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question about a group or attribute that nothing in the scene has."""
    ask_first, ask_else = (_no_member, _no_bearer) if rng.random() < 0.6 else (_no_bearer, _no_member)
    return ask_first(scene, rng) or ask_else(scene, rng)


def _no_member(scene: Scene, rng: np.random.Generator) -> Question | None:
    groups = [group for group in wording.GROUPS if group not in _NEVER_ABSENT_GROUPS]
    absent = [group for group in groups if group_members(scene, group) == []]
    if not absent:
        return None
    group = absent[rng.integers(len(absent))]
    singular, plural = wording.GROUPS[group]
    templates: Sequence[str] = wording.CATEGORY
    if rng.random() >= 0.7:
        templates, plural = wording.COUNT, wording.counted(group)
    text = wording.pick(rng, templates).format(s=singular, p=plural)
    answer = wording.pick_weighted(rng, wording.ABSENT_ANSWERS).format(be="are", c=plural)
    return question("absent_group", text, (answer,))


def _no_bearer(scene: Scene, rng: np.random.Generator) -> Question | None:
    absent = [name for name in ATTRIBUTES if name != "grows" and attribute_members(scene, name) == []]
    if not absent:
        return None
    texts, answer = wording.ATTRIBUTES[absent[rng.integers(len(absent))]]
    return question("absent_group", wording.pick(rng, texts), (answer,))


_ONE_TURN: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "one": _one,
    "several": _several,
    "category": _category,
    "attribute": _attribute,
    "relation": _relation,
    "count": _count,
    "absent_group": ask_absent_group,
}

GROUP_SHARE = 0.4  # of the presence questions that ask for groups, attributes and numbers


def ask_presence(scene: Scene, rng: np.random.Generator, absent_from: Sequence[Thing], turns: int) -> Conversation:
    """Up to `turns` questions about names, groups and attributes, of which about half are not in the scene.

    No text and no single name is asked twice.
    """
    present = [int(number) for number in rng.permutation(unique_objects(scene))]
    absent = list(absent_from)
    asked: dict[str, Question] = {}
    for _ in range(turns):
        there, group = rng.random() < 0.55, rng.random() < GROUP_SHARE  # present names run out first
        if group:
            kinds = ("category", "attribute", "count") if there else ("absent_group",)
            turn = _ONE_TURN[kinds[rng.integers(len(kinds))]](scene, rng)
        elif there and present:
            turn = _one_about(scene, rng, present.pop())
        else:
            thing = absent_thing(scene, rng, absent)
            absent = [other for other in absent if other is not thing]
            turn = None if thing is None else _absent_about(rng, thing)
        if turn is not None:
            asked.setdefault(turn.text, turn)
    return tuple(asked.values())


# Two turns.


def _ask_two_turns(scene: Scene, rng: np.random.Generator, absent_from: Sequence[Thing]) -> Conversation | None:
    for kind in rng.permutation(("one", "several", "category", "attribute", "count")):
        first = _ONE_TURN[str(kind)](scene, rng)
        if first is None:
            continue
        second = _second_turn(scene, first, rng, absent_from)
        if second is not None:
            return first, second
    return None


def _second_turn(
    scene: Scene, first: Question, rng: np.random.Generator, absent_from: Sequence[Thing]
) -> Question | None:
    """A turn that can only be understood after the first one; single targets and lists lead to different ones."""
    if rng.random() < 0.12:
        thing = absent_thing(scene, rng, absent_from)
        if thing is not None:
            text = wording.fill(wording.pick(rng, wording.FOLLOW_NAME), thing)
            answer = wording.fill(wording.pick_weighted(rng, wording.ABSENT_ANSWERS), thing)
            return question("follow_up", text, (answer,))
    named = [number for number in unique_objects(scene) if number not in first.targets]
    if named and rng.random() < 0.25:
        target = named[rng.integers(len(named))]
        text = wording.fill(wording.pick(rng, wording.FOLLOW_NAME), scene.things[target])
        return question("follow_up", text, _answer(scene, rng, [target]))
    if len(first.targets) > 1:
        return _narrow_down(scene, first.targets, rng)
    if len(first.targets) == 1:
        return _relate_to(scene, first.targets[0], rng)
    return None


def _narrow_down(scene: Scene, among: Sequence[int], rng: np.random.Generator) -> Question | None:
    coloured = [(number, scene.things[number].colour) for number in among if scene.things[number].colour]
    for number, colour in coloured:
        alone = [scene.things[other].is_coloured(colour) for other in among if other != number]
        if all(value is False for value in alone) and rng.random() < 0.5:
            text = wording.pick(rng, wording.FOLLOW_COLOUR).format(colour=colour)
            return question("follow_up", text, _answer(scene, rng, [number]))
    names = tuple(wording.FOLLOW_SUPERLATIVE)
    for place in rng.permutation(len(names)):
        target = extreme(scene, names[place], among)
        if target is not None:
            text = wording.pick(rng, wording.FOLLOW_SUPERLATIVE[names[place]])
            return question("follow_up", text, _answer(scene, rng, [target]))
    return None


def _relate_to(scene: Scene, reference: int, rng: np.random.Generator) -> Question | None:
    names = tuple(wording.FOLLOW_RELATION)
    for place in rng.permutation(len(names)):
        found = beside(scene, names[place], reference)
        if found and len(found) <= 3:
            text = wording.fill(wording.pick(rng, wording.FOLLOW_RELATION[names[place]]), scene.things[reference])
            return question("follow_up", text, _answer(scene, rng, left_to_right(scene, found)))
    return None


# Scenes with their questions.


class AskedScenes:
    """Example i is a pure function of (seed, split, i) and of the arguments below.

    Args:
      seed: of the data set.
      split: "train", "test" or "unseen".
      size: long side of the pictures in pixels.
      conversations: how many conversations a scene gets; fewer only where the scene allows no more.
      kinds: kind of question to its relative frequency; kinds left out are not asked. ``KIND_WEIGHTS`` by default.
      library: the things; the embedded ones by default.
      length: number of examples; scenes are made when asked for.

    Raises:
      ValueError: an argument is out of range or a kind is unknown.
    """

    def __init__(
        self,
        *,
        seed: int,
        split: str,
        size: int = 128,
        conversations: int = 4,
        kinds: Mapping[str, float] | None = None,
        library: ThingLibrary | None = None,
        length: int = 10_000_000,
    ):
        weights = dict(KIND_WEIGHTS if kinds is None else kinds)
        unknown = sorted(set(weights) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown kind of question {unknown[0]!r}, expected one of {', '.join(KINDS)}")
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
            raise ValueError("the weights of the kinds of question must be non-negative with a positive sum")
        if length < 1 or conversations < 1:
            raise ValueError(f"length and conversations must be positive, got {length} and {conversations}")
        self.seed, self.split, self.length, self.size = seed, split, length, size
        self.conversations = conversations
        self.kinds = tuple(kind for kind in KINDS if weights.get(kind, 0) > 0)
        total = sum(weights[kind] for kind in self.kinds)
        self.probabilities = np.array([weights[kind] / total for kind in self.kinds])
        self.library = library or builtin_library()
        # Absence may be claimed of trained names, and in the unseen split of all.
        splits = ("train", "unseen") if split == "unseen" else ("train",)
        self.absent_from = tuple(thing for thing in self.library.things if thing.split in splits)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"AskedScenes(seed={self.seed}, split={self.split}, length={self.length}, size={self.size})"

    def __getitem__(self, index: int) -> tuple[Scene, tuple[Conversation, ...]]:
        """Scene and conversations number ``index``.

        Raises:
          IndexError: the index is not in 0..length-1.
        """
        index = int(index)
        if not 0 <= index < self.length:
            raise IndexError(f"example {index} of a source of {self.length}")
        scene = compose(self.seed, index, self.split, size=self.size, library=self.library)
        return scene, self.converse(scene, scene_rng(self.seed, index, self.split, "questions"))

    def converse(self, scene: Scene, rng: np.random.Generator) -> tuple[Conversation, ...]:
        """Draws conversations about a scene; no first question is asked twice."""
        found: list[Conversation] = []
        asked: set[str] = set()
        for _ in range(4 * self.conversations):
            if len(found) == self.conversations:
                break
            kind = self.kinds[int(rng.choice(len(self.kinds), p=self.probabilities))]
            conversation = ask(scene, kind, rng, self.absent_from)
            if conversation is not None and conversation[0].text not in asked:
                asked.add(conversation[0].text)
                found.append(conversation)
        return tuple(found)
