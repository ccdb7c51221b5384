"""Scalars and pictures of a run: JSONL and TensorBoard, written by process 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


class MetricWriter:
    """WORKDIR/metrics.jsonl (one object per line: step, kind, scalars) and WORKDIR/tensorboard.

    A resumed run continues at `first_step`: lines of later steps, written after the checkpoint that it resumes from,
    are dropped, so that the file reads like that of an unbroken run.
    """

    def __init__(self, workdir: Path, first_step: int = 0) -> None:
        self.active = jax.process_index() == 0
        self.jsonl = workdir / "metrics.jsonl"
        self.tensorboard = workdir / "tensorboard"
        if not self.active:
            return
        from tensorboardX import SummaryWriter  # here, because it costs time at import and other processes need it not

        _drop_after(self.jsonl, first_step)
        self._lines = self.jsonl.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.tensorboard), purge_step=first_step + 1 if first_step else None)

    def scalars(self, step: int, kind: str, values: Mapping[str, float], **extra: Any) -> None:
        """One line {"step", "kind", **extra, **values}; non-finite numbers become null there."""
        if not self.active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        clean = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._lines.write(json.dumps({"step": step, "kind": kind, **extra, **clean}) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def images(self, step: int, kind: str, pictures: Mapping[str, np.ndarray]) -> None:
        """Pictures uint8 [H, W, 3] into TensorBoard."""
        if not self.active:
            return
        for name, picture in pictures.items():
            self._board.add_image(f"{kind}/{name}", picture, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        if self.active:
            self._lines.close()
            self._board.close()


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


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)


def not_finite(values: Mapping[str, float]) -> list[str]:
    """The names, with their values, of those that are nan or infinite."""
    return [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
