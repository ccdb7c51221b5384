"""Where the time of a run goes, and how much of it trained the model (docs/training.md)."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pixelstory_jax.training.options import TrainOptions

SECTIONS = {
    "init": "set-up, starting weights, restoring",
    "compile": "tracing and compiling the step",
    "data": "devices idle, waiting for a batch",
    "step": "training",
    "repeat": "steps that a killed run had done since its checkpoint",
    "eval": "evaluations",
    "checkpoint": "waiting for checkpoints",
}


class Stopwatch:
    """Seconds per section. Sections may be nested; time counts for the innermost one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._begin = self._last = time.perf_counter()
        self._open: list[str] = []

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Counts `seconds` that were measured in `source` for `target`."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    @property
    def total(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def goodput(self) -> float:
        """Share of the whole time in which the devices did training steps that had not been done before."""
        return self.seconds["step"] / max(self.total, 1e-9)

    def shares(self) -> dict[str, float]:
        """Percent of the whole time per section, and `other` for the rest."""
        total = max(self.total, 1e-9)
        shares = {name: 100 * seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "other": max(100 - sum(shares.values()), 0.0)}

    def table(self) -> str:
        """A line with the goodput, and one for each section that took any time."""
        lines = [f"Time {clock(self.total)}, goodput {100 * self.goodput:.0f} %:"]
        for name, share in self.shares().items():
            seconds, what = self.seconds.get(name, share * self.total / 100), SECTIONS.get(name, "")
            if seconds > 0:
                lines.append(f"  {name:<10} {clock(seconds):>8} {share:3.0f} %  {what}".rstrip())
        return "\n".join(lines)


def clock(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class DeviceWatch:
    """Knows until when the devices were busy, without making the loop wait for them: a thread looks after each step.

    A batch that comes while the last step still runs has cost nothing, however long the loop has waited for it.
    """

    EVERY = 0.002  # seconds; looking, not waiting within JAX, so that the thread is no burden to a program that ends

    def __init__(self) -> None:
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._running = 0  # steps
        self._ended = 0.0  # when the last one that is done was done
        self._thread = threading.Thread(target=self._follow, name="device-watch", daemon=True)
        self._thread.start()

    def started(self, result: Any) -> None:
        """A step is on its way; `result` is one of its outputs, a jax.Array."""
        with self._lock:
            self._running += 1
        self._results.put(result)

    def busy_seconds(self, begin: float, end: float) -> float:
        """The part of a wait, between two readings of `time.perf_counter`, in which the devices had work."""
        with self._lock:
            until = end if self._running else self._ended
        return min(max(until - begin, 0.0), end - begin)

    def close(self) -> None:
        self._closed.set()
        self._results.put(None)

    def _follow(self) -> None:
        while (result := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # a step that failed raises where the loop fetches its results
                while not result.is_ready() and not self._closed.wait(self.EVERY):
                    pass
            with self._lock:
                self._running -= 1
                self._ended = time.perf_counter()


class SlowData:
    """Says what to raise where the devices wait for data, at most once in `EVERY` steps."""

    SHARE, WINDOW, EVERY = 0.1, 50, 500

    def __init__(self, options: TrainOptions) -> None:
        self._options = options
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=self.WINDOW + 1)
        self._silent_until = 0

    def after_step(self, step: int, seconds: Mapping[str, float]) -> str | None:
        """The warning, if one is due. `seconds`: of the sections so far."""
        waited = seconds["data"]
        self._recent.append((waited, waited + seconds["step"] + seconds["repeat"]))
        (waited_then, then), (waited, now) = self._recent[0], self._recent[-1]
        share = (waited - waited_then) / max(now - then, 1e-9)
        if len(self._recent) <= self.WINDOW or share < self.SHARE or step < self._silent_until:
            return None
        self._silent_until = step + self.EVERY
        options = self._options
        workers = (
            f"train.data_processes (now {options.data_processes})"
            if options.data_processes
            else f"train.data_threads (now {options.data_threads}) or set train.data_processes"
        )
        return (
            f"The devices waited for data for {100 * share:.0f} % of the last {self.WINDOW} steps: raise {workers}; "
            f"where only some examples are slow, train.prefetch (now {options.prefetch})"
        )
