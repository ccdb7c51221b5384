"""What a person sees while the rows are measured."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from pixelstory_jax.training.progress import clock


class Bar:
    """A bar on a terminal, elsewhere a line a row; both tell the time that is left.

    The parts of the work differ a hundredfold, so it is measured in the seconds that each is known to take about, and
    what is left is scaled by how this machine fared so far.
    """

    def __init__(self, seconds: float) -> None:
        self.total, self.done, self.begin = seconds, 0.0, time.perf_counter()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {elapsed} {desc}", leave=False)

    @contextlib.contextmanager
    def step(self, name: str, seconds: float) -> Iterator[None]:
        """Around a part that takes about so many seconds."""
        text = f"{clock(self.left)} left | {name}"
        if self._bar is None:
            print(f"{100 * self.done / self.total:3.0f} % | {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_description_str(text)
        yield
        self.done += seconds
        if self._bar is not None:
            self._bar.update(100 * self.done / self.total - self._bar.n)

    @property
    def left(self) -> float:
        """Seconds."""
        pace = (time.perf_counter() - self.begin) / self.done if self.done else 1.0
        return (self.total - self.done) * pace

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
