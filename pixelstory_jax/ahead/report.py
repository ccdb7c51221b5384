"""Compiles a program for a slice and says what it takes: memory, communication, and what bounds its time.

Bounds are those of a roofline: each of products, memory traffic and links is taken by itself at the speed of the chip's
data sheet, all three overlapping fully. A real step is slower than the slowest of them, never faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from pixelstory_jax.ahead import hlo
from pixelstory_jax.ahead.programs import Program
from pixelstory_jax.ahead.slices import Slice, mesh_shape

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same axes, summed. bytes: of whole arrays. traffic: received by a device."""

    operation: str
    axes: str
    count: float
    bytes: float
    traffic: float
    seconds: float
    largest: str
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found out of one program on one slice. All sizes in bytes per chip, times in seconds.

    memory: by part, with "temporaries" and "peak"; `limit` is what a program may take. model_flops: of all chips.
    program_flops: products of the compiled program per chip, loops in full. xla_flops: XLA's count, loop bodies once.
    bounds: seconds of "compute", "memory" and "links". too_large: the compiler's words where it does not fit.
    """

    program: str
    topology: str
    chip: str
    chips: int
    mesh: Mapping[str, int]
    fits: bool
    limit: float
    memory: Mapping[str, float]
    compile_seconds: float
    replicated: tuple[tuple[str, float], ...] = ()
    model_flops: float | None = None
    program_flops: float = 0.0
    xla_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: tuple[Traffic, ...] = ()
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "example"
    units: int = 1
    peak_flops: float = 0.0
    too_large: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return max(self.bounds.values())

    @property
    def binding(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def mfu(self) -> float | None:
        """The largest model FLOPs utilisation that the bound leaves room for."""
        if self.model_flops is None:
            return None
        return self.model_flops / (self.seconds * self.chips * self.peak_flops)

    def as_json(self) -> dict[str, Any]:
        result = dataclasses.asdict(self) | {"note": "compiled, not run"}
        if self.fits:
            result |= {"seconds": self.seconds, "binding": self.binding, "mfu": self.mfu}
        return result


def _text(dump: Path) -> str:
    """The compiled program, as the compiler has written it down.

    Not by `as_text`: jaxlib cannot read back from an executable what v5p and v6e do on their SparseCores.
    """
    return max(dump.glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size).read_text()


def compile_ahead(program: Program, on: Slice) -> Report:
    """Lowers and compiles `program` for the chips of its mesh, and reads the result."""
    devices = list(program.mesh.devices.flat)
    shared: dict[str, Any] = {
        "program": program.what,
        "topology": on.name,
        "chip": on.chip.name,
        "chips": len(devices),
        "mesh": mesh_shape(program.mesh),
        "limit": on.chip.hbm_usable_bytes or on.chip.hbm_bytes,
        "model_flops": program.model_flops,
        "replicated": program.replicated,
        "unit": program.unit,
        "units": program.units,
        "peak_flops": on.chip.flops,
    }
    start = time.perf_counter()
    with jax.sharding.set_mesh(program.mesh), _without_cache(), tempfile.TemporaryDirectory() as dump:
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used, lines = too_large(str(error))
            return Report(
                **shared,
                fits=False,
                memory={**program.parts, "peak": used},
                compile_seconds=time.perf_counter() - start,
                too_large=lines,
            )
        seconds = time.perf_counter() - start
        found = hlo.costs(_text(Path(dump)), mesh_shape(program.mesh))
    collectives = summed(found.collectives, on, devices)
    analysis = compiled.cost_analysis() or {}
    return Report(
        **shared,
        fits=True,
        memory=memory(program, compiled.memory_analysis()),
        compile_seconds=seconds,
        program_flops=found.flops,
        xla_flops=float(analysis.get("flops", 0.0)),
        hbm_bytes=found.hbm_bytes,
        collectives=collectives,
        bounds={
            "compute": found.flops / on.chip.flops,
            "memory": found.hbm_bytes / on.chip.hbm_bandwidth,
            "links": sum(entry.seconds for entry in collectives),
        },
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """What is compiled for absent devices cannot be read back from the cache of compiled programs."""
    usual = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether it uses one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", usual)
        compilation_cache.reset_cache()


def memory(program: Program, analysis: Any) -> dict[str, float]:
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    peak = analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes
    return {
        **program.parts,
        "results": float(results),
        "temporaries": float(analysis.temp_size_in_bytes),
        "program": float(analysis.generated_code_size_in_bytes),
        "peak": float(peak + analysis.generated_code_size_in_bytes),
    }


def too_large(message: str) -> tuple[float, tuple[str, ...]]:
    """(bytes that would be used, what to tell) from the compiler's refusal."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}
    used = re.search(r"(?:Used |temporaries \()([\d.]+)([KMG]?)(?: of|\) exceeds)", message)
    total = float(used[1]) * units[used[2]] if used else 0.0
    largest = re.findall(r"Size: ([\d.]+[KMG]?B?)\s+(?:Operator: op_name=\"([^\"]*)\")?.*?\n?\s*Shape: (\S+)", message)
    lines = tuple(f"{size}  {shape.split('{')[0]}  {name[-90:]}".rstrip() for size, name, shape in largest[:6])
    return total, lines


def summed(collectives: tuple[hlo.Collective, ...], on: Slice, devices: list[Any]) -> tuple[Traffic, ...]:
    """By kind and axes, the one that takes longest first."""
    groups: dict[tuple[str, str], list[hlo.Collective]] = {}
    for one in collectives:
        groups.setdefault((one.operation, one.axes), []).append(one)
    entries = [
        Traffic(
            operation,
            axes,
            sum(one.count for one in members),
            sum(one.bytes for one in members),
            sum(one.traffic for one in members),
            sum(one.traffic / on.bandwidth(one.group, devices) for one in members),
            members[0].shape,
            members[0].source,
        )
        for (operation, axes), members in groups.items()
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.seconds))


def table(report: Report) -> str:
    """What a person reads."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [
        f"{report.program}",
        f"{report.topology}: {report.chips} {report.chip} chips, mesh {mesh}. Compiled in "
        f"{report.compile_seconds:.0f} s, not run.",
        "",
        f"Memory of a chip (GB)        of {report.limit / GB:.2f} that a program may take",
        *(f"  {name:<24} {_figure(size / GB)}" for name, size in report.memory.items()),
    ]
    for path, size in report.replicated:
        lines.append(f"  every chip holds all of {path}: {size / GB:.3g}")
    if not report.fits:
        return "\n".join([*lines, *_refusal(report)])
    lines += [
        "",
        "Operations of a chip and run (TFLOP)",
        *(
            [f"  {'the model needs':<24} {_figure(report.model_flops / report.chips / 1e12)}"]
            if report.model_flops
            else []
        ),
        f"  {'the program does':<24} {_figure(report.program_flops / 1e12)}  loops in full, recomputation included",
        f"  {'XLA counts':<24} {_figure(report.xla_flops / 1e12)}  the body of a loop once, no kernels",
        "",
        f"Collectives{'':<15}{'axes':<14}{'times':>8}{'GB whole':>11}{'GB received':>13}{'ms':>9}  largest",
    ]
    for one in report.collectives:
        lines.append(
            f"  {one.operation:<24}{one.axes:<14}{one.count:>8.0f}{one.bytes / GB:>11.3f}{one.traffic / GB:>13.3f}"
            f"{one.seconds * 1e3:>9.2f}  {one.largest}"
        )
    lines += ["", "Bounds (ms)", f"  {'compute':<24} {_figure(report.bounds['compute'] * 1e3)}"]
    lines.append(f"  {'memory':<24} {_figure(report.bounds['memory'] * 1e3)}  {report.hbm_bytes / GB:.3g} GB moved")
    lines.append(f"  {'links':<24} {_figure(report.bounds['links'] * 1e3)}")
    rate = report.units / report.seconds
    utilisation = f", MFU at most {report.mfu:.2f}" if report.mfu is not None else ""
    lines.append(
        f"A run takes at least {report.seconds * 1e3:.3g} ms ({report.binding} binds): at most {rate:.3g} "
        f"{report.unit}s a second{utilisation}."
    )
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:9.2f}" if value >= 0.1 or value == 0 else f"{value:9.2g}"


def summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of reports as `Report.as_json` gives them, one row each."""
    head = [
        "program",
        "slice",
        "mesh",
        "GB a chip",
        "TFLOP",
        "GB received",
        "ms compute / memory / links",
        "MFU",
        "rate",
    ]
    rows = [head, ["---"] * len(head), *map(_summary_row, reports)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _summary_row(report: Mapping[str, Any]) -> list[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    peak, limit = report["memory"]["peak"] / GB, report["limit"] / GB
    start = [report["program"], report["topology"], mesh or "one chip"]
    if not report["fits"]:
        return [*start, f"**{peak:.1f}** of {limit:.1f}: {peak - limit:.1f} too many", "", "", "", "", ""]
    bounds = {name: f"{seconds * 1e3:.0f}" for name, seconds in report["bounds"].items()}
    bounds[report["binding"]] = f"**{bounds[report['binding']]}**"
    received = sum(one["traffic"] for one in report["collectives"]) / GB
    return [
        *start,
        f"{peak:.1f} of {limit:.1f}",
        f"{report['program_flops'] / 1e12:.1f}",
        f"{received:.1f}",
        ", ".join(bounds[name] for name in ("compute", "memory", "links")),
        "" if report["mfu"] is None else f"≤ {report['mfu']:.2f}",
        f"≤ {report['units'] / report['seconds']:.3g} {report['unit']}s/s",
    ]


def _refusal(report: Report) -> list[str]:
    over = report.memory["peak"] - report.limit
    lines = ["", f"It does not fit: {over / GB:.2f} GB too many on each chip."]
    if report.too_large:
        lines += ["The largest parts:", *(f"  {line}" for line in report.too_large)]
    help_with = []
    arguments = sum(size for name, size in report.memory.items() if name != "peak")
    if arguments > report.limit / 2:
        help_with.append(
            "parameters and optimizer over more chips (--mesh with a larger fsdp or tensor, a larger slice)"
        )
    help_with.append("a smaller batch (--batch), or train.accumulate")
    help_with.append("rematerialisation (model.*.remat=full)")
    return [*lines, f"What helps: {'; '.join(help_with)}."]
