"""One side of one row in a process of its own, which runs a pass whenever it is told to.

With both sides alive at once, passes alternate (so that both meet the same moods of the machine), neither library sees
the threads or the memory of the other, and the memory that a process takes is that of one side.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.library import load_library
from experiments.benchmarks.row import Side, Stage
from pixelstory_jax.training.errors import UserError
from pixelstory_jax.training.host_memory import PeakMemory

SPELL = 0.4  # seconds


class Worker:
    """A running side; one request at a time."""

    def __init__(self, process: Any, connection: Connection, log: Path, what: str) -> None:
        self._process, self._connection, self._log, self._what = process, connection, log, what

    def ask(self, request: str) -> Any:
        """Sends one of the requests of `_serve` and waits for what comes back.

        Raises:
          UserError: the process failed; with its last words.
        """
        try:
            self._connection.send(request)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            ending = "; it was killed, as when memory runs out" if self._process.exitcode == -9 else ""
            raise UserError(f"{self._what} failed{ending}: {said[-1] if said else 'it said nothing'}") from error

    def once(self) -> float:
        """Seconds of one pass."""
        return self.ask("once")

    def run(self) -> float:
        """Seconds of a pass: of a long one, or the median of those that follow one another for `SPELL` seconds.

        The first of several does not count. In it threads are woken, which may begin on one core, and those of the
        other side's last pass may still spin.
        """
        return self.ask("run")

    def output(self) -> list[np.ndarray]:
        """The arrays of the last pass."""
        return self.ask("output")

    def memory(self) -> int | None:
        """The most bytes that the process took so far, beyond what it had with its library loaded. Once, if at all."""
        return self.ask("memory")

    def stages(self) -> list[Stage]:
        return self.ask("stages")


@contextlib.contextmanager
def started(name: str, side: str, quick: bool, threads: int) -> Iterator[Worker]:
    """A worker for `side` of the row called `name`; it is gone afterwards, whatever happened."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        log = Path(folder) / "log"
        process = context.Process(target=_serve, args=(there, name, side, quick, threads, log), daemon=True)
        process.start()
        there.close()
        try:
            yield Worker(process, here, log, f"{side} of {name!r}" if side == "ours" else f"PyTorch of {name!r}")
        finally:
            process.kill()
            process.join()
            here.close()


def _serve(connection: Connection, name: str, side: str, quick: bool, threads: int, log: Path) -> None:
    """The loop of a worker."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)  # what libraries say on the way is shown only where the process fails
    load_library(side, threads)
    from experiments.benchmarks.rows import find_row

    row = find_row(name, quick)
    for module in row.libraries if side == "torch" else ():
        importlib.import_module(module)
    with PeakMemory(interval=0.01) as memory:
        built: Side = row.ours() if side == "ours" else row.torch()
        passes = _Passes(built)
        while (request := connection.recv()) != "memory":
            connection.send(passes.answer(request))
    connection.send(memory.bytes)  # from here on nothing watches the memory while passes are timed
    while True:
        connection.send(passes.answer(connection.recv()))


class _Passes:
    """Answers requests; holds the output of the last pass."""

    def __init__(self, side: Side) -> None:
        self.side, self.output = side, None

    def answer(self, request: str) -> Any:
        if request == "output":
            return arrays(self.output)
        if request == "stages":
            return self.side.stages()
        begin, times = time.perf_counter(), [self.timed()]
        while request == "run" and time.perf_counter() - begin < SPELL:
            times.append(self.timed())
        return statistics.median(times[1:] or times)

    def timed(self) -> float:
        """Seconds of a pass."""
        self.output = None  # before the next one is made, as in a loop of a user
        start = time.perf_counter()
        self.output = self.side.run()
        return time.perf_counter() - start


def arrays(output: Any) -> list[np.ndarray]:
    """The leaves of an output as arrays of float32, or of integers."""
    if isinstance(output, dict):
        return [leaf for key in sorted(output) for leaf in arrays(output[key])]
    if isinstance(output, list | tuple):
        return [leaf for part in output for leaf in arrays(part)]
    if hasattr(output, "detach"):
        output = output.detach()
        output = output.float() if output.is_floating_point() else output
    array = np.asarray(output)
    return [array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)]
