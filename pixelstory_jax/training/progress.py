"""What a person sees while training runs: loss, speed, time left."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from pixelstory_jax.training.goodput import clock
from pixelstory_jax.training.overview import count


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does, all devices together.

    Attributes:
      examples: of a batch. contents: what an example holds, by its unit, as {"images": 1, "tokens": 400}.
      flops: model operations of the step (objectives/flops.py). peak: operations a second by the chips' data sheets;
        None where there is none.
    """

    examples: int
    contents: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    peak: float | None = None

    def rates(self, steps_per_second: float) -> dict[str, float]:
        """Per second: examples, each of their contents, model operations; and `mfu`, their share of the peak."""
        each_second = steps_per_second * self.examples
        rates = {"examples_per_second": each_second}
        rates |= {f"{unit}_per_second": each_second * number for unit, number in self.contents.items()}
        if self.flops:
            rates["model_flops_per_second"] = steps_per_second * self.flops
            if self.peak:
                rates["mfu"] = steps_per_second * self.flops / self.peak
        return rates

    def describe(self, rates: Mapping[str, float]) -> str:
        """Rates for a person: "14.2 images/s 5.68 k tokens/s 90 GFLOP/s (MFU 41.0 %)"."""
        units = list(self.contents) or ["examples"]
        parts = [f"{count(rates[f'{unit}_per_second']).strip()} {unit}/s" for unit in units]
        if "model_flops_per_second" in rates:
            parts.append(f"{count(rates['model_flops_per_second'])}FLOP/s")
        if "mfu" in rates:
            parts.append(f"(MFU {100 * rates['mfu']:.1f} %)")
        return " ".join(parts)


class Progress:
    """A tqdm bar on a terminal; elsewhere one line every `quiet_seconds`. Only process 0 prints.

    Rates are those of the last `WINDOW` steps, without evaluations and the waits for checkpoints; the time left is that
    of the remaining steps at this rate.
    """

    WINDOW = 50

    def __init__(self, first_step: int, steps: int, work: Work, quiet_seconds: float = 30.0) -> None:
        self._steps, self._work = steps, work
        self._quiet_seconds = quiet_seconds
        self._active = jax.process_index() == 0
        self._away = 0.0  # seconds of evaluations and checkpoints, which are no part of the rates
        self._recent = collections.deque([(first_step, time.perf_counter())], maxlen=self.WINDOW)
        self._printed = -quiet_seconds
        self._bar: Any = None
        if self._active and sys.stderr.isatty():
            # Without {remaining}: tqdm takes an evaluation for a slow step.
            layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
            self._bar = tqdm(total=steps, initial=first_step, dynamic_ncols=True, bar_format=layout)

    def update(self, step: int, scalars: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
        """After `step` steps, with their scalars; returns the rates (see `Work.rates`).

        Args:
          shares: percent of the time since the start by section.
        """
        now = time.perf_counter() - self._away
        before, then = self._recent[0]
        steps_per_second = (step - before) / max(now - then, 1e-9)
        self._recent.append((step, now))
        rates = self._work.rates(steps_per_second)
        if self._active:
            self._show(step, scalars, shares, rates, (self._steps - step) / max(steps_per_second, 1e-9))
        return rates

    def _show(
        self,
        step: int,
        scalars: Mapping[str, float],
        shares: Mapping[str, float],
        rates: Mapping[str, float],
        seconds_left: float,
    ) -> None:
        hidden = ("learning_rate", "gradient_norm")
        terms = " ".join(f"{name} {value:.4g}" for name, value in scalars.items() if name not in hidden)
        spent = " ".join(f"{name} {shares[name]:.0f}%" for name in ("data", "step", "eval", "checkpoint"))
        text = f"{terms} | {self._work.describe(rates)} | {spent}"
        left = f"{clock(seconds_left)} left"
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
