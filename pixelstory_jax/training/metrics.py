"""Scalars and pictures of a run: JSONL and TensorBoard, written by process 0 only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelstory_jax.training.files import replacing


class MetricWriter:
    """WORKDIR/metrics.jsonl (one object per line: step, kind, scalars) and WORKDIR/tensorboard.

    A resumed run continues at `first_step`: lines of later steps, written after the checkpoint that it resumes from,
    are dropped, so that the file reads like that of an unbroken run.

    Attributes:
      reached: the last step that such a line told of, as far as steps were logged; `first_step` if there was none.
    """

    def __init__(self, workdir: Path, first_step: int = 0) -> None:
        self.reached = first_step
        self.active = jax.process_index() == 0
        self.jsonl = workdir / "metrics.jsonl"
        self.tensorboard = workdir / "tensorboard"
        if not self.active:
            return
        from pixelstory_jax.training.event_file import (
            EventFile,
        )  # here: its import takes a second; only one process needs it

        self.reached = _drop_after(self.jsonl, first_step)
        self._lines = self.jsonl.open("a", encoding="utf-8")
        self._events = EventFile(self.tensorboard, first_step)

    def scalars(self, step: int, kind: str, values: Mapping[str, float], **extra: Any) -> None:
        """One line {"step", "kind", **extra, **values}; non-finite numbers become null there.

        Raises:
          OSError: it could not be written, because the disk is full for one.
        """
        if not self.active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        clean = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **extra, **clean}) + "\n")
        self._lines.flush()
        self._events.scalars(step, {f"{kind}/{name}": value for name, value in numbers.items()})

    def images(self, step: int, kind: str, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures uint8 [H, W, 3] into TensorBoard; OSError as `scalars`."""
        if not self.active:
            return
        for name, picture in pictures.items():
            self._events.image(step, f"{kind}/{name}", picture)

    def close(self) -> None:
        if self.active:
            try:
                self._lines.close()
            finally:
                self._events.close()


def read_metrics(workdir: Path | str, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of WORKDIR/metrics.jsonl (a line cut off by a crash is left out)."""
    lines = []
    for line in (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if kind is None or record["kind"] == kind:
            lines.append(record)
    return lines


def _drop_after(path: Path, step: int) -> int:
    """Drops the lines of later steps; returns the last step that the file told of, at least `step`."""
    if not path.exists():
        return step
    records = read_metrics(path.parent)
    with replacing(path) as temporary:
        kept = (json.dumps(record) + "\n" for record in records if record["step"] <= step)
        temporary.write_text("".join(kept), encoding="utf-8")
    return max([step, *(record["step"] for record in records)])
