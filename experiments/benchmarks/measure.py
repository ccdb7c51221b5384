"""Measures a row: both sides in turns, their outputs compared, and what the roofline says."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from experiments.benchmarks.machine import Peaks, roofline_seconds
from experiments.benchmarks.row import Row, Stage
from experiments.benchmarks.worker import Worker, started
from pixelstory_jax.training.errors import UserError

BUDGET = 20.0  # seconds of timed passes, after which a row has enough
FEWEST = 2  # timed passes, whatever the budget
STEADY = 1.3  # a median above so many times the fastest pass is that of a machine with other work


@dataclass(frozen=True)
class Result:
    """A line of the table.

    Attributes:
      ours, torch: median seconds of a pass; None where the outputs differ.
      our_times, torch_times: seconds of every timed pass.
      error: how far the outputs are apart, as a share of the largest number.
      stages: the work of our pass. roofline: the least seconds that the machine needs for it, once that is known.
      our_memory, torch_memory: bytes at the peak.
      problem: why there are no times.
    """

    name: str
    dtype: str
    target: float
    share_target: float | None
    ours: float | None = None
    torch: float | None = None
    our_times: tuple[float, ...] = ()
    torch_times: tuple[float, ...] = ()
    error: float | None = None
    stages: tuple[Stage, ...] = ()
    roofline: float | None = None
    our_memory: int | None = None
    torch_memory: int | None = None
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        return self.torch / self.ours if self.ours and self.torch else None

    @property
    def flops(self) -> float:
        """Operations of a pass."""
        return sum(stage.times * sum(stage.flops.values()) for stage in self.stages)

    def on(self, machine: Peaks) -> Result:
        """The same with the roofline of a machine."""
        return replace(self, roofline=roofline_seconds(self.stages, machine) or None)

    @property
    def share(self) -> float | None:
        """Of the roofline; above 1 where data stay in the caches."""
        return self.roofline / self.ours if self.ours and self.roofline else None

    @property
    def steady(self) -> bool:
        """Whether passes took about the same time; else the machine did other work beside them."""
        return all(
            statistics.median(times) <= STEADY * min(times) for times in (self.our_times, self.torch_times) if times
        )

    @property
    def met(self) -> bool:
        """Whether the row reaches all that is wanted of it."""
        enough = self.ratio is not None and round(self.ratio, 2) >= self.target
        return enough and (self.share_target is None or round(self.share or 0, 2) >= self.share_target)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "flops": self.flops, "ratio": self.ratio, "share": self.share, "met": self.met}


@dataclass
class Measured:
    """What a worker told: the outputs of the warm-up passes, bytes at the peak, seconds of the timed passes."""

    outputs: list[list[np.ndarray]]
    memory: int | None
    stages: list[Stage] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


def measure(row: Row, repeats: int, threads: int, quick: bool) -> Result:
    """The line of one row; where a side fails or the outputs differ, it has a problem instead of times."""
    result = Result(row.name, row.dtype, row.target, row.share)
    try:
        ours, torch = (_one_by_one if row.full else _in_turns)(row, repeats, threads, quick)
    except UserError as failure:
        return replace(result, problem=str(failure))
    error, problem = compare(ours.outputs, torch.outputs, row.tolerance)
    if problem:
        return replace(result, error=error, problem=problem)
    return replace(
        result,
        ours=statistics.median(ours.times),
        torch=statistics.median(torch.times),
        our_times=tuple(ours.times),
        torch_times=tuple(torch.times),
        error=error,
        stages=tuple(ours.stages),
        our_memory=ours.memory,
        torch_memory=torch.memory,
    )


def _in_turns(row: Row, repeats: int, threads: int, quick: bool) -> tuple[Measured, Measured]:
    """Both sides alive, a pass of ours and a pass of PyTorch in turns."""
    with started(row.name, "ours", quick, threads) as first, started(row.name, "torch", quick, threads) as second:
        ours, torch = _warm_up(first, row), _warm_up(second, row)
        while _more(ours.times + torch.times, len(ours.times), repeats):
            ours.times.append(first.run())
            torch.times.append(second.run())
        ours.stages = first.stages()
    return ours, torch


def _one_by_one(row: Row, repeats: int, threads: int, quick: bool) -> tuple[Measured, Measured]:
    """PyTorch begins when our process is gone, for rows that the memory does not hold twice."""
    sides = []
    for name in ("ours", "torch"):
        with started(row.name, name, quick, threads) as worker:
            side = _warm_up(worker, row)
            while _more(side.times, len(side.times), repeats):
                side.times.append(worker.run())
            if name == "ours":
                side.stages = worker.stages()
        sides.append(side)
    return sides[0], sides[1]


def _warm_up(worker: Worker, row: Row) -> Measured:
    outputs = []
    for _ in range(row.warmups):
        worker.once()
        outputs.append(worker.output())
    return Measured(outputs, worker.memory())


def _more(times: list[float], done: int, repeats: int) -> bool:
    return done < repeats and (done < FEWEST or sum(times) < BUDGET)


def compare(ours: list[list[np.ndarray]], torch: list[list[np.ndarray]], tolerance: float) -> tuple[float | None, str]:
    """(largest error, problem) of the outputs of several passes; an error is a share of the output's largest number.

    The problem is a sentence, empty where nothing is beyond the tolerance. Integers have to be equal.
    """
    worst = 0.0
    for number, (left, right) in enumerate(
        pair for one, other in zip(ours, torch, strict=True) for pair in zip(one, other, strict=True)
    ):
        if left.shape != right.shape:
            return None, f"Output {number} has the shape {list(left.shape)}, PyTorch's {list(right.shape)}"
        if right.dtype.kind == "i":
            if not np.array_equal(left, right):
                return None, f"Output {number} differs from PyTorch's in {int((left != right).sum())} whole numbers"
            continue
        error = float(np.abs(left - right).max(initial=0) / max(float(np.abs(right).max(initial=0)), 1e-30))
        if not error <= tolerance:
            return error, f"Output {number} differs from PyTorch's by {error:.2g} of its largest number"
        worst = max(worst, error)
    return worst, ""
