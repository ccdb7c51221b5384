"""The score table: generated answers to questions about pictures, beside three baselines scored by the same code.

The protocol of PixelLM's MUSE benchmark (paper section 4; its text scorer, a language model, is replaced by the
comparison of names): answers are generated, never teacher-forced, and masks are matched to targets one to one within a
question. In a conversation the second question is asked after the first true question and the *generated* first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pixelstory_jax.data.conversations import Turn
from pixelstory_jax.evaluation.metrics import QuestionScore, Tally, score_masks, score_question
from pixelstory_jax.inference.answers import Answer, readable

BASELINES = ("united", "random", "nothing")
KINDS = ("one", "several", "category", "attribute", "relation", "count", "absent", "absent_group", "follow_up")


class AskedQuestion(Protocol):
    """What is read of a question; `data.builtin.questions.Question` has these fields."""

    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> tuple[str | int, ...]: ...
    @property
    def targets(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class EvaluationExample:
    """One picture with one conversation about it.

    Attributes:
      split: the heading under which it is counted.
      image: uint8 [H, W, 3].
      masks: bool [M, H, W], the visible masks of all things in the picture; the questions' targets index them.
      conversation: one or two questions.
    """

    split: str
    image: np.ndarray
    masks: np.ndarray
    conversation: tuple[AskedQuestion, ...]


@dataclass(frozen=True)
class ScoredAnswer:
    """A question, what was said, and its score; `history` holds the turns before it, with their generated answers."""

    example: EvaluationExample
    question: AskedQuestion
    answer: Answer
    score: QuestionScore
    history: tuple[Turn, ...] = ()

    @property
    def true_masks(self) -> np.ndarray:
        return self.example.masks[list(self.question.targets)].astype(bool)

    def record(self) -> dict[str, Any]:
        """JSON-able account of this answer."""
        return {
            "split": self.example.split,
            "kind": self.question.kind,
            "history": [[turn.question, readable(turn.answer or ())] for turn in self.history],
            "question": self.question.text,
            "expected": readable(self.question.answer),
            "answer": self.answer.text,
            "phrases": self.answer.phrases,
            "scores": [round(target.score, 4) for target in self.answer.targets],
            "ious": [round(iou, 4) for iou in self.score.ious],
            "named": self.score.named,
            "rejected": self.score.rejected,
        }


@dataclass(frozen=True)
class Report:
    """metrics: scalars named split/kind/metric, kind "all" for a whole split; those of the baselines are
    split/kind/giou_NAME and split/kind/ciou_NAME.
    """

    metrics: dict[str, float]
    table: str
    answers: tuple[ScoredAnswer, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [answer.record() for answer in self.answers]


AnswerBatch = Callable[[list[np.ndarray], list[list[Turn]]], Sequence[Answer]]


def evaluate_answers(
    answer_batch: AnswerBatch, examples: Sequence[EvaluationExample], batch_size: int = 16, seed: int = 0
) -> Report:
    """Asks every question of `examples` and scores the answers.

    Args:
      answer_batch: (pictures uint8 [H, W, 3], conversations that end with an unanswered turn) to answers, one each. It
        is always called with `batch_size` of both, so that it compiles once; the last batch is filled with repetitions.
      seed: of the baseline that points at random.
    """
    scored: list[ScoredAnswer] = []
    histories: list[list[Turn]] = [[] for _ in examples]
    for turn in range(max((len(example.conversation) for example in examples), default=0)):
        asked = [i for i, example in enumerate(examples) if len(example.conversation) > turn]
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            filled = [batch[i % len(batch)] for i in range(batch_size)]
            conversations = [[*histories[i], Turn(examples[i].conversation[turn].text)] for i in filled]
            answers = answer_batch([examples[i].image for i in filled], conversations)
            for i, answer in zip(batch, answers, strict=False):
                example, question = examples[i], examples[i].conversation[turn]
                masks = np.array([target.mask for target in answer.targets]).reshape(-1, *example.image.shape[:2])
                score = score_question(
                    masks, example.masks[list(question.targets)].astype(bool), answer.pieces, question.answer
                )
                scored.append(ScoredAnswer(example, question, answer, score, tuple(histories[i])))
                histories[i].append(Turn(question.text, answer.pieces))
    return report(scored, seed)


def report(scored: Sequence[ScoredAnswer], seed: int = 0) -> Report:
    """Sums scored answers up per split and kind, beside the baselines."""
    tallies: dict[tuple[str, str], Tally] = {}
    baselines: dict[tuple[str, str, str], Tally] = {}
    rng = np.random.default_rng(seed)
    for item in scored:
        guesses = baseline_masks(item.example.masks.astype(bool), len(item.question.targets), rng)
        for kind in (item.question.kind, "all"):
            key = item.example.split, kind
            tallies.setdefault(key, Tally()).add(item.score)
            for name, masks in guesses.items():
                guess = QuestionScore(*score_masks(masks, item.true_masks), named=None, rejected=None)
                baselines.setdefault((*key, name), Tally()).add(guess)
    metrics = {
        "/".join((*key, name)): value for key, tally in tallies.items() for name, value in tally.summary().items()
    }
    metrics |= {
        f"{split}/{kind}/{metric}_{name}": value
        for (split, kind, name), tally in baselines.items()
        for metric, value in tally.summary().items()
    }
    return Report(metrics, _table(tallies, metrics), tuple(scored))


def baseline_masks(objects: np.ndarray, targets: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What three answerers without eyes for the question would point at; they know how many targets it has.

    Args:
      objects: bool [M, H, W], everything in the picture.
      targets: of the question; for one about an absent thing (0) those who always point give one mask.

    Returns:
      "united": all things together, once per target; "random": different random things; "nothing": no mask.
    """
    count = max(targets, 1)
    chosen = rng.choice(len(objects), count, replace=count > len(objects))
    return {
        "united": np.repeat(np.any(objects, axis=0, keepdims=True), count, axis=0),
        "random": objects[chosen],
        "nothing": objects[:0],
    }


def _table(tallies: dict[tuple[str, str], Tally], metrics: dict[str, float]) -> str:
    """Plain text, one block per split."""

    def cell(split: str, kind: str, metric: str) -> str:
        value = metrics.get(f"{split}/{kind}/{metric}")
        return "    -   " if value is None else f"{value:8.3f}"

    columns = ("giou", "ciou", "names", "rejected", *(f"{m}_{name}" for m in ("giou", "ciou") for name in BASELINES))
    titles = ("gIoU", "cIoU", "names", "rejected", *BASELINES, *BASELINES)
    lines = []
    for split in dict.fromkeys(split for split, _ in tallies):
        kinds = [kind for kind in KINDS if (split, kind) in tallies]
        kinds += sorted(kind for s, kind in tallies if s == split and kind not in (*KINDS, "all")) + ["all"]
        width = max(10, *(len(kind) for kind in kinds))
        lines += ["", f"{split.replace('_', ' ').capitalize()}  (last columns: gIoU, then cIoU of the baselines)"]
        lines.append(f"{'kind':<{width}} {'n':>5} " + " ".join(f"{title:>8}" for title in titles))
        for kind in kinds:
            cells = " ".join(cell(split, kind, column) for column in columns)
            lines.append(f"{kind.replace('_', ' '):<{width}} {tallies[split, kind].questions:>5} {cells}".rstrip())
    return "\n".join(lines).strip("\n")
