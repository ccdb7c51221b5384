"""From annotated pictures to entries of a MUSE file: written, checked, balanced."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelstory_jax.data.muse.balancing import balanced
from pixelstory_jax.data.muse.checks import Filter, Limits
from pixelstory_jax.data.muse.pair import Pair
from pixelstory_jax.data.muse.pictures import Picture
from pixelstory_jax.data.muse.writers import UnreadableReply, Writer
from pixelstory_jax.data.muse.writing import Entry
from pixelstory_jax.inference.language_client import AnswerError
from pixelstory_jax.inference.parallel_asking import ask_all

Source = tuple[Picture, Path]  # a picture and where its file is


@dataclass(frozen=True)
class Drafts:
    """What was written: the pairs of every picture, unchecked; why some have none.

    Attributes:
      unanswered: pictures that may be asked about again. unreadable: those whose reply held no pair.
    """

    pairs: tuple[tuple[Pair, ...], ...]
    unanswered: tuple[str, ...]
    unreadable: tuple[str, ...]


def write_drafts(
    sources: Sequence[Source],
    writer: Writer,
    concurrency: int,
    stop: Callable[[], None],
    progress: Callable[[int], object],
) -> Drafts:
    """Has the pairs of all pictures written, several at a time; `progress` is called with the number that is done.

    Raises:
      LanguageModelError: the language model cannot be asked at all.
    """
    pairs: list[tuple[Pair, ...]] = [()] * len(sources)
    errors: dict[int, AnswerError] = {}
    with contextlib.closing(ask_all(sources, lambda source: writer.write(*source), concurrency, stop)) as answers:
        for done, (number, answer) in enumerate(answers, start=1):
            if isinstance(answer, AnswerError):
                errors[number] = answer
            else:
                pairs[number] = tuple(answer)
            progress(done)
    told = [(str(error), isinstance(error, UnreadableReply)) for _, error in sorted(errors.items())]
    unanswered, unreadable = (tuple(text for text, is_reply in told if is_reply is kind) for kind in (False, True))
    return Drafts(tuple(pairs), unanswered, unreadable)


def select(
    sources: Sequence[Source], drafts: Drafts, limits: Limits, factor: float, size: int, seed: int
) -> tuple[list[Entry], Counter[str]]:
    """(entries of the pictures that keep a pair, why how many pairs were rejected).

    Args:
      factor, size, seed: see `balanced`.
    """
    checked = Filter(limits)
    kept = [
        (number, pair)
        for number, (picture, _) in enumerate(sources)
        for pair in checked.kept(drafts.pairs[number], picture)
    ]
    chosen = balanced([len(pair.targets) for _, pair in kept], factor, size, seed)
    rejected = checked.rejected
    if len(chosen) < len(kept):
        rejected["left out for balance or size"] = len(kept) - len(chosen)
    if drafts.unreadable:
        rejected["replies without a pair"] = len(drafts.unreadable)
    by_picture: dict[int, list[Pair]] = {}
    for position in chosen:
        number, pair = kept[position]
        by_picture.setdefault(number, []).append(pair)
    return [Entry(*sources[number], tuple(pairs)) for number, pairs in by_picture.items()], rejected
