"""Compile a training step, an answer or a story for a TPU slice that is not there, and say what it would take.

  python -m experiments.compile_ahead --config=configs/pixellm.py:7b --topology=v5e:4x4 --batch=16
  python -m experiments.compile_ahead --config=configs/pixellm.py:7b --topology=v5p:4x4x4 --mesh=data=1,fsdp=16,tensor=4
  python -m experiments.compile_ahead --config=configs/storydiffusion.py:sdxl --topology=v5e:2x2 --objective=sample

Needs the compiler for TPUs (pip install libtpu, Linux), no TPU, no data and no weights. Prints memory, operations,
collectives and a roofline bound per chip, and writes them as JSON (--out); --summary puts several into one table.
--search finds the largest batch that fits. docs/pods.md has the tables of the published models and tells how to read
them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import ConfigError

if TYPE_CHECKING:
    from pixelstory_jax.ahead.report import Report
    from pixelstory_jax.ahead.slices import Slice

CONFIG = command_line.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "", "Slice: chip (v4, v5e, v5p, v6e) and sides, as v5e:16x16 or v5p:4x4x4.")
MESH = flags.DEFINE_string("mesh", "", "As data=1,fsdp=64,tensor=4; empty: config.train.mesh, for stories data=2.")
OBJECTIVE = flags.DEFINE_enum("objective", "train", ["train", "generate", "sample"], "What is compiled.")
BATCH = flags.DEFINE_integer("batch", 0, "Examples, questions, or panels of the story; 0: config.train.batch_size.")
CACHED = flags.DEFINE_bool("cached", False, "Train on stories of experiments.cache_stories: no encoders in the step.")
SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch that fits, doubling and halving from --batch.")
OUT = flags.DEFINE_string("out", "", "File for the JSON; empty: none.")
SUMMARY = flags.DEFINE_string("summary", "", "Print a table of such files in this folder instead, and compile nothing.")


def main() -> None:
    if SUMMARY.value:
        print(summary_of(Path(SUMMARY.value)))
        return
    if CONFIG.value is None or not TOPOLOGY.value:
        raise ConfigError(
            "Say what to compile, and for which slice: --config=configs/pixellm.py:7b --topology=v5e:4x4 (see --help)"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu would look for a chip of its own
    from pixelstory_jax.ahead.report import table
    from pixelstory_jax.ahead.slices import Slice

    on = Slice(TOPOLOGY.value)
    config = CONFIG.value.unlock()
    if MESH.value:
        config.train.mesh = parse_mesh(MESH.value)
    batch = BATCH.value or (4 if OBJECTIVE.value == "sample" else config.train.batch_size)
    report = search(config, on, batch) if SEARCH.value else compiled(config, on, batch)
    print(table(report), flush=True)
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(report.as_json(), indent=1) + "\n")
        print(f"\nWritten: {OUT.value}")
    if not report.fits:
        sys.exit(1)


def summary_of(folder: Path) -> str:
    """A Markdown table of the reports in a folder, in the order of their names."""
    from pixelstory_jax.ahead.report import summary

    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"There is no report in {folder}; --out writes them")
    return summary([json.loads(file.read_text()) for file in files])


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=1,fsdp=64,tensor=4" as a dict."""
    try:
        return {axis.strip(): int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--mesh={text} is not of the form data=1,fsdp=64,tensor=4") from error


def compiled(config: Any, on: Slice, batch: int) -> Report:
    """The report of what the flags ask for, with `batch` examples, questions or panels."""
    from pixelstory_jax.ahead import programs
    from pixelstory_jax.ahead.report import compile_ahead
    from pixelstory_jax.training.options import TrainOptions
    from pixelstory_jax.training.sharding import build_mesh

    stories = OBJECTIVE.value == "sample" and not MESH.value
    mesh = build_mesh({"data": 2, "fsdp": -1} if stories else TrainOptions.from_config(config.train).mesh, on.devices)
    print(f"Compiling for {on.name}, batch {batch}; a large model takes minutes ...", file=sys.stderr, flush=True)

    def program() -> programs.Program:
        if OBJECTIVE.value == "generate":
            return programs.answer_program(config, mesh, batch)
        if OBJECTIVE.value == "sample":
            return programs.story_program(config, mesh, batch)
        config.train.batch_size = batch
        return programs.training_program(config, mesh, CACHED.value)

    return compile_ahead(command_line.explain(program), on)


def search(config: Any, on: Slice, batch: int) -> Report:
    """The report of the largest batch, of `batch` times a power of two, that fits; of the smallest if none does."""
    best: Report | None = None
    while True:
        report = compiled(config, on, batch)
        if report.fits:
            best, batch = report, batch * 2
        elif best is not None or batch % 2:
            return best or report
        else:
            smaller = batch // 2
            ways = report.mesh["data"] * report.mesh["fsdp"]
            if smaller % ways:
                return report
            batch = smaller
            best = None
        print(f"  {'fits' if report.fits else 'does not fit'}: {report.memory['peak'] / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
