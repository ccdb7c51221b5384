"""Draws questions about an annotated picture: which things, in how many questions, in whose words.

"released" follows the data code of PixelLM and LISA (`utils/sem_seg_dataset.py`, `refer_seg_dataset.py`,
`reason_seg_dataset.py`, `multi_reason_seg_dataset.py`), so that released weights go on with the wordings that they were
trained on; "varied" has wordings of our own, in which every phrase is followed by its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pixelstory_jax.data import templates
from pixelstory_jax.data.annotations import Annotation, Example, Request
from pixelstory_jax.data.builtin.questions import Question, question
from pixelstory_jax.data.builtin.wording import listed, pick

WORDINGS = ("released", "varied")
REPHRASED_SHARE = 0.9  # of MUSE's targets that are called by their rephrased name
PLAIN_SHARE = 0.1  # of reasoning questions with an explanation that are answered without a mask


@dataclass(frozen=True)
class Asking:
    """How questions are drawn.

    Attributes:
      wording: "released" or "varied".
      questions: at most so many about a picture; targets: at most so many in a question that is made of names, but all
        of a single name.
    """

    wording: str = "released"
    questions: int = 3
    targets: int = 3

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise ValueError(f"Unknown data.wording {self.wording!r}; known are {', '.join(WORDINGS)}.")
        if self.questions < 1 or self.targets < 1:
            raise ValueError(f"data.asked={self.questions} and data.asked_targets={self.targets} must be at least 1.")


def ask_about(image: np.ndarray, annotation: Annotation, rng: np.random.Generator, asking: Asking) -> Example:
    """Draws questions; only the masks that they ask for are decoded.

    Raises:
      AnnotationError: a mask cannot be decoded, or the picture has another size than its annotation says.
    """
    conversations = _DRAW[annotation.task](annotation, rng, asking)
    return example(image, annotation, conversations)


def example(image: np.ndarray, annotation: Annotation, conversations: Sequence[Sequence[Question]]) -> Example:
    """The example of these conversations, whose ints number regions; errors as `ask_about`."""
    annotation.check_size(image)
    wanted = dict.fromkeys(target for turns in conversations for turn in turns for target in turn.targets)
    numbers = {region: number for number, region in enumerate(wanted)}
    masks = np.array([annotation.mask(region) for region in wanted], bool).reshape(-1, *annotation.size)

    def renumbered(turn: Question) -> Question:
        return question(turn.kind, turn.text, [numbers[p] if isinstance(p, int) else p for p in turn.answer])

    return Example(
        image=image,
        masks=masks,
        conversations=tuple(tuple(renumbered(turn) for turn in turns) for turns in conversations),
        provenance=annotation.provenance,
        ignored=annotation.ignored_mask(),
    )


# One way of drawing for each task.

Turns = list[tuple[Question, ...]]


def _ask_names(annotation: Annotation, rng: np.random.Generator, asking: Asking) -> Turns:
    """Requests dealt out over a few questions, each asked for by its name (released: at most 3 questions of 3).

    A request with several targets counts as so many names; one with more than fit has a question of its own.
    """
    order = rng.permutation(len(annotation.requests))[: asking.questions * asking.targets]
    chosen = [annotation.requests[int(i)] for i in order]
    hands: list[list[Request]] = [[request] for request in chosen[: asking.questions]]
    for request in chosen[asking.questions :]:
        open_hands = [hand for hand in hands if sum(map(_size, (*hand, request))) <= asking.targets]
        if open_hands:
            open_hands[int(rng.integers(len(open_hands)))].append(request)
    return [(_question_of_names(annotation, hand, rng, asking),) for hand in hands]


def _size(request: Request) -> int:
    return max(1, len(request.targets))


def _question_of_names(
    annotation: Annotation, hand: Sequence[Request], rng: np.random.Generator, asking: Asking
) -> Question:
    words = [pick(rng, request.words) for request in hand]
    pairs = [(word, target) for word, request in zip(words, hand, strict=True) for target in request.targets]
    if asking.wording == "varied":
        text = pick(rng, templates.VARIED_QUESTIONS).format(c=listed(words))
        return question("names", text, _varied_answer(words, hand, rng))
    text = pick(rng, templates.SHORT_QUESTIONS).format(c=listed(words).lower())
    present = [word for word, request in zip(words, hand, strict=True) if request.targets]
    absent = [word for word, request in zip(words, hand, strict=True) if not request.targets]
    answer: tuple[str | int, ...] = ()
    if len(pairs) == 1:
        answer = _only_mask([pairs[0][1]], rng)
    elif pairs:
        answer = _released_answer(pairs, listed(present), rng, templates.SINGLE_ANSWERS, templates.MULTI_ANSWERS)
    return question("names", text, _with_absent(answer, absent))


def _ask_questions(annotation: Annotation, rng: np.random.Generator, asking: Asking) -> Turns:
    """A few of the requests, each with its own question (the reference asks all that MUSE has about a picture)."""
    order = rng.permutation(len(annotation.requests))[: asking.questions]
    return [(_question_of(annotation, annotation.requests[int(i)], rng, asking),) for i in order]


def _question_of(annotation: Annotation, request: Request, rng: np.random.Generator, asking: Asking) -> Question:
    words = pick(rng, request.words)
    text = _asked(words, request.is_sentence, rng, asking)
    if request.answer is not None:
        return question("questions", text, request.answer)
    if not request.targets:
        return question("questions", text, (templates.absent([words]),))
    pairs = []
    for target in request.targets:
        region = annotation.regions[target]
        is_rephrased = bool(region.rephrased) and rng.random() < REPHRASED_SHARE
        pairs.append(((region.rephrased if is_rephrased else region.name) or words, target))
    if asking.wording == "varied":
        return question("questions", text, _slotted(pairs, rng))
    names = ", ".join(name for name, _ in pairs)
    answer = _released_answer(pairs, names, rng, templates.MUSE_SINGLE_ANSWERS, templates.MUSE_MULTI_ANSWERS)
    return question("questions", text, answer)


def _ask_reasoning(annotation: Annotation, rng: np.random.Generator, asking: Asking) -> Turns:
    """ReasonSeg: a mask, a mask with an explanation, or an explanation alone, where there is one."""
    order = rng.permutation(len(annotation.requests))[: asking.questions]
    drawn = 2 if rng.random() < PLAIN_SHARE else int(rng.integers(2))  # the same for all questions of a picture
    turns: Turns = []
    for request in (annotation.requests[int(i)] for i in order):
        words = pick(rng, request.words)
        answer = _only_mask(request.targets, rng)
        kind = drawn if request.explanation else 0
        if kind == 0:
            text = _asked(words, request.is_sentence, rng, asking)
        elif kind == 1:
            text = f"{words} {pick(rng, templates.EXPLANATORY)}"
            answer = (*answer, f" {request.explanation}")
        else:
            text, answer = words, (request.explanation,)
        turns.append((question("reasoning", text, answer),))
    return turns


def _ask_dialogue(annotation: Annotation, rng: np.random.Generator, asking: Asking) -> Turns:
    """The turns as they stand, as one conversation."""
    return [tuple(question("dialogue", turn.words[0], turn.answer or ()) for turn in annotation.requests)]


_DRAW: dict[str, Callable[[Annotation, np.random.Generator, Asking], Turns]] = {
    "names": _ask_names,
    "questions": _ask_questions,
    "reasoning": _ask_reasoning,
    "dialogue": _ask_dialogue,
}

# Words. A "pair" is a phrase and the region that it names.


def _asked(words: str, is_sentence: bool, rng: np.random.Generator, asking: Asking) -> str:
    if is_sentence:
        return pick(rng, templates.LONG_QUESTIONS).format(s=words)
    if asking.wording == "varied":
        return pick(rng, templates.VARIED_QUESTIONS).format(c=words)
    return pick(rng, templates.SHORT_QUESTIONS).format(c=words.lower())


def _only_mask(targets: Sequence[int], rng: np.random.Generator) -> tuple[str | int, ...]:
    return _filled(pick(rng, templates.ANSWERS), targets, "")


def _released_answer(
    pairs: Sequence[tuple[str, int]], names: str, rng: np.random.Generator, single: Sequence[str], multi: Sequence[str]
) -> tuple[str | int, ...]:
    """A clause for each target, all from one template, or one sentence with `names` and all masks."""
    if rng.random() < 0.5:
        template = pick(rng, single)[:-1]
        clauses = [_filled(template, [target], name) for name, target in pairs]
        pieces = [piece for number, clause in enumerate(clauses) for piece in (_between(number, len(pairs)), *clause)]
        return _joined([*pieces, "."])
    return _filled(pick(rng, multi), [target for _, target in pairs], names.lower())


def _varied_answer(words: Sequence[str], hand: Sequence[Request], rng: np.random.Generator) -> tuple[str | int, ...]:
    """What is there with its masks, then what is not there."""
    pairs = [(word, target) for word, request in zip(words, hand, strict=True) for target in request.targets]
    absent = [word for word, request in zip(words, hand, strict=True) if not request.targets]
    return _with_absent(_slotted(pairs, rng) if pairs else (), absent)


def _with_absent(answer: tuple[str | int, ...], absent: Sequence[str]) -> tuple[str | int, ...]:
    """The answer, and after it what is not in the picture."""
    return _joined([*answer, (" " if answer else "") + templates.absent(absent)]) if absent else answer


def _slotted(pairs: Sequence[tuple[str, int]], rng: np.random.Generator) -> tuple[str | int, ...]:
    """A mask behind every phrase: ("Here are ", "the cup ", k, " and ", "the dog ", j, ".")."""
    before = pick(rng, templates.VARIED_ANSWERS[len(pairs) > 1])
    pieces: list[str | int] = [before]
    for number, (name, target) in enumerate(pairs):
        pieces += [f"{_between(number, len(pairs))}{name} ", target]
    return _joined([*pieces, "."])


def _filled(template: str, targets: Sequence[int], names: str) -> tuple[str | int, ...]:
    """A released answer: {c} the names, [SEG] the masks, listed as "a, b and c"."""
    before, _, after = template.partition("[SEG]")
    before = before.replace("{c}", names)
    pieces: list[str | int] = [before]
    for number, target in enumerate(targets):
        pieces += [_between(number, len(targets)), target]
    return _joined([*pieces, after])


def _between(number: int, count: int) -> str:
    """What stands before part `number` of a list "a, b and c"."""
    return "" if number == 0 else " and " if number == count - 1 else ", "


def _joined(pieces: Sequence[str | int]) -> tuple[str | int, ...]:
    """Neighbouring texts made one, empty ones left out."""
    joined: list[str | int] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return tuple(joined)
