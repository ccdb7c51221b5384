"""Questions: every answer is checked against the scene by other means than those that made it."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from pixelstory_jax.data.builtin import KINDS, AskedScenes, Question, ask, compose, wording
from pixelstory_jax.data.builtin.questions import (
    ask_absent_group,
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


def test_only_single_things_are_counted():
    """Grapes are not one fruit, nor jeans one of the clothes; clothes are counted in pieces."""
    texts = set()
    for names in (["grapes", "apple", "jeans", "coat"], ["coat", "shirt", "apple"], ["apple", "car"]):
        scene = scene_of(names, [(20 * number, 0, 20 * number + 15, 30) for number in range(len(names))])
        for draw in range(200):
            (turn,) = ask(scene, "count", np.random.default_rng(draw)) or ()
            assert {scene.things[target].number for target in turn.targets} == {"count"}, turn.text
            texts.add(turn.text)
    for _, (turn,) in conversations("count"):
        texts.add(turn.text)
    assert sum("pieces of clothing" in text for text in texts) > 5
    assert not [text for text in texts if "clothes" in text]


def test_absent_clothes_are_counted_in_pieces(monkeypatch):
    monkeypatch.setattr(wording, "GROUPS", {"clothing": wording.GROUPS["clothing"]})
    scene = scene_of(["apple", "car"], [(0, 0, 30, 30), (60, 60, 90, 90)])
    turns = [ask_absent_group(scene, np.random.default_rng(draw)) for draw in range(300)]
    texts = [turn.text + turn.plain_answer for turn in turns if turn and re.search("cloth", turn.text)]
    counts = [text for text in texts if re.search("How many|[Cc]ount|number of", text)]
    assert len(counts) > 4 and not [text for text in counts if "clothes" in text]


def test_every_thing_counted_is_a_single_one():
    groups = 0
    for scene, (turn,) in conversations("count"):
        assert all(scene.things[target].number == "count" for target in turn.targets), turn.plain_answer
        groups += any(plural in turn.text for _, plural in wording.GROUPS.values())
    assert groups > 50


def denied(answer: str) -> str | None:
    """What "There is no apple here." denies."""
    match = re.search(r"no ([\w -]+?) (?:in this picture|here)\.", answer)
    return match[1] if match else None


def test_absent_things_are_absent():
    attributes = {answer: (name, texts) for name, (texts, answer) in wording.ATTRIBUTES.items()}
    groups = {plural: group for group, (_, plural) in wording.GROUPS.items()} | {"pieces of clothing": "clothing"}
    things = BY_NAME | {thing.plural: thing for thing in LIBRARY.things}
    seen = collections.Counter()
    for scene, (turn,) in [*conversations("absent"), *conversations("absent_group")]:
        assert turn.targets == () and len(turn.answer) == 1
        if turn.plain_answer in attributes:
            name, texts = attributes[turn.plain_answer]
            assert turn.text in texts
            assert all(thing.has(name) is False for thing in scene.things), (turn.text, scene.names)
            seen["attribute", name] += 1
            assert turn.kind == "absent_group"
            continue
        name = denied(turn.plain_answer)
        if name in groups:
            singular, plural = wording.GROUPS[groups[name]]
            assert re.search(rf"\b({singular}|{plural}|{name})\b", turn.text)
            assert all(thing.belongs(groups[name]) is False for thing in scene.things), (turn.text, scene.names)
            seen["group", groups[name]] += 1
            assert turn.kind == "absent_group"
        else:
            thing = things[name]
            assert re.search(rf"\b({re.escape(thing.name)}|{re.escape(thing.plural)})\b", turn.text)
            assert thing.split == "train" and not any(thing.confusable(other) for other in scene.things)
            seen["name", thing.name] += 1
            assert turn.kind == "absent"
    for kind, least, different in (("attribute", 20, 5), ("group", 30, 10), ("name", 250, 100)):
        counts = [count for (of_kind, _), count in seen.items() if of_kind == kind]
        assert sum(counts) >= least and len(counts) >= different, kind


def test_presence_asks_for_what_is_there_and_what_is_not():
    kinds = collections.Counter()
    for number, scene in enumerate(SCENES):
        conversation = ask_presence(scene, np.random.default_rng(number), TRAINED, turns=4)
        assert 2 <= len(conversation) <= 4 and len({turn.text for turn in conversation}) == len(conversation)
        kinds.update(turn.kind for turn in conversation)
        names = [scene.names[turn.targets[0]] for turn in conversation if turn.kind == "one"]
        names += [denied(turn.plain_answer) for turn in conversation if turn.kind == "absent"]
        assert len(set(names)) == len(names)
        for turn in conversation:
            check_form(scene, turn)
            assert (turn.targets == ()) == turn.kind.startswith("absent")
    assert set(kinds) == {"one", "category", "attribute", "count", "absent", "absent_group"}
    denials = kinds["absent"] + kinds["absent_group"]
    assert 0.4 < denials / kinds.total() < 0.6 and min(kinds["absent"], kinds["absent_group"]) > 60


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


# How a text speaks of a relation; "left of" and "leftmost" are different ones.
RELATION_WORDS = {
    "left": r"\bleft of\b",
    "right": r"\bright of\b",
    "above": r"\babove\b|\bhigher than\b",
    "below": r"\bbelow\b|\blower than\b",
    "nearest": r"\bnearest\b|\bclosest\b",
    "largest": r"\blargest\b|\bbiggest\b",
    "smallest": r"\bsmallest\b",
    "leftmost": r"\bfarthest to the left\b|\bleftmost\b",
    "rightmost": r"\bfarthest to the right\b|\brightmost\b",
    "highest": r"\bat the top\b|\bhighest\b",
    "lowest": r"\bat the bottom\b|\blowest\b",
}


def relation_in(text: str) -> str | None:
    """The relation that a question asks for."""
    found = [name for name, words in RELATION_WORDS.items() if re.search(words, text)]
    assert len(found) <= 1, text
    return found[0] if found else None


def check_relation(scene: Scene, relation: str, turn: Question, among: list[int], reference: int | None = None) -> None:
    """The targets of a turn, measured anew. among: objects that a superlative chooses from."""
    x, y = scene.centres[:, 0], scene.centres[:, 1]
    ranks = {
        "largest": -scene.areas,
        "smallest": scene.areas,
        "leftmost": x,
        "rightmost": -x,
        "highest": y,
        "lowest": -y,
    }
    if relation in ranks:
        assert len(among) > 1
        assert turn.targets == (among[int(np.argmin(ranks[relation][among]))],), turn.text
        return
    assert reference is not None
    others = [number for number in range(len(scene.things)) if number != reference]
    if relation == "nearest":
        distances = np.hypot(x - x[reference], y - y[reference])[others]
        assert len(others) > 1 and turn.targets == (others[int(np.argmin(distances))],), turn.text
        return
    height, width = scene.image.shape[:2]
    offset = {
        "left": (x[reference] - x) / width,
        "right": (x - x[reference]) / width,
        "above": (y[reference] - y) / height,
        "below": (y - y[reference]) / height,
    }[relation]
    assert set(turn.targets) == {number for number in others if offset[number] > 0.15} != set(), turn.text


def test_relation_answers_hold_in_the_scene():
    seen = collections.Counter()
    for scene, (turn,) in conversations("relation"):
        relation = relation_in(turn.text)
        assert relation is not None, turn.text
        seen[relation] += 1
        named = [
            number for number, name in enumerate(scene.names) if re.search(rf"\bthe {re.escape(name)}\b", turn.text)
        ]
        reference = max(named, key=lambda number: len(scene.names[number]), default=None)
        check_relation(scene, relation, turn, list(range(len(scene.things))), reference)
    assert set(seen) == set(RELATION_WORDS) and min(seen.values()) >= 15, seen


def test_second_turns_refer_to_the_first():
    seen = collections.Counter()
    for scene, (first, second) in conversations("follow_up"):
        relation = relation_in(second.text)
        colour = next((colour for colour in COLOURS if re.search(rf"\b{colour}( one\.|\?)$", second.text)), None)
        if re.search(r"[Ww]hich( one)? of|only the", second.text):
            assert len(second.targets) == 1 and set(second.targets) < set(first.targets)
            if colour is not None:
                values = {number: scene.things[number].is_coloured(colour) for number in first.targets}
                assert values == {number: number == second.targets[0] for number in first.targets}, second.text
            else:
                assert relation is not None, second.text
                check_relation(scene, relation, second, list(first.targets))
            seen["narrow", "colour" if colour else relation] += 1
        elif re.search(r"\b(it|them)\?", second.text):
            assert relation is not None and len(first.targets) == 1
            check_relation(scene, relation, second, [], first.targets[0])
            seen["relate", relation] += 1
        elif second.targets:
            (target,) = second.targets
            assert scene.names[target] in second.text and scene.names.count(scene.names[target]) == 1
            assert target not in first.targets
            seen["name", ""] += 1
        else:
            thing = BY_NAME[str(denied(second.plain_answer))]
            assert thing.name in second.text and not any(thing.confusable(other) for other in scene.things)
            seen["absent", ""] += 1
    narrow = {("narrow", way) for way in ("colour", "largest", "smallest", "leftmost", "rightmost")}
    relate = {("relate", way) for way in ("left", "right", "above", "below", "nearest")}
    assert set(seen) == narrow | relate | {("name", ""), ("absent", "")} and min(seen.values()) >= 8, seen


def test_superlatives_suit_any_number_of_things():
    """ "Which of them is smaller?" asks about two; three or four may have been named."""
    texts = [text for texts in (*wording.FOLLOW_SUPERLATIVE.values(), *wording.RELATION.values()) for text in texts]
    assert not [text for text in texts if re.search(r"\b(small|larg|bigg|great)er\b(?! than)", text)]
    assert not [text for text in wording.ONE if re.search(r"part of .* \{be\}", text)]
    assert "Which part of the picture shows the {c}?" in wording.ONE


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
    assert ask(alone, "absent", rng, [BY_NAME["apple"]]) is None
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
