"""From the records of a benchmark to its scores: sums of whole numbers, so that no order or division changes a digit.

Form "paper":
  giou      mean over pairs of intersection over union; two empty masks are 1
  ciou      summed intersection over summed union
  pr@0.5..  share of the pairs with something to find whose IoU reaches the threshold
  n_acc     share of the questions without target that are answered without a mask pixel; t_acc: of those with a
            target that are answered with some (gRefCOCO)
  giou_X, ciou_X   MUSE's scores where a matched pair counts only if the words about its mask are right; else its
            intersection is 0 and its union |prediction| + |true mask|. X is "names" (a comparison of names, the stated
            substitute) or "judged" (a language model), see `answer_judge.py`
  words_X   share of the matched pairs with right words
  exact, normalised, token_f1   answers in words beside those of the data set: a stated substitute for a judge
Form "released": see `released.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelstory_jax.evaluation import released
from pixelstory_jax.evaluation.answer_judge import Verdicts, verdicts_by_names
from pixelstory_jax.evaluation.benchmark_records import Record
from pixelstory_jax.evaluation.benchmarks import FORMS, Benchmark, find_benchmark

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
Scores = dict[str, float]


@dataclass(frozen=True)
class BenchmarkReport:
    """scores: form -> group ("all" for everything) -> metric -> value; table: the same for people; skipped: pictures
    that could not be used.
    """

    scores: dict[str, dict[str, Scores]]
    table: str
    skipped: int

    @property
    def metrics(self) -> dict[str, float]:
        """Flat: form/group/metric."""
        return {
            f"{form}/{group}/{metric}": value
            for form, groups in self.scores.items()
            for group, scores in groups.items()
            for metric, value in scores.items()
        }


def score_records(name: str, split: str, records: Iterable[Record], judged: Verdicts | None = None) -> BenchmarkReport:
    """The scores of all records of a benchmark, in whatever order they come.

    Args:
      judged: verdicts of a language model about MUSE's answers, see `answer_judge.judge_records`.
    """
    benchmark = find_benchmark(name)
    ordered = sorted(records, key=lambda record: (FORMS.index(record["form"]), record["index"]))
    usable = [record for record in ordered if "skipped" not in record]
    scores: dict[str, dict[str, Scores]] = {}
    for form in dict.fromkeys(record["form"] for record in usable):
        own = [record for record in usable if record["form"] == form]
        if form == "paper":
            scores[form] = _paper(benchmark, own, judged)
        elif benchmark.released_writes == "rows":
            scores[form] = _by_group(own, _rows_scores)
        else:
            scores[form] = _by_group(list(_questions(own)), _generalised_scores)
    skipped = len({record["index"] for record in ordered if "skipped" in record})
    return BenchmarkReport(scores, _table(name, split, scores, skipped), skipped)


def _paper(benchmark: Benchmark, records: Sequence[Record], judged: Verdicts | None) -> dict[str, Scores]:
    questions = list(_questions(records))
    if benchmark.pairing == "words":
        return _by_group(questions, word_scores)
    scores = _by_group(questions, _mask_scores)
    if benchmark.pairing == "matched":
        kinds = {"names": verdicts_by_names(records), **({"judged": judged} if judged is not None else {})}
        for kind, verdicts in kinds.items():
            for group, more in _by_group(questions, lambda some, v=verdicts: _worded_scores(some, v)).items():
                scores[group] |= {f"{metric}_{kind}": value for metric, value in more.items()}
    return scores


def _questions(records: Sequence[Record]) -> Iterator[Record]:
    """The questions, each with its place (index of the picture, number of the question)."""
    for record in records:
        for number, question in enumerate(record["questions"]):
            yield {**question, "place": (record["index"], number)}


def _by_group(items: Sequence[Record], score: Any) -> dict[str, Scores]:
    """Scores of all items and of those of each group; numbers of targets come in their order."""
    groups = {group for item in items for group in item["groups"]}
    ordered = sorted(groups, key=lambda group: (int(group.split()[0]) if group[0].isdigit() else 0, group))
    return {
        group: score([item for item in items if group == "all" or group in item["groups"]])
        for group in ["all", *ordered]
    }


def iou(intersection: int, union: int) -> float:
    """Two empty masks agree."""
    return intersection / union if union else 1.0


def question_iou(question: Record) -> float:
    """Mean over the pairs of a question."""
    return math.fsum(iou(i, u) for _, _, i, u, _, _ in question["pairs"]) / len(question["pairs"])


def _overlap(counts: Sequence[tuple[int, int]]) -> Scores:
    total = sum(union for _, union in counts)
    return {
        "giou": math.fsum(iou(*pair) for pair in counts) / max(len(counts), 1),
        "ciou": sum(intersection for intersection, _ in counts) / total if total else 1.0,
    }


def _mask_scores(questions: Sequence[Record]) -> Scores:
    pairs = [pair for question in questions for pair in question["pairs"]]
    scores: Scores = {"questions": len(questions), **_overlap([(pair[2], pair[3]) for pair in pairs])}
    to_find = [iou(pair[2], pair[3]) for question in questions if question["targets"] for pair in question["pairs"]]
    for threshold in THRESHOLDS if to_find else ():
        scores[f"pr@{threshold}"] = sum(value >= threshold for value in to_find) / len(to_find)
    without = [not _points(question) for question in questions if not question["targets"]]
    if without:
        scores["n_acc"] = sum(without) / len(without)
        with_target = [_points(question) for question in questions if question["targets"]]
        if with_target:
            scores["t_acc"] = sum(with_target) / len(with_target)
    return scores


def _points(question: Record) -> bool:
    """Whether the answer has a mask pixel."""
    return any(pair[4] for pair in question["pairs"])


def _worded_scores(questions: Sequence[Record], verdicts: Verdicts) -> Scores:
    """Pairs with wrong words: intersection 0, union |prediction| + |true mask|."""
    counts, right = [], []
    for question in questions:
        for prediction, target, intersection, union, predicted, true in question["pairs"]:
            is_matched = prediction is not None and target is not None
            is_right = is_matched and verdicts[question["place"]][prediction]
            counts.append((intersection, union) if is_right or not is_matched else (0, predicted + true))
            if is_matched:
                right.append(is_right)
    return {**_overlap(counts), "words": sum(right) / len(right) if right else 0.0}


def word_scores(questions: Sequence[Record]) -> Scores:
    """Agreement of answers in words with the expected ones: to the letter, normalised, and F1 of their words."""
    said = [(question["answer"], question["expected"]) for question in questions]
    normal = [(normalise(answer), normalise(expected)) for answer, expected in said]
    count = max(len(said), 1)
    return {
        "questions": len(said),
        "exact": sum(answer == expected for answer, expected in said) / count,
        "normalised": sum(answer == expected for answer, expected in normal) / count,
        "token_f1": math.fsum(_f1(answer.split(), expected.split()) for answer, expected in normal) / count,
    }


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces."""
    bare = re.sub(r"[^\w\s]", " ", text.lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def _f1(said: Sequence[str], expected: Sequence[str]) -> float:
    if not said or not expected:
        return float(list(said) == list(expected))
    return 2 * (Counter(said) & Counter(expected)).total() / (len(said) + len(expected))


def _rows_scores(records: Sequence[Record]) -> Scores:
    """`validate` and `ar_validate`: an average of the pictures' averages, and summed pixel counts, in float32."""
    images = [
        released.ImageRows(np.array(record["rows"], np.float32).reshape(-1, 2, 2), record["weight"])
        for record in records
        if record["weight"]
    ]
    giou, ciou = released.summarise(images)
    return {"questions": sum(len(record["questions"]) for record in records), "giou": giou, "ciou": ciou}


def _generalised_scores(questions: Sequence[Record]) -> Scores:
    samples = [
        (question["pairs"][0][2], question["pairs"][0][3], question["targets"] > 0, _points(question))
        for question in questions
    ]
    return {"questions": len(questions), **released.summarise_generalised(samples)}


LABELS = {
    "paper": "form paper: generated answers, correct arithmetic",
    "released": "form released: as the published scripts compute it, quirks included",
}


def _table(name: str, split: str, scores: Mapping[str, Mapping[str, Scores]], skipped: int) -> str:
    """Plain text, one block per form; cIoU and the others as shares of 1."""
    lines = []
    for form, groups in scores.items():
        columns = list(dict.fromkeys(metric for row in groups.values() for metric in row if metric != "questions"))
        width = max(12, *(len(group) for group in groups))
        forced = (
            " (the true answers are given to the model)" if form == "released" and find_benchmark(name).forced else ""
        )
        lines += ["", f"{name} {split}, {LABELS[form]}{forced}"]
        lines.append(" ".join([f"{'':<{width}}", f"{'questions':>9}", *(f"{column:>11}" for column in columns)]))
        for group, row in groups.items():
            cells = (f"{row[column]:11.4f}" if column in row else f"{'-':>11}" for column in columns)
            lines.append(" ".join([f"{group:<{width}}", f"{row['questions']:>9.0f}", *cells]))
    if skipped:
        lines += ["", f"{skipped} pictures could not be used; the records say why."]
    return "\n".join(lines).strip("\n")
