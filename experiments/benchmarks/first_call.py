"""How long the first call takes, with nothing compiled before and with what an earlier process left in the cache."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.benchmarks.worker import started
from pixelstory_jax.training.compilation_cache import VARIABLE

NAMES = {"tiny U-Net": "tiny U-Net, 24 x 24", "PixelLM answer": "PixelLM answer, PyTorch with cache"}  # of rows


@dataclass(frozen=True)
class FirstCall:
    """Seconds from a call to its result, tracing and compiling included; weights are there before.

    cold: with an empty cache. warm: in a new process, with the cache of the cold one. later: the second call.
    """

    name: str
    cold: float
    warm: float
    later: float


def measure_first_call(name: str, threads: int, quick: bool) -> FirstCall:
    """Our side of a row in two processes, one after the other, with a cache of their own."""
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder, environment(VARIABLE, folder):
        (cold, _), (warm, later) = (_two_calls(NAMES[name], threads, quick) for _ in ("cold", "warm"))
    return FirstCall(name, cold, warm, later)


def _two_calls(row: str, threads: int, quick: bool) -> tuple[float, float]:
    with started(row, "ours", quick, threads) as worker:
        return worker.once(), worker.once()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """The variable for processes that start in here."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
