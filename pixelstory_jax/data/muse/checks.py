"""What a pair must fulfil to be kept. Each check says in a few words what is wrong, or nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pixelstory_jax.data.muse.pair import Pair
from pixelstory_jax.data.muse.pictures import Picture
from pixelstory_jax.data.muse.words import names_in

LEAKS = re.compile(
    r"\[[^\]]*\d[^\]]*\]|\(\s*#?\d+(\s*,\s*#?\d+)*\s*\)|[{}<>]|\bSEG\b|#\s?\d|\d+\s*,\s*\d+\s*,\s*\d+"
    r"|\b(?:instance|object|item|thing|number|id|no\.)\s+#?\d+\b"
    r"|\b(?:bounding box(?:es)?|coordinates?|pixels?|annotat\w+|categor(?:y|ies)|instances?|ids?|json)\b"
    r"|\b(?:the|this|your|given|provided) lists?\b|\bas an ai\b|\bi (?:cannot|can't|am unable)\b|```",
    re.IGNORECASE,
)
_COMMON = """
a an and are as at be because been by can could do does each find for from has have here how if in into is it its like
most near next of on one or other out over same see segment show so some someone than that the their them there these
they this those through to together two under up use used we what when where which while who whose why with
would you your
"""
COMMON_WORDS = frozenset(_COMMON.split())


@dataclass(frozen=True)
class Limits:
    """targets: fewest and most instances of an answer. question_words, answer_words: fewest and most.

    repeats: how often the same question may have the same answer over all pictures.
    """

    targets: tuple[int, int] = (2, 10)
    question_words: tuple[int, int] = (4, 60)
    answer_words: tuple[int, int] = (3, 150)
    repeats: int = 20


def _instances_exist(pair: Pair, picture: Picture, limits: Limits) -> str:
    if any(not 0 <= number < len(picture.instances) for number in pair.targets):
        return "an instance that does not exist"
    return "an instance named twice" if len(set(pair.targets)) < len(pair.targets) else ""


def _target_count(pair: Pair, picture: Picture, limits: Limits) -> str:
    fewest, most = limits.targets
    count = len(pair.targets)
    return "too few targets" if count < fewest else "too many targets" if count > most else ""


def _phrases_fit(pair: Pair, picture: Picture, limits: Limits) -> str:
    """A phrase may call its instance something else, but not by the name of another thing in the picture."""
    names = {instance.name for instance in picture.instances} | picture.unclear
    for mention in pair.mentions:
        named = names_in(mention.phrase, names)
        if named and picture.instances[mention.number].name not in named:
            return "a phrase that names another thing"
    phrases = [mention.phrase.lower() for mention in pair.mentions]
    return "one phrase for several instances" if len(set(phrases)) < len(phrases) else ""


def _others_are_not_implied(pair: Pair, picture: Picture, limits: Limits) -> str:
    """Outside of its mentions an answer names nothing of the picture that has no mask in it."""
    text = " ".join(part for part in pair.answer if isinstance(part, str))
    targeted = {picture.instances[number].name for number in pair.targets}
    others = {instance.name for instance in picture.instances} | picture.unclear
    return "a thing named without a mask" if names_in(text, others - targeted) else ""


def _nothing_leaks(pair: Pair, picture: Picture, limits: Limits) -> str:
    if LEAKS.search(pair.question):
        return "the question tells boxes, numbers or the list"
    return "the answer tells boxes, numbers or the list" if LEAKS.search(pair.plain) else ""


def _lengths(pair: Pair, picture: Picture, limits: Limits) -> str:
    for text, (fewest, most), which in (
        (pair.question, limits.question_words, "question"),
        (pair.plain, limits.answer_words, "answer"),
    ):
        count = len(text.split())
        if not fewest <= count <= most:
            return f"the {which} is too {'short' if count < fewest else 'long'}"
    return ""


def _is_english(pair: Pair, picture: Picture, limits: Limits) -> str:
    """Latin letters, and of the words at least one in four is among the commonest."""
    text = f"{pair.question} {pair.plain}"
    letters = [character for character in text if character.isalpha()]
    words = re.findall(r"[a-z']+", text.lower())
    latin = sum(character.isascii() for character in letters) >= 0.95 * len(letters)
    common = sum(word in COMMON_WORDS for word in words) >= len(words) / 4
    return "" if letters and latin and common else "not English"


CHECKS: tuple[Callable[[Pair, Picture, Limits], str], ...] = (
    _instances_exist,
    _target_count,
    _lengths,
    _nothing_leaks,
    _is_english,
    _phrases_fit,
    _others_are_not_implied,
)


def wrong_with(pair: Pair, picture: Picture, limits: Limits) -> str:
    """What the first check that fails says, or ""."""
    return next(filter(None, (check(pair, picture, limits) for check in CHECKS)), "")


@dataclass
class Filter:
    """Keeps the pairs that pass, and remembers what it has seen: duplicates are found over all pictures.

    Attributes:
      rejected: why -> how many.
    """

    limits: Limits
    rejected: Counter[str] = field(default_factory=Counter)
    _seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def kept(self, pairs: Iterable[Pair], picture: Picture) -> Iterator[Pair]:
        """The pairs of a picture that pass; to be called once a picture."""
        here: list[tuple[frozenset[str], frozenset[int]]] = []
        for pair in pairs:
            reason = wrong_with(pair, picture, self.limits) or self._repeated(pair, here)
            if reason:
                self.rejected[reason] += 1
                continue
            here.append((_words(pair.question), frozenset(pair.targets)))
            self._seen[_normal(pair.question), _normal(pair.plain)] += 1
            yield pair

    def _repeated(self, pair: Pair, here: list[tuple[frozenset[str], frozenset[int]]]) -> str:
        words, targets = _words(pair.question), frozenset(pair.targets)
        for other_words, other_targets in here:
            shared = len(words & other_words) / max(1, len(words | other_words))
            if shared >= (0.6 if targets == other_targets else 0.9):
                return "asked of this picture already"
        is_worn = self._seen[_normal(pair.question), _normal(pair.plain)] >= self.limits.repeats
        return "question and answer occur too often" if is_worn else ""


def _words(text: str) -> frozenset[str]:
    return frozenset(_normal(text).split())


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
