"""Questions: every answer is checked against the scene by other means than those that made it."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from pixelstory_jax.data.builtin import KINDS, AskedScenes, Question, ask, compose, wording
from pixelstory_jax.data.builtin.questions import (
    ask_presence,
    attribute_members,
    beside,
    colour_members,
    extreme,
    group_members,
)
from pixelstory_jax.data.builtin.scenes import Scene, boxes_of
from pixelstory_jax.data.builtin.things import COLOURS, Thing, builtin_library

LIBRARY = builtin_library()
TRAINED = tuple(thing for thing in LIBRARY.things if thing.split == "train")
BY_NAME = {thing.name: thing for thing in LIBRARY.things}
SCENES = [compose(8, index, "test") for index in range(150)]


def conversations(kind: str):
    for number, scene in enumerate(SCENES):
        for draw in range(3):
            conversation = ask(scene, kind, np.random.default_rng((number, draw)), TRAINED)
            if conversation is not None:
                yield scene, conversation


def scene_of(names: list[str], boxes: list[tuple[int, int, int, int]], side: int = 100) -> Scene:
    """A scene of rectangles, for exact geometry."""
    masks = np.zeros((len(names), side, side), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return Scene(np.zeros((side, side, 3), np.uint8), masks, boxes_of(masks), tuple(BY_NAME[name] for name in names))


def check_form(scene: Scene, turn: Question) -> None:
    """Each slot follows the name of its object; the words alone are a clean sentence."""
    assert turn.targets == tuple(piece for piece in turn.answer if isinstance(piece, int))
    assert len(set(turn.targets)) == len(turn.targets)
    for position, piece in enumerate(turn.answer):
        if isinstance(piece, int):
            before = turn.answer[position - 1]
            assert isinstance(before, str)
            assert before.lower().endswith(f"the {scene.names[piece]} ")
    assert turn.plain_answer[0].isupper() and turn.plain_answer[-1] == "."
    assert not re.search(r"  | [.,:]|\x00|[{}]", turn.plain_answer + turn.text)
    assert turn.text[0].isupper() and turn.text[-1] in ".?"
    assert len(turn.text.split()) <= 18


@pytest.mark.parametrize("kind", KINDS)
def test_form_variety_and_frequency(kind):
    seen = list(conversations(kind))
    assert len(seen) > 3 * len(SCENES) * 0.75
    for scene, conversation in seen:
        assert len(conversation) == (2 if kind == "follow_up" else 1)
        assert conversation[-1].kind == kind
        for turn in conversation:
            check_form(scene, turn)
    wordings = collections.Counter()
    names = sorted({thing.name for thing in LIBRARY.things} | {t.plural for t in LIBRARY.things}, key=len, reverse=True)
    for _, conversation in seen:
        wordings[re.sub("|".join(map(re.escape, names)), "_", conversation[-1].text)] += 1
    assert len(wordings) >= 8
    assert wordings.most_common(1)[0][1] < 0.4 * len(seen)


def test_one_and_several_name_unique_objects_in_the_order_of_the_question():
    for kind in ("one", "several"):
        for scene, (turn,) in conversations(kind):
            names = [scene.names[target] for target in turn.targets]
            assert len(names) == 1 if kind == "one" else 2 <= len(names) <= 3
            assert all(scene.names.count(name) == 1 for name in names)
            places = [re.search(rf"\b(the|an?|any|there|see) {re.escape(name)}\b", turn.text) for name in names]
            assert all(places), turn.text
            starts = [place.start() for place in places if place]
            assert starts == sorted(starts)


def test_category_answers_are_exactly_the_members_from_left_to_right():
    phrases = {phrase: group for group, pair in wording.GROUPS.items() for phrase in pair}
    for scene, (turn,) in conversations("category"):
        phrase = max((p for p in phrases if re.search(rf"\b{p}\b", turn.text)), key=len)
        values = [thing.belongs(phrases[phrase]) for thing in scene.things]
        assert None not in values
        assert {number for number, value in enumerate(values) if value} == set(turn.targets) != set()
        assert sorted(turn.targets, key=lambda number: scene.centres[number, 0]) == list(turn.targets)


def test_attribute_answers_are_exactly_the_members():
    asked = {text: name for name, (texts, _) in wording.ATTRIBUTES.items() for text in texts}
    kinds = set()
    for scene, (turn,) in conversations("attribute"):
        if turn.text in asked:
            values = [thing.has(asked[turn.text]) for thing in scene.things]
            kinds.add(asked[turn.text])
        else:
            colour = next(colour for colour in COLOURS if colour in turn.text)
            values = [thing.is_coloured(colour) for thing in scene.things]
            kinds.add(colour)
        assert None not in values
        assert {number for number, value in enumerate(values) if value} == set(turn.targets) != set()
    assert len(kinds & set(COLOURS)) >= 4 and len(kinds - set(COLOURS)) >= 7


def test_count_answers_say_the_number_of_masks():
    words = {word: number for number, word in enumerate(wording.NUMBER_WORDS)}
    counts = collections.Counter()
    for scene, (turn,) in conversations("count"):
        said = next(words[word] for word in re.findall(r"[a-z]+", turn.plain_answer.lower()) if word in words)
        assert said == len(turn.targets)
        for name in {scene.names[target] for target in turn.targets}:
            everyone = {number for number, other in enumerate(scene.names) if other == name}
            assert everyone <= set(turn.targets)
        counts[said] += 1
    assert set(counts) >= {1, 2, 3}


def test_absent_things_are_absent():
    for scene, (turn,) in conversations("absent"):
        assert turn.targets == () and len(turn.answer) == 1
        assert re.search(r"\bno\b|[Nn]othing", turn.plain_answer), turn.plain_answer
        for name in scene.names:
            plural = BY_NAME[name].plural
            assert not re.search(rf"\bno ({re.escape(name)}|{re.escape(plural)}) (in|here)\b", turn.plain_answer)
        match = re.search(r"no ([\w -]+?) (?:in this picture|here)\.", turn.plain_answer)
        if match and match[1] in BY_NAME:
            thing = BY_NAME[match[1]]
            assert thing.split == "train"
            assert not any(thing.confusable(other) for other in scene.things)


def test_presence_asks_for_present_and_absent_names_in_turn():
    kinds = collections.Counter()
    for number, scene in enumerate(SCENES):
        conversation = ask_presence(scene, np.random.default_rng(number), TRAINED, turns=4)
        assert len(conversation) == 4
        asked = []
        for turn in conversation:
            kinds[turn.kind] += 1
            if turn.kind == "one":
                assert scene.names.count(scene.names[turn.targets[0]]) == 1
                asked.append(scene.names[turn.targets[0]])
            else:
                asked.append(re.search(r"no ([\w -]+?) (?:in this picture|here)\.", turn.plain_answer)[1])
                assert asked[-1] not in scene.names
        assert len(set(asked)) == 4
    assert 0.35 < kinds["one"] / sum(kinds.values()) < 0.65


def test_absent_groups_can_be_switched_off():
    trained = {thing.name for thing in TRAINED} | {thing.plural for thing in TRAINED}
    for number, scene in enumerate(SCENES):
        (turn,) = ask(scene, "absent", np.random.default_rng(number), TRAINED, absent_groups=False) or ()
        match = re.search(r"no ([\w -]+?) (?:in this picture|here)\.", turn.plain_answer)
        assert match and match[1] in trained


def test_plural_names_take_plural_verbs():
    scene = scene_of(["scissors", "apple"], [(0, 0, 30, 30), (60, 60, 90, 90)])
    texts = set()
    for draw in range(60):
        (turn,) = ask(scene, "one", np.random.default_rng(draw)) or ()
        texts.add(turn.text + " " + turn.plain_answer)
    assert any("Where are the scissors?" in text for text in texts)
    assert not any(re.search(r"is the scissors|the scissors is|a scissors|are the apple\b", text) for text in texts)


def test_relations_are_clear_or_not_asked():
    names = ["apple", "car", "dog"]
    scene = scene_of(names, [(0, 40, 20, 60), (40, 40, 60, 60), (80, 40, 100, 60)])
    assert beside(scene, "left", 1) == [0] and beside(scene, "right", 1) == [2]
    assert beside(scene, "right", 0) == [1, 2] and beside(scene, "left", 0) == []
    assert beside(scene, "nearest", 1) is None
    assert extreme(scene, "leftmost") == 0 and extreme(scene, "rightmost") == 2
    assert extreme(scene, "largest") is None and extreme(scene, "highest") is None
    scene = scene_of(names, [(0, 0, 20, 20), (10, 0, 30, 20), (40, 50, 90, 100)])
    assert beside(scene, "left", 1) is None  # 10 % of the width is neither left nor level
    assert beside(scene, "below", 0) == [2] and beside(scene, "above", 2) == [0, 1]
    assert beside(scene, "nearest", 0) == [1]
    assert extreme(scene, "largest") == 2 and extreme(scene, "smallest") is None
    assert extreme(scene, "largest", [0]) is None


def test_relation_answers_hold_in_the_scene():
    sides = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1), "higher": (1, -1), "lower": (1, 1)}
    for scene, (turn,) in conversations("relation"):
        size = scene.image.shape[1::-1]
        side = next((word for word in sides if re.search(rf"\b{word}\b(?!most)", turn.text)), None)
        reference = [number for number, name in enumerate(scene.names) if f"the {name}" in turn.text]
        if side and reference and "farthest" not in turn.text:
            longest = max(reference, key=lambda number: len(scene.names[number]))
            axis, sign = sides[side]
            for number in range(len(scene.things)):
                offset = sign * (scene.centres[number, axis] - scene.centres[longest, axis]) / size[axis]
                assert (offset > 0.15) == (number in turn.targets), turn.text
        elif "largest" in turn.text or "biggest" in turn.text:
            assert turn.targets == (int(np.argmax(scene.areas)),)
        elif "smallest" in turn.text:
            assert turn.targets == (int(np.argmin(scene.areas)),)


def test_second_turns_refer_to_the_first():
    seen = collections.Counter()
    for scene, (first, second) in conversations("follow_up"):
        if re.search(r"[Ww]hich( one)? of|only the", second.text):
            assert len(first.targets) > 1 and len(second.targets) == 1 and set(second.targets) < set(first.targets)
            seen["narrow"] += 1
        elif re.search(r"\b(it|them)\?", second.text):
            assert len(first.targets) == 1 and not set(first.targets) & set(second.targets)
            seen["relate"] += 1
        else:
            names = {scene.names[target] for target in second.targets}
            assert all(name in second.text for name in names)
            seen["absent" if not second.targets else "name"] += 1
    assert min(seen[kind] for kind in ("narrow", "relate", "absent", "name")) > 10


def test_members_are_none_where_debatable():
    unclear = Thing(name="mystery", plural="mysteries", doubtful_groups=frozenset({"food"}))
    scene = scene_of(["apple", "dog"], [(0, 0, 30, 30), (60, 60, 90, 90)])
    assert group_members(scene, "food") == [0] and attribute_members(scene, "has_legs") == [1]
    assert colour_members(scene, "blue") == []
    doubtful = Scene(scene.image, scene.masks, scene.boxes, (scene.things[0], unclear))
    assert group_members(doubtful, "food") is None and attribute_members(doubtful, "edible") is None
    assert colour_members(doubtful, "red") is None and group_members(doubtful, "tool") == []


def test_scenes_that_allow_no_question():
    alone = scene_of(["apple"], [(0, 0, 30, 30)])
    rng = np.random.default_rng(0)
    assert ask(alone, "several", rng) is None and ask(alone, "relation", rng) is None
    assert ask(alone, "absent", rng, [BY_NAME["apple"]], absent_groups=False) is None
    twins = scene_of(["apple", "apple"], [(0, 0, 30, 30), (60, 60, 90, 90)])
    assert ask(twins, "one", rng) is None and ask(twins, "several", rng) is None
    empty = Scene(alone.image, alone.masks[:0], alone.boxes[:0], ())
    assert all(ask(empty, kind, rng, TRAINED) is None for kind in KINDS)
    with pytest.raises(ValueError, match="unknown kind of question 'riddle'"):
        ask(alone, "riddle", rng)


def test_source_is_a_function_of_seed_split_and_index():
    source, again = (AskedScenes(seed=4, split="train", conversations=3) for _ in range(2))
    for index in (5, 0, 9_999_999):
        scene, asked = source[index]
        other, repeated = again[index]
        assert scene.image.tobytes() == other.image.tobytes() and asked == repeated
        assert 1 <= len(asked) <= 3
    assert source[5][1] != AskedScenes(seed=5, split="train", conversations=3)[5][1]
    assert len(source) == 10_000_000 and "seed=4" in repr(source)


def test_source_asks_the_wanted_kinds_and_never_twice_the_same():
    source = AskedScenes(seed=1, split="unseen", conversations=6, kinds={"one": 1, "absent": 3, "count": 0}, length=50)
    counts = collections.Counter()
    for index in range(len(source)):
        _, asked = source[index]
        assert len({conversation[0].text for conversation in asked}) == len(asked)
        counts.update(turn.kind for conversation in asked for turn in conversation)
    assert set(counts) == {"one", "absent"} and counts["absent"] > counts["one"]


def test_unseen_split_claims_absence_of_all_names_but_training_only_of_trained_ones():
    assert {thing.split for thing in AskedScenes(seed=0, split="unseen").absent_from} == {"train", "unseen"}
    assert {thing.split for thing in AskedScenes(seed=0, split="train").absent_from} == {"train"}


def test_training_text_never_holds_an_unseen_name():
    unseen = [thing.name for thing in LIBRARY.things if thing.split == "unseen"]
    source = AskedScenes(seed=2, split="train", conversations=6)
    text = " ".join(turn.text + " " + turn.plain_answer for i in range(80) for c in source[i][1] for turn in c)
    assert not [name for name in unseen if re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "unknown split"),
        ({"kinds": {"riddle": 1}}, "unknown kind"),
        ({"kinds": {"one": 0}}, "positive sum"),
        ({"kinds": {"one": -1, "several": 3}}, "non-negative"),
        ({"length": 0}, "positive"),
        ({"conversations": 0}, "positive"),
    ],
)
def test_source_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        AskedScenes(**{"seed": 0, "split": "train", **arguments})


def test_source_ends():
    source = AskedScenes(seed=0, split="test", length=3)
    with pytest.raises(IndexError):
        source[3]
    with pytest.raises(IndexError):
        source[-1]
