"""The words of story captions: who does what where, in lower case.

A caption has at most ``MAX_WORDS`` words, except where the plain form with a long name already has more.
A character is a noun phrase after an indefinite article ("a robot"), or None where the caption does not say which
character it is ("someone is walking on a beach").
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pixelstory_jax.data.builtin.wording import pick

MAX_WORDS = 14
ANYBODY = "a character"
"""What the plain captions call a character that they do not name."""
_ANYBODY = (ANYBODY, "the character", "someone", "somebody", "the hero", "our hero", "a figure", "the main character")

# Pose word: present participle and third person, the plain form first.
ACTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "attacking": (("attacking", "attacks"), ("fighting", "fights"), ("striking", "strikes")),
    "casting": (("casting a spell", "casts a spell"), ("using magic", "uses magic")),
    "climbing": (("climbing", "climbs"), ("climbing up", "climbs up"), ("clambering up", "clambers up")),
    "defending": (("defending", "defends"), ("blocking a blow", "blocks a blow")),
    "dying": (("dying", "dies"), ("collapsing", "collapses"), ("fading away", "fades away")),
    "falling": (("falling", "falls"), ("falling down", "falls down"), ("tumbling down", "tumbles down")),
    "flying": (("flying", "flies"), ("hovering", "hovers")),
    "jumping": (("jumping", "jumps"), ("leaping", "leaps"), ("jumping high", "jumps high"), ("hopping", "hops")),
    "leading": (("leading", "leads"), ("giving orders", "gives orders")),
    "running": (("running", "runs"), ("rushing along", "rushes along")),
    "shooting": (("shooting", "shoots"), ("taking a shot", "takes a shot")),
    "standing": (("standing", "stands"), ("standing still", "stands still"), ("waiting", "waits")),
    "throwing": (("throwing", "throws"), ("hurling something", "hurls something")),
    "walking": (("walking", "walks"), ("strolling", "strolls"), ("taking a walk", "takes a walk")),
}


@dataclasses.dataclass(frozen=True)
class PlaceWords:
    """How captions name a place: phrases after a verb, the plain one first, and the place when nobody is there."""

    where: tuple[str, ...]
    empty: str


PLACE_WORDS: dict[str, PlaceWords] = {
    "beach": PlaceWords(("on a beach", "on the beach", "at the seaside", "by the sea"), "an empty beach"),
    "forest": PlaceWords(("in a forest", "in the forest", "in the woods", "among the trees"), "an empty forest"),
    "desert": PlaceWords(("in a desert", "in the desert", "in the hot desert", "among the dunes"), "an empty desert"),
    "mountains": PlaceWords(
        ("in the mountains", "in the snow", "high up in the mountains", "below the snowy peaks"), "empty mountains"
    ),
    "city": PlaceWords(("in a city", "in the city", "on a city street", "in town"), "an empty city street"),
    "hill": PlaceWords(
        ("on a hill at night", "under the stars", "on a dark hill", "in the moonlight"), "an empty hill at night"
    ),
    "cave": PlaceWords(("in a cave", "inside a cave", "in the dark cave", "under the ground"), "an empty cave"),
    "farm": PlaceWords(("on a farm", "on the farm", "near the red barn", "in the countryside"), "an empty farm"),
    "room": PlaceWords(
        ("in a living room", "in the living room", "at home", "inside the house"), "an empty living room"
    ),
    "moon": PlaceWords(("on the moon", "on the surface of the moon", "in outer space"), "the empty moon"),
    "seabed": PlaceWords(
        ("at the bottom of the sea", "under the sea", "under water", "among the fish"), "an empty sea floor"
    ),
    "volcano": PlaceWords(
        ("by a volcano", "near the volcano", "next to a volcano", "among streams of lava"), "an empty land of lava"
    ),
}

_PHRASES = (
    "{who} {doing} {where}",
    "{who} is {doing} {where}",
    "{who} {does} {where}",
    "{where}, {who} is {doing}",
    "{where}, {who} {does}",
)
_PAIR_PHRASES = (
    "{who} {doing} {where}",
    "{who} are {doing} {where}",
    "{where}, {who} are {doing}",
)
_EMPTY_PHRASES = ("{empty}", "nobody {where}", "nobody is {where}", "no one {where}", "{where}, there is nobody")


def caption(rng: np.random.Generator, who: str | None, pose: str, place: str) -> str:
    """A caption of one character, worded at random: "in the forest, the zombie jumps".

    Args:
      rng: chooses the words.
      who: the character's name ("a zombie"), or None for a caption that does not say which character it is.
      pose: one of ``ACTIONS``.
      place: one of ``PLACE_WORDS``.

    Raises:
      ValueError: unknown pose or place.
    """
    return _short_one(rng, _PHRASES, (_said(rng, who),), pose, place) or plain_caption(who, pose, place)


def pair_caption(rng: np.random.Generator, first: str | None, second: str, pose: str, place: str) -> str:
    """A caption of two characters that do the same: "a robot and a zombie walking in the city".

    The first one may stay without a name, the second is named. Raises ``ValueError`` for an unknown pose or place.
    """
    both = (_said(rng, first), _said(rng, second))
    plain = f"{first or ANYBODY} and {second} {_doing(pose)[0][0]} {_words(place).where[0]}"
    return _short_one(rng, _PAIR_PHRASES, both, pose, place) or plain


def empty_caption(rng: np.random.Generator, place: str) -> str:
    """A caption of a place where nobody is: "nobody in the forest". Raises ``ValueError`` for an unknown place."""
    words = _words(place)
    return pick(rng, _EMPTY_PHRASES).format(empty=words.empty, where=pick(rng, words.where))


def plain_caption(who: str | None, pose: str, place: str) -> str:
    """The plain form, always the same: "a character walking on a beach". Raises ``ValueError`` as ``caption`` does."""
    return f"{who or ANYBODY} {_doing(pose)[0][0]} {_words(place).where[0]}"


def definite(name: str) -> str:
    """The name after the definite article: "the robot" of "a robot"."""
    return "the " + name.split(" ", 1)[1]


def _short_one(
    rng: np.random.Generator, phrases: tuple[str, ...], who: tuple[str, ...], pose: str, place: str
) -> str | None:
    """A random wording that is short enough; None where a few draws gave none, as long names may."""
    actions, words = _doing(pose), _words(place)
    for _ in range(6):
        doing, does = actions[int(rng.integers(len(actions)))]
        phrase = pick(rng, phrases)
        text = phrase.format(who=" and ".join(who), doing=doing, does=does, where=pick(rng, words.where))
        if len(text.split()) <= MAX_WORDS:
            return text
    return None


def _said(rng: np.random.Generator, who: str | None) -> str:
    if who is None:
        return pick(rng, _ANYBODY)
    return who if rng.random() < 0.6 else definite(who)


def _doing(pose: str) -> tuple[tuple[str, str], ...]:
    if pose not in ACTIONS:
        raise ValueError(f"unknown pose {pose!r}, expected one of {', '.join(ACTIONS)}")
    return ACTIONS[pose]


def _words(place: str) -> PlaceWords:
    if place not in PLACE_WORDS:
        raise ValueError(f"unknown place {place!r}, expected one of {', '.join(PLACE_WORDS)}")
    return PLACE_WORDS[place]
