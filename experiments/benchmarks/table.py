"""The measurements as text: a table in Markdown, which reads well on a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmarks.first_call import FirstCall
from experiments.benchmarks.machine import KINDS, Peaks
from experiments.benchmarks.measure import Result

MIB = 1 << 20
NOTHING = "-"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join([first.strip().ljust(widths[0]), *rest])} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return "\n".join([line(header), rule, *map(line, lines)])


def result_table(results: Sequence[Result]) -> str:
    """One line a row."""
    header = (
        "row",
        "ours, ms",
        "PyTorch, ms",
        "ratio",
        "GFLOP/s",
        "roofline, ms",
        "share",
        "ours, MiB",
        "PyTorch, MiB",
    )
    return markdown((*header, "wanted", "met"), [_line(result) for result in results])


def _line(result: Result) -> list[str]:
    speed = result.flops / result.ours / 1e9 if result.flops and result.ours else None
    return [
        result.name,
        milliseconds(result.ours),
        milliseconds(result.torch),
        NOTHING if result.ratio is None else f"{result.ratio:.2f}",
        NOTHING if speed is None else f"{speed:.0f}",
        milliseconds(result.roofline),
        NOTHING if result.share is None else f"{result.share:.2f}",
        *(NOTHING if held is None else f"{held / MIB:.0f}" for held in (result.our_memory, result.torch_memory)),
        wanted(result),
        "differs" if result.problem else "yes" if result.met else "no",
    ]


def milliseconds(seconds: float | None) -> str:
    """Three digits, or all before the point."""
    if seconds is None:
        return NOTHING
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def wanted(result: Result) -> str:
    """The targets of a row: ratio, and share of the roofline where that counts."""
    share = "" if result.share_target is None else f", share {result.share_target:g}"
    return f"{result.target:g}{share}"


def machine_table(ours: Peaks, torch: Peaks) -> str:
    """What both libraries reach."""
    lines = [
        *([f"{kind}, GFLOP/s", *(f"{side[kind] / 1e9:.0f}" for side in (ours, torch))] for kind in KINDS),
        ["memory, GB/s", *(f"{side['memory'] / 1e9:.1f}" for side in (ours, torch))],
    ]
    return markdown(("at best", "JAX", "PyTorch"), lines)


def first_call_table(calls: Sequence[FirstCall]) -> str:
    """The wait for the first result."""
    lines = [[call.name, f"{call.cold:.1f}", f"{call.warm:.1f}", f"{call.later:.2f}"] for call in calls]
    return markdown(("first call, seconds", "cold cache", "warm cache", "later calls"), lines)
