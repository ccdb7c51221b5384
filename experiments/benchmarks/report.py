"""All that was measured, as a text and as files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

from experiments.benchmarks.first_call import FirstCall
from experiments.benchmarks.machine import Peaks
from experiments.benchmarks.measure import Result
from experiments.benchmarks.table import first_call_table, machine_table, result_table
from pixelstory_jax.training.files import replacing

LIBRARIES = ("jax", "torch", "transformers", "diffusers")
EXTENSIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX bfloat16"}


@dataclass
class Report:
    """The measurements of a run.

    ours_at_best, torch_at_best: what both libraries reach on this machine.
    quick: whether the sizes were small, so that names of rows say too much and times nothing.
    """

    threads: int
    ours_at_best: Peaks
    torch_at_best: Peaks
    quick: bool = False
    measured: list[Result] = field(default_factory=list)
    first_calls: list[FirstCall] = field(default_factory=list)

    def measured_again(self, ours: Peaks, torch: Peaks) -> None:
        """Takes another measurement of the machine: of each rate the better one counts."""
        self.ours_at_best, self.torch_at_best = better(self.ours_at_best, ours), better(self.torch_at_best, torch)

    @property
    def results(self) -> list[Result]:
        """The lines with the roofline of this machine, which is the better of both libraries."""
        peaks = better(self.ours_at_best, self.torch_at_best)
        return [result.on(peaks) for result in self.measured]

    def text(self) -> str:
        parts = [
            f"{describe_cpu()}, {self.threads} threads; {versions()}",
            machine_table(self.ours_at_best, self.torch_at_best),
        ]
        if self.quick:
            parts.append("Small sizes: this shows that everything runs, the times say nothing.")
        if self.results:
            parts.append(result_table(self.results))
        if self.first_calls:
            parts.append(first_call_table(self.first_calls))
        unsteady = [result.name for result in self.results if not result.steady]
        if unsteady:
            parts.append(f"The machine did other work beside these rows, whose passes vary: {'; '.join(unsteady)}.")
        parts += [f"{result.name}: {result.problem}." for result in self.results if result.problem]
        return "\n\n".join(parts)

    def save(self, file: str) -> None:
        """The JSON file and the text in Markdown beside it; nothing where `file` is empty."""
        if not file:
            return
        numbers = {
            "cpu": describe_cpu(),
            "versions": versions(),
            "threads": self.threads,
            "quick": self.quick,
            "at_best": {"jax": self.ours_at_best, "torch": self.torch_at_best},
            "rows": [result.as_json() for result in self.results],
            "first_calls": [dataclasses.asdict(call) for call in self.first_calls],
        }
        for path, text in ((Path(file), json.dumps(numbers, indent=2)), (Path(file).with_suffix(".md"), self.text())):
            with replacing(path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")


def better(one: Peaks, other: Peaks) -> Peaks:
    return {kind: max(rate, other[kind]) for kind, rate in one.items()}


def describe_cpu() -> str:
    """Architecture, and the extensions that matter here where the system tells them."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else set()
    return " ".join([platform.machine(), *(name for flag, name in EXTENSIONS.items() if flag in flags)])


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
