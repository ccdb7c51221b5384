"""What a data set holds and what of it cannot be used: a report over all pictures, never a crash."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixelstory_jax.data.annotations import Annotation
from pixelstory_jax.data.readers.reader import Reader, decode_picture

UNUSABLE = {
    "annotation": "annotations that cannot be used",
    "no picture": "pictures that are missing or cannot be read",
    "picture": "pictures that cannot be decoded",
    "size": "pictures of another size than annotated",
    "mask": "masks that cannot be decoded",
    "shard": "shards of another content than was packed",
}
"""Kinds of problems for which a picture is passed over."""
PROBLEMS = {**UNUSABLE, "empty mask": "masks without a pixel (can be used)"}
LISTED_NAMES = 100  # of the most frequent names, in the report's JSON


@dataclass(frozen=True)
class Problem:
    """Something wrong with picture number `index`, whose file is `picture` where that is known."""

    index: int
    kind: str
    picture: str
    reason: str


@dataclass
class Report:
    """Counts over pictures; `add` joins another part of the same data set.

    Attributes:
      pictures: annotated ones. usable: those that can be trained on.
      regions, requests: of all annotations that can be read; ignoring: pictures with ignored areas.
      tasks: pictures by task. targets: requests by the number of their targets. names: regions by name.
      sides: pictures by long side in pixels.
    """

    pictures: int = 0
    usable: int = 0
    regions: int = 0
    requests: int = 0
    ignoring: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    targets: Counter[int] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in (entry.name for entry in dataclasses.fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("pictures", "usable", "regions", "requests")}

    def to_json(self) -> dict[str, Any]:
        """All of it; `from_json` reads it."""
        return {**vars(self), "problems": [dataclasses.asdict(problem) for problem in self.problems]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Report:
        numbers = {name: Counter({int(k): v for k, v in fields[name].items()}) for name in ("targets", "sides")}
        words = {name: Counter(fields[name]) for name in ("tasks", "names")}
        return cls(**{**fields, **numbers, **words, "problems": [Problem(**x) for x in fields["problems"]]})

    def summary(self) -> dict[str, Any]:
        """For people and scripts: counts, the most frequent names, and every problem."""
        kinds = Counter(problem.kind for problem in self.problems)
        return {
            **self.counts,
            "with_ignored_areas": self.ignoring,
            "tasks": dict(self.tasks),
            "requests_by_targets": {str(number): self.targets[number] for number in sorted(self.targets)},
            "different_names": len(self.names),
            "names": dict(self.names.most_common(LISTED_NAMES)),
            "long_sides": {"least": min(self.sides, default=0), "most": max(self.sides, default=0)},
            "problems_by_kind": {kind: kinds[kind] for kind in PROBLEMS if kinds[kind]},
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }

    def table(self, examples: int = 3) -> str:
        """The report as lines for a terminal, with the first `examples` problems of each kind."""
        named = [(name, count) for name, count in self.names.most_common(6) if name][:5]
        names = f" of {len(self.names):,} names: {', '.join(f'{name} {count:,}' for name, count in named)}"
        targets = ", ".join(f"{number}: {self.targets[number]:,}" for number in sorted(self.targets))
        sides = f"{min(self.sides, default=0):,} to {max(self.sides, default=0):,} pixels"
        rows = [
            ("pictures", f"{self.pictures:,}, of which {self.usable:,} can be used"),
            ("long sides", sides),
            ("regions", f"{self.regions:,}{names * bool(named)}"),
            ("requests", f"{self.requests:,}, by number of targets {targets}"),
            ("with ignored areas", f"{self.ignoring:,} pictures"),
        ]
        lines = [f"  {name:<20}{text}" for name, text in rows]
        for kind, text in PROBLEMS.items():
            found = [problem for problem in self.problems if problem.kind == kind]
            if found:
                lines.append(f"  {text}: {len(found):,}")
                lines += [f"    {problem.reason}" for problem in found[:examples]]
                lines += [f"    and {len(found) - examples:,} more"] * (len(found) > examples)
        return "\n".join(lines)


@dataclass(frozen=True)
class Examined:
    """A picture's part of the report, and what was read of it where it can be used."""

    report: Report
    annotation: Annotation | None = None
    picture: bytes = b""
    image: np.ndarray | None = None


def examine(reader: Reader, index: int) -> Examined:
    """Reads picture `index` whole: annotation, file, pixels, and every mask."""
    report = Report(pictures=1)
    name = ""

    def attempt(kind: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # what a reader did not foresee in its files is to be reported, too
            known = isinstance(error, ValueError)  # AnnotationError and ImageError are, with a sentence
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            report.problems.append(Problem(index, kind, name, reason))
            return None

    annotation: Annotation | None = attempt("annotation", lambda: reader[index])
    if annotation is None:
        return Examined(report)
    name = annotation.provenance.picture
    _count(annotation, report)
    picture = attempt("no picture", lambda: reader.picture(index))
    image = None if picture is None else attempt("picture", lambda: decode_picture(picture, f"{reader.name}: {name}"))
    if image is not None:
        attempt("size", lambda: annotation.check_size(image))
    for number, region in enumerate(annotation.regions):
        mask = attempt("mask", functools.partial(annotation.mask, number))
        if mask is not None and not mask.any():
            where = f"{annotation.provenance.dataset}, {name}, mask {region.id or number}".rstrip(" ,")
            report.problems.append(Problem(index, "empty mask", name, f"{where} ({region.name}) is empty"))
    attempt("mask", annotation.ignored_mask)
    if any(problem.kind in UNUSABLE for problem in report.problems):
        return Examined(report)
    report.usable = 1
    return Examined(report, annotation, picture, image)


def _count(annotation: Annotation, report: Report) -> None:
    report.regions, report.requests = len(annotation.regions), len(annotation.requests)
    report.ignoring = int(annotation.ignored is not None)
    report.tasks[annotation.task] += 1
    report.sides[max(annotation.size)] += 1
    report.names.update(region.name for region in annotation.regions)
    report.targets.update(len(request.targets) for request in annotation.requests)
