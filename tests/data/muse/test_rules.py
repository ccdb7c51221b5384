"""What the rules write is grammatical, passes the checks, and is true of names and boxes."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from pixelstory_jax.data.muse import rule_wording, rules
from pixelstory_jax.data.muse.checks import Filter, Limits
from pixelstory_jax.data.muse.knowledge import FACTS, TABLE, kind_of
from pixelstory_jax.data.muse.pictures import Instance, Picture
from pixelstory_jax.data.muse.words import article, is_plural, names_in, plural

KNOWN = [row["name"] for row in csv.DictReader(TABLE.open())]


def picture_of(*things, unclear=(), name="a.jpg"):
    """A picture of 100 x 100 with (name, x, y, width, height)."""
    instances = tuple(Instance(n, n, 1, (x, y, w, h), w * h, [[0]]) for n, x, y, w, h in things)
    return Picture(name, "", 100, 100, instances, frozenset(unclear))


def drawn_picture(number):
    rng = np.random.default_rng(number)
    names = list(rng.choice([*KNOWN, "cheese grater", "wall sockets", "axe"], 4)) + ["person"] * int(rng.integers(4))
    boxes = [(*rng.uniform(0, 60, 2), *rng.uniform(8, 40, 2)) for _ in names]
    return picture_of(*((str(name), *box) for name, box in zip(names, boxes, strict=True)), name=f"{number}.jpg")


def pairs_of(picture, kind, seeds=40):
    found = [pair for seed in range(seeds) for pair in rules.write_pairs(picture, 99, seed) if pair.kind == kind]
    assert found
    return found


def test_random_pictures_pass_the_checks():
    checked, written = Filter(Limits(repeats=10**6)), 0
    for number in range(200):
        pairs = rules.write_pairs(drawn_picture(number), 4, 0)
        written += len(pairs)
        list(checked.kept(pairs, drawn_picture(number)))
    assert written > 500
    assert set(checked.rejected) <= {"asked of this picture already"}
    assert sum(checked.rejected.values()) < 0.02 * written


def test_english():
    for number in range(200):
        for pair in rules.write_pairs(drawn_picture(number), 9, 1):
            for text in (pair.question, pair.plain):
                assert text[0].isupper() and text[-1] in ".?" and "  " not in text and " ." not in text, text
                assert not re.search(r"\b(\w+) \1\b|\ba [aeiou]|[{}\0]|None", text), text
                assert not re.search(r"\b(?:skis|scissors|wall sockets) (?:is|has|takes|needs)\b", text), text


def test_every_wording_can_be_written():
    fields = {"plural", "number", "and", "or", "start", "near", "far"}
    placed = re.compile(r"\{(and|or|be)[12]?\}", re.IGNORECASE)
    tables = [*rule_wording.FACTS.values(), *rule_wording.FACT_PAIRS.values()]
    tables += [rule_wording.ALL_OF_A_NAME, rule_wording.LEFT_TO_RIGHT, rule_wording.TOP_TO_BOTTOM]
    tables += [rule_wording.SIZES, rule_wording.NEAREST, rule_wording.HALF]
    for question, answer in (wording for table in tables for wording in table):
        assert set(re.findall(r"\{(\w+)\}", question)) <= fields
        assert placed.search(answer) and set(re.findall(r"\{(\w+)\}", placed.sub("", answer))) <= fields
    assert set(rule_wording.FACTS) == set(FACTS)
    assert {fact for facts in rule_wording.FACT_PAIRS for fact in facts} <= set(FACTS)


def test_same_seed_same_pairs():
    first, again, other = (rules.write_pairs(drawn_picture(3), 9, seed) for seed in (5, 5, 6))
    assert first == again != other


def test_facts_name_all_that_they_hold_of():
    picture = picture_of(("apple", 0, 0, 9, 9), ("cake", 30, 0, 9, 9), ("dog", 60, 0, 9, 9), ("chair", 0, 50, 9, 9))
    told = {frozenset(pair.targets) for pair in pairs_of(picture, "fact")}
    assert frozenset({0, 1}) in told
    two = {frozenset(pair.targets) for pair in pairs_of(picture, "two facts")}
    assert two == {frozenset({0, 1, 2}), frozenset({0, 1, 3}), frozenset({2, 3})}


@pytest.mark.parametrize(
    "further, unclear",
    [
        ((("gizmo", 60, 0, 9, 9),), ()),  # nobody knows whether it can be eaten
        ((("sheep", 60, 0, 9, 9),), ()),  # a matter of opinion
        ((), ("banana",)),  # more food, which the pictures shows less clearly
        ((("cup", 60, 0, 9, 9),), ("cup", "apple")),
    ],
)
def test_facts_are_not_asked_for_where_they_are_open(further, unclear):
    picture = picture_of(("apple", 0, 0, 9, 9), ("cake", 30, 0, 9, 9), *further, unclear=unclear)
    pairs = [pair for seed in range(30) for pair in rules.write_pairs(picture, 99, seed) if "fact" in pair.kind]
    assert not [pair for pair in pairs if {0, 1} <= set(pair.targets)]


def test_geometry_is_true():
    counted = dict.fromkeys(rules.GEOMETRY, 0)
    for number in range(150):
        picture = drawn_picture(number)
        boxes = np.array([instance.box for instance in picture.instances])
        for pair in rules.write_pairs(picture, 99, 2):
            chosen = boxes[list(pair.targets)]
            if pair.kind in counted:
                counted[pair.kind] += 1
            if pair.kind == "order":
                axis = int("top of" in pair.question or "the top to" in pair.question)
                centres = chosen[:, :2] + chosen[:, 2:] / 2
                assert (np.diff(chosen[:, axis]) > 0).all() and (np.diff(centres[:, axis]) > 0).all()
            if pair.kind == "size":
                assert chosen[0, 2] * chosen[0, 3] > 1.4 * chosen[1, 2] * chosen[1, 3]
            if pair.kind == "half":
                is_left = "left part" in pair.question or "right half" in pair.question
                assert (chosen[:, 0] + chosen[:, 2] <= 48).all() if is_left else (chosen[:, 0] >= 52).all()
    assert min(counted.values()) > 20, counted


def test_nearest_is_the_nearest():
    picture = picture_of(("fork", 0, 0, 9, 9), ("cup", 20, 0, 9, 9), ("bed", 70, 70, 9, 9))
    for pair in pairs_of(picture, "nearest"):
        assert set(pair.targets) in ({0, 1}, {2, 1})


def test_one_name_several_things():
    row = picture_of(("cup", 0, 0, 9, 9), ("cup", 30, 0, 9, 9), ("cup", 60, 0, 9, 9))
    for pair in pairs_of(row, "count"):
        assert [m.phrase for m in pair.mentions] == [
            "the leftmost cup",
            "the second cup from the left",
            "the rightmost cup",
        ]
        assert pair.targets == (0, 1, 2)
    column = picture_of(("boat", 0, 60, 9, 9), ("boat", 0, 0, 9, 9))
    assert {m.phrase for pair in pairs_of(column, "count") for m in pair.mentions} == {
        "the lower boat",
        "the upper boat",
    }
    inside = picture_of(("box", 20, 20, 9, 9), ("box", 0, 0, 49, 49))
    assert {m.phrase for pair in pairs_of(inside, "count") for m in pair.mentions} == {
        "the smaller box",
        "the larger box",
    }


@pytest.mark.parametrize(
    "things, unclear",
    [
        ((("cup", 0, 0, 9, 9), ("cup", 1, 1, 9, 9), ("cup", 2, 2, 9, 9)), ()),  # nothing tells them apart
        ((("cup", 0, 0, 9, 9), ("cup", 50, 0, 9, 9)), ("cup",)),  # there are more
        ((("scissors", 0, 0, 9, 9), ("scissors", 50, 0, 9, 9)), ()),  # "the scissors on the left" of several plurals
    ],
)
def test_what_cannot_be_told_apart_is_not_asked_about(things, unclear):
    assert not rules.write_pairs(picture_of(*things, unclear=unclear), 99, 0)


@pytest.mark.parametrize("name, other", [("hot dog", "dog"), ("man", "person"), ("sofa", "couch")])
def test_similar_names_are_left_out(name, other):
    picture = picture_of((name, 0, 0, 9, 9), (other, 30, 0, 9, 9), ("cup", 60, 0, 9, 9), ("bed", 60, 60, 20, 20))
    assert all(not {0, 1} & set(pair.targets) for seed in range(20) for pair in rules.write_pairs(picture, 99, seed))


@pytest.mark.parametrize(
    "name, several",
    [
        *(("wine glass", "wine glasses"), ("bus", "buses"), ("city", "cities"), ("toy", "toys"), ("knife", "knives")),
        *(("policeman", "policemans"), ("person", "people"), ("dish", "dishes"), ("goggles", "goggles")),
    ],
)
def test_plurals(name, several):
    assert plural(name) == several or name == "policeman"


def test_grammar_of_names():
    assert [article(name) for name in ("apple", "cup", "umbrella")] == ["an", "a", "an"]
    assert is_plural("swim goggles") and not is_plural("wine glass") and not is_plural("bus")
    assert kind_of("scissors").is_plural and not kind_of("tennis racket").is_plural
    assert names_in("two buses and a wineglass", ["bus", "glass", "wineglass"]) == {"bus", "wineglass"}
