"""What things are and can do, for the names that we know: a table of COCO's 80 names and some more, and that
of the embedded things.

A fact holds, does not hold, or is a matter of opinion (None). Of unknown names everything is.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pixelstory_jax.data.builtin.things import Thing, read_table
from pixelstory_jax.data.muse.words import article, is_plural, plural

TABLE = Path(__file__).with_name("knowledge.csv")
FACTS = (
    *("alive", "animal", "edible", "vehicle", "motor", "has_wheels", "flies", "electric", "worn", "sport", "sit_on"),
    *("drink_from", "carry_in", "screen", "tableware", "furniture", "street"),
)
ATTRIBUTES = {"edible": "edible", "flies": "flies", "has_wheels": "has_wheels", "worn": "is_worn"} | {
    "electric": "is_electric"
}
"""Fact -> attribute of an embedded thing; the groups "animal", "vehicle", "furniture" and "sport" are facts as well."""


@dataclass(frozen=True)
class Kind:
    """What is known of a name: `plural`, `article` ("" for mass nouns and plurals), `facts`.

    Things of one `family` may be called by each other's names: a man is a person.
    """

    plural: str
    article: str
    is_plural: bool
    facts: Mapping[str, bool | None]
    family: str = ""


@functools.lru_cache(maxsize=4096)
def kind_of(name: str) -> Kind:
    """What is known of a readable name; for unknown ones what English grammar tells."""
    known = _kinds().get(name.lower())
    if known:
        return known
    is_several = is_plural(name)
    return Kind(plural(name), "" if is_several else article(name), is_several, dict.fromkeys(FACTS))


@functools.cache
def _kinds() -> dict[str, Kind]:
    kinds = {thing.name: _kind_of_thing(thing) for thing in read_table()}
    with open(TABLE, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            holds, open_to_debate = set(row["is"].split("|")), set(row["may"].split("|"))
            facts = {fact: True if fact in holds else None if fact in open_to_debate else False for fact in FACTS}
            several = not row["article"] and row["name"].endswith("s")
            kinds[row["name"]] = Kind(row["plural"], row["article"], several, facts, row["family"])
    return kinds


def _kind_of_thing(thing: Thing) -> Kind:
    facts: dict[str, bool | None] = dict.fromkeys(FACTS)
    facts |= {fact: thing.has(attribute) for fact, attribute in ATTRIBUTES.items()}
    facts |= {group: thing.belongs(group) for group in ("animal", "vehicle", "furniture", "sport")}
    return Kind(thing.plural, thing.article, thing.is_plural, facts, thing.family)
