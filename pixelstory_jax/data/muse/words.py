"""English of names: plurals, articles, and where a text names a thing."""

from __future__ import annotations

import re
from collections.abc import Iterable

IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "aircraft": "aircraft",
    "knife": "knives",
    "wife": "wives",
    "loaf": "loaves",
    "leaf": "leaves",
    "shelf": "shelves",
    "calf": "calves",
    "wolf": "wolves",
    "scarf": "scarves",
    "potato": "potatoes",
    "tomato": "tomatoes",
}
SINGULAR_ENDINGS = ("ss", "us", "is", "os", "as", "lens")  # glass, bus, iris, asbestos, canvas


def is_plural(name: str) -> bool:
    """Whether a name that no table has is a plural, as "skis": judged by its ending."""
    last = name.split()[-1]
    return last.endswith("s") and not last.endswith(SINGULAR_ENDINGS) and len(last) > 3


def plural(name: str) -> str:
    """ "wine glass" -> "wine glasses"; a plural stays."""
    *first, last = name.split(" ")
    if is_plural(name):
        return name
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*first, last])


def article(name: str) -> str:
    """ "a" or "an", by the first letter."""
    return "an" if name[:1].lower() in "aeiou" else "a"


def names_in(text: str, names: Iterable[str]) -> set[str]:
    """The names that occur in a text as whole words, in the singular or the plural.

    A name inside a longer one that occurs does not count: "hot dog" names no dog.
    """
    lowered = text.lower()
    found: set[str] = set()
    for name in sorted(set(names), key=lambda name: -len(name)):
        pattern = rf"\b(?:{re.escape(name.lower())}|{re.escape(plural(name.lower()))})\b"
        lowered, count = re.subn(pattern, " _ ", lowered)
        if count:
            found.add(name)
    return found
