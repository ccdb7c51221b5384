"""A trace of chosen steps for XProf: what the devices and the host did, operation by operation."""

from __future__ import annotations

from pathlib import Path

import jax

from pixelstory_jax.training.options import ProfileOptions


class Profiler:
    """Traces the steps of `options` into WORKDIR/profile, in process 0."""

    def __init__(self, options: ProfileOptions, workdir: Path) -> None:
        self._span = options.span if jax.process_index() == 0 else None
        self._folder = workdir / "profile"
        self._running = False

    def begins(self, step: int) -> bool:
        """Whether to `start` before this step. A run resumed within the span traces what is left of it."""
        return self._span is not None and not self._running and self._span[0] <= step <= self._span[1]

    def ends(self, step: int) -> bool:
        """Whether to `stop` after this step."""
        return self._running and self._span is not None and step == self._span[1]

    def start(self) -> None:
        jax.profiler.start_trace(self._folder)
        self._running = True

    def stop(self) -> str:
        """Writes the trace; returns where it is and how it is looked at."""
        jax.profiler.stop_trace()
        self._running = False
        return f"Trace in {self._folder}; to look at it: pip install xprof && xprof --port 8791 {self._folder}"

    def close(self) -> None:
        if self._running:
            self.stop()
