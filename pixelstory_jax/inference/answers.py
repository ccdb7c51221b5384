"""What an answer is: words, and a mask for each phrase that names something.

An answer's `pieces` have the form of the training data: text, and ints that stand for the target whose token group
follows the phrase that names it, e.g. ("The apple is ", 0, " and the car is ", 1, ".").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.data.tokenizers import Tokenizer, find_groups
from pixelstory_jax.inference.restore import restore_mask, restored_rows

Pieces = Sequence[str | int]

_OPENING = re.compile(
    r"^(?:\W+|(?:sure|yes|certainly|of course|here|there|is|are|and|or|also|then|but|the|a|an)\b"
    r"|(?:the )?segmentation results?(?: of)?\b"
    r"|(?:i|we|you) (?:can )?see\b"
    r"|(?:it|they|this|that|these|those|you|we|i)\b(?:.*?(?= (?:the|a|an)\b)|(?= (?:is|are)\b)|$))",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"(?:\W+|\b(?:is|are|here|there|in|at|as|this|one))$", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:no|not|none|nothing|neither|never|without|absent|missing|cannot)\b|n['’]t\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Target:
    """One thing that an answer points at.

    Attributes:
      phrase: the words that name it.
      mask: bool [H, W] at the size of the picture.
      score: mean probability of the mask's pixels, 0..1; 0 for an empty mask.
      box: (x, y, width, height) in pixels.
    """

    phrase: str
    mask: np.ndarray
    score: float
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Answer:
    """A generated answer. `text` has "[k+1]" behind the phrase that names target k; `pieces`: see the module."""

    text: str
    targets: tuple[Target, ...]
    pieces: tuple[str | int, ...]

    @property
    def phrases(self) -> list[str]:
        return [target.phrase for target in self.targets]


@dataclass(frozen=True)
class RawAnswer:
    """An answer whose masks are still logits float32 [K, m, m] on the padded canvas of side `canvas`."""

    pieces: tuple[str | int, ...]
    logits: np.ndarray
    canvas: int

    def answer(self, size: tuple[int, int]) -> Answer:
        """With masks of a picture of `size` (H, W)."""
        targets = []
        for phrase, logits in zip(phrases(self.pieces), self.logits, strict=True):
            mask, score = restore_mask(logits, self.canvas, size)
            targets.append(Target(phrase, mask, score, mask_box(mask)))
        return Answer(readable(self.pieces), tuple(targets), self.pieces)

    def picture_logits(self, size: tuple[int, int]) -> np.ndarray:
        """Logits float32 [K, H, W] at the size of the picture."""
        whole = np.zeros((len(self.logits), *size), np.float32)
        for number, logits in enumerate(self.logits):
            for top, part in restored_rows(logits, self.canvas, size):
                whole[number, top : top + len(part)] = part
        return whole


def pieces_of(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[str | int, ...], list[int]]:
    """Cuts generated ids into text and targets: (pieces, where in `ids` each target's token group starts).

    Everything from the end-of-sequence token on is dropped. Codebook tokens outside of a complete group belong to no
    target and are left out of the text.
    """
    kept = [int(id_) for id_ in ids]
    if tokenizer.eos_id in kept:
        kept = kept[: kept.index(tokenizer.eos_id)]
    starts = find_groups(kept, tokenizer.codebook_ids)
    pieces: list[str | int] = []
    codebook, position = set(tokenizer.codebook_ids), 0
    for number, start in enumerate([*starts, len(kept)]):
        text = tokenizer.decode([id_ for id_ in kept[position:start] if id_ not in codebook])
        if text:
            pieces.append(text)
        if start < len(kept):
            pieces.append(number)
        position = start + len(tokenizer.codebook_ids)
    return tuple(pieces), starts


def target_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    """Positions int [K, G] of the tokens of the complete groups in generated ids."""
    starts = pieces_of(ids, tokenizer)[1]
    return np.array(starts, int)[:, None] + np.arange(len(tokenizer.codebook_ids))


def readable(pieces: Pieces) -> str:
    """The answer as one line of text with "[1]", "[2]", ... behind the phrases, numbered in order of appearance."""
    words, number = [], 0
    for piece in pieces:
        number += isinstance(piece, int)
        words.append(piece.strip() if isinstance(piece, str) else f"[{number}]")
    return re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", " ".join(words))).strip()


def phrases(pieces: Pieces) -> list[str]:
    """The words that name each target of an answer, in order: the text since the previous target, without filling.

    "Sure, the apple is [1] and the red car is [2]." gives "apple" and "red car". Answers that list the names first, as
    some of PixelLM's templates do ("the cup and the dog are [1] and [2]."), are dealt out one name per target.
    """
    raw: list[str] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += " " + piece
            continue
        raw.append(text)
        text = ""
    named = [name_of(words) for words in raw]
    for first, name in enumerate(named):
        following = next((i for i in range(first + 1, len(named)) if named[i]), len(named))
        parts = [name_of(part) for part in re.split(r",| and ", name)]
        if following - first == len(parts) > 1 and all(parts):
            named[first:following] = parts
    return named


def phrase_spans(pieces: Pieces) -> list[tuple[str, int | None]]:
    """`readable` text in runs: (text, number of the target that it names, or None). Joined, the runs give the line.

    For colouring: a run with a target is its phrase together with the marker behind it.
    """
    line = readable(pieces)
    runs: list[tuple[int, int, int]] = []  # (start, end, target)
    named = marked = 0  # where the last name and the last marker end
    for number, name in enumerate(phrases(pieces)):
        marker = f"[{number + 1}]"
        at = line.index(marker, marked)
        start = line.rfind(name, marked, at)
        if start < 0:  # names that are listed before the first of their markers
            start = line.find(name, named, marked)
        if name and start >= 0:
            named = start + len(name)
            runs.append((start, named, number))
        marked = at + len(marker)
        runs.append((at, marked, number))
    spans: list[tuple[str, int | None]] = []
    position = 0
    for start, end, number in sorted(runs):
        spans += [(line[position:start], None), (line[start:end], number)]
        position = end
    return [span for span in [*spans, (line[position:], None)] if span[0]]


def name_of(words: str) -> str:
    """The naming words of a clause: its last part, without articles and phrases of courtesy."""
    clause = re.sub(r"\s+", " ", words).strip()
    clause = next((part for part in reversed(re.split(r"[.;:!?]", clause)) if part.strip()), "").strip()
    for pattern in (_CLOSING, _OPENING):
        shorter = pattern.sub("", clause).strip()
        while shorter != clause:
            clause, shorter = shorter, pattern.sub("", shorter).strip()
    return clause


def rejects(pieces: Pieces) -> bool:
    """Whether an answer says in words that a thing is not there, and points at nothing."""
    return not any(isinstance(piece, int) for piece in pieces) and bool(_NEGATION.search(readable(pieces)))
