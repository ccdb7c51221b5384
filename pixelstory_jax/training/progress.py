"""What a person sees while training runs, and where the time goes."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

SECTIONS = ("init", "compile", "data", "step", "eval", "checkpoint")


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

    @property
    def total(self) -> float:
        return time.perf_counter() - self._begin

    def shares(self) -> dict[str, float]:
        """Percent of the whole time per section, and `other` for the rest."""
        total = max(self.total, 1e-9)
        shares = {name: 100 * seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "other": max(100 - sum(shares.values()), 0.0)}

    def summary(self) -> str:
        parts = ", ".join(f"{name} {share:.0f} %" for name, share in self.shares().items())
        return f"Time {clock(self.total)}: {parts}"


def clock(seconds: float) -> str:
    """3725 -> "1:02:05", 65 -> "1:05"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A tqdm bar on a terminal; elsewhere one line every `quiet_seconds`. Only process 0 prints.

    Examples/s are those of the last `WINDOW` steps, without evaluations and the waits for checkpoints; the time left is
    that of the remaining steps at this rate.
    """

    WINDOW = 50

    def __init__(self, first_step: int, steps: int, batch_size: int, quiet_seconds: float = 30.0) -> None:
        self._steps, self._batch_size = steps, batch_size
        self._quiet_seconds = quiet_seconds
        self._active = jax.process_index() == 0
        self._away = 0.0  # seconds of evaluations and checkpoints, which are no part of examples/s
        self._recent = collections.deque([(first_step, time.perf_counter())], maxlen=self.WINDOW)
        self._printed = -quiet_seconds
        self._bar: Any = None
        if self._active and sys.stderr.isatty():
            # Without {remaining}: tqdm takes an evaluation for a slow step.
            layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
            self._bar = tqdm(total=steps, initial=first_step, dynamic_ncols=True, bar_format=layout)

    def update(self, step: int, scalars: Mapping[str, float], shares: Mapping[str, float]) -> None:
        """After `step` steps, with their scalars. `shares`: percent of the time since the start by section."""
        if not self._active:
            return
        now = time.perf_counter() - self._away
        before, then = self._recent[0]
        rate = (step - before) * self._batch_size / max(now - then, 1e-9)
        self._recent.append((step, now))
        hidden = ("learning_rate", "gradient_norm")
        terms = " ".join(f"{name} {value:.4g}" for name, value in scalars.items() if name not in hidden)
        spent = " ".join(f"{name} {shares[name]:.0f}%" for name in ("data", "step", "eval", "checkpoint"))
        text = f"{terms} | {rate:.3g} examples/s | {spent}"
        left = clock((self._steps - step) * self._batch_size / max(rate, 1e-9)) + " left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{left} | {text}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.perf_counter() - self._printed >= self._quiet_seconds or step == self._steps:
            self._printed = time.perf_counter()
            print(f"step {step}/{self._steps} | {text} | {left}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work that is not training steps; not nested."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - begin

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """Prints to stdout, above a progress bar if there is one; process 0 only."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
