"""Benchmarks during training: `config.eval.splits` may name some, as "reason_seg|val" or "refcocog|google|val".

As with composed scenes, the pictures that choose the best checkpoint (the first `eval.quick_examples` of a split, in
the paper form) are not those of the table at the end (the `eval.examples` after them, in all forms), unless there are
no others. `experiments.evaluate --benchmark` scores whole splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixelstory_jax.data.readers.reader import Reader
from pixelstory_jax.evaluation.benchmark_records import Answerer, Record, make_records
from pixelstory_jax.evaluation.benchmark_run import answer_pages
from pixelstory_jax.evaluation.benchmark_scores import BenchmarkReport, score_records
from pixelstory_jax.evaluation.benchmarks import find_benchmark, open_benchmark


@dataclass(frozen=True)
class SplitResult:
    """Of one benchmark: its name in metrics, scores, records and pages of answers."""

    title: str
    report: BenchmarkReport
    records: list[Record]
    images: dict[str, np.ndarray]

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by: gIoU, for answers in words the F1 of their words."""
        scores = self.report.scores.get("paper", {}).get("all", {})
        return scores.get("giou", scores.get("token_f1", 0.0))

    @property
    def metrics(self) -> dict[str, float]:
        return {f"{self.title}/{name}": value for name, value in self.report.metrics.items()}


class BenchmarkEvaluator:
    """Asks the benchmarks that `config.eval.splits` names, of the data sets below `config.data.folder`.

    Raises:
      ValueError: an unknown one, or a folder that is not as expected.
    """

    def __init__(self, config: Any) -> None:
        self.settings = config.eval
        self.readers: dict[str, Reader] = {}
        for one in config.eval.splits:
            name, _, split = one.rpartition("|")
            if not name:
                continue
            try:
                self.readers[one] = open_benchmark(name, config.data.folder, split)
            except ValueError as error:
                raise ValueError(f"config.eval.splits has {one!r}. {error}") from error

    def quick(self, answerer: Answerer) -> list[SplitResult]:
        count = self.settings.quick_examples
        return [self._ask(one, answerer, range(min(count, len(reader))), True) for one, reader in self.readers.items()]

    def whole(self, answerer: Answerer) -> list[SplitResult]:
        results = []
        for one, reader in self.readers.items():
            first, count = self.settings.quick_examples, self.settings.examples
            indices = range(first, min(first + count, len(reader))) or range(min(count, len(reader)))
            results.append(self._ask(one, answerer, indices, False))
        return results

    def _ask(self, one: str, answerer: Answerer, indices: Sequence[int], is_quick: bool) -> SplitResult:
        name, _, split = one.rpartition("|")
        benchmark, reader, size = find_benchmark(name), self.readers[one], self.settings.batch_size
        records = [
            record
            for form in (benchmark.forms[:1] if is_quick else benchmark.forms)
            for start in range(0, len(indices), size)
            for record in make_records(benchmark, form, reader, indices[start : start + size], answerer, size)
        ]
        title = one.replace("|", "_")
        pages = answer_pages(name, split, 0, reader, records, self.settings.sheet)
        images = {f"{title}_{which}": page for which, page in pages.items()}
        return SplitResult(title, score_records(name, split, records), records, images)
