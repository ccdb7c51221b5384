"""What a row of the table is: one computation on two sides, and what it asks of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A part of a row's work, done `times` times.

    Attributes:
      flops: operations by kind, see `machine.KINDS`; a multiplication and an addition are two.
      bytes: what has to be read and written at least: parameters, inputs and results once.
    """

    flops: dict[str, float]
    bytes: float
    times: int = 1


@dataclass(frozen=True)
class Side:
    """One library's way.

    Attributes:
      run: one pass, complete when it returns; arrays (or a tree of them) that both sides have in one order and layout.
      stages: what the pass consists of; asked of our side alone, after it was timed.
    """

    run: Callable[[], Any]
    stages: Callable[[], list[Stage]] = list


@dataclass(frozen=True)
class Row:
    """A computation that both libraries do with the same weights.

    Attributes:
      ours, torch: build the sides, each in a process of its own.
      target: the least ratio of PyTorch's time to ours that is wanted.
      tolerance: how far the outputs may be apart, as a share of the largest number of an output.
      share: the least share of the roofline that is wanted; None where the ratio alone counts.
      dtype: in which both compute.
      warmups: passes before the timed ones. The outputs of each are compared.
      seconds: about how long the row takes, for the progress bar.
      libraries: modules that PyTorch's side needs, loaded before its memory is watched.
      full: whether it needs the memory of a whole machine: one side after the other, and only when asked for.
    """

    name: str
    ours: Callable[[], Side]
    torch: Callable[[], Side]
    target: float
    tolerance: float = 1e-4
    share: float | None = None
    dtype: str = "float32"
    warmups: int = 1
    seconds: float = 15.0
    libraries: tuple[str, ...] = ()
    full: bool = False
