"""What was written, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixelstory_jax.data.muse.writing import Entry


def statistics(entries: Sequence[Entry], rejected: Mapping[str, int]) -> dict[str, Any]:
    """Counts of the pairs that were kept, and of those that were not by reason; ready for JSON."""
    pairs = [pair for entry in entries for pair in entry.pairs]
    targets = [len(pair.targets) for pair in pairs]
    categories = Counter(
        entry.picture.instances[number].name for entry in entries for pair in entry.pairs for number in pair.targets
    )
    return {
        "pictures": len(entries),
        "pairs": len(pairs),
        "targets": sum(targets),
        "targets_per_pair": _mean(targets),
        "pairs_by_targets": {str(count): amount for count, amount in sorted(Counter(targets).items())},
        "pairs_by_kind": dict(Counter(pair.kind for pair in pairs).most_common()),
        "question_words": _mean([len(pair.question.split()) for pair in pairs]),
        "answer_words": _mean([len(pair.plain.split()) for pair in pairs]),
        "different_questions": len({pair.question for pair in pairs}),
        "categories": dict(categories.most_common()),
        "rejected": dict(Counter(rejected).most_common()),
    }


def table(numbers: Mapping[str, Any]) -> str:
    """The statistics as lines for people."""
    histogram = ", ".join(f"{count}: {amount}" for count, amount in numbers["pairs_by_targets"].items())
    kinds = ", ".join(f"{kind} {amount}" for kind, amount in numbers["pairs_by_kind"].items())
    often = ", ".join(f"{name} {amount}" for name, amount in list(numbers["categories"].items())[:8])
    rows = [
        ("pictures", f"{numbers['pictures']:,}"),
        ("questions", f"{numbers['pairs']:,} ({numbers['different_questions']:,} different)"),
        ("targets", f"{numbers['targets']:,}, {numbers['targets_per_pair']:.2f} a question"),
        ("questions by targets", histogram),
        ("questions by kind", kinds),
        ("words", f"{numbers['question_words']:.1f} a question, {numbers['answer_words']:.1f} an answer"),
        ("categories", f"{len(numbers['categories']):,}: {often}"),
        ("not kept", f"{sum(numbers['rejected'].values()):,}"),
        *((f"  {reason}", f"{amount:,}") for reason, amount in numbers["rejected"].items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _mean(values: Sequence[int]) -> float:
    return round(float(np.mean(values)), 3) if values else 0.0
