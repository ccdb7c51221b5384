"""Speed and memory against PyTorch on this CPU: the same weights, the same results, in turns, in one table.

  python -m experiments.benchmarks                              # about 13 minutes on two cores
  python -m experiments.benchmarks --rows='attention|pixel decoder'
  python -m experiments.benchmarks --quick                      # small sizes, to see that everything runs
  python -m experiments.benchmarks --full --rows='full size'    # SDXL's whole U-Net: 24 GiB of memory, minutes

The machine is measured first and last: products, convolutions, memory, by both libraries; the best is the roofline.
Between, every row runs on both sides, each in a process of its own, a pass of ours and a pass of PyTorch in turns.
Outputs are compared first; where they differ, the row has no times. Times are medians. A ratio is the time of PyTorch
divided by ours: above 1 is faster. The roofline is the least time that this machine needs for the operations and bytes
of a row; share is what of it ours reaches. Memory is what a process takes at its peak beyond its libraries: weights,
activations and, on our side, compilation. PyTorch, transformers and diffusers are needed: pip install -e '.[test]'.
Exit code 1 where outputs differ or a side fails; the other rows are measured all the same.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from experiments.benchmarks.bar import Bar
from experiments.benchmarks.first_call import NAMES, measure_first_call
from experiments.benchmarks.machine import measure_machine
from experiments.benchmarks.measure import measure
from experiments.benchmarks.report import LIBRARIES, Report
from experiments.benchmarks.row import Row
from experiments.benchmarks.rows import all_rows
from pixelstory_jax.training.errors import ConfigError, UserError

ROWS = flags.DEFINE_string("rows", "", "Regular expression: only rows whose name has it; 'first call' are those too.")
REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Timed passes of each side at least; slow rows take two when 20 seconds are up."
)
QUICK = flags.DEFINE_bool("quick", False, "Small sizes, to see that everything runs.")
FULL = flags.DEFINE_bool("full", False, "Also SDXL's U-Net of full size, one side after the other.")
THREADS = flags.DEFINE_integer("threads", 0, "Cores that both sides use; 0 for all.")
OUT = flags.DEFINE_string("out", "", "JSON file for all numbers, with the table as Markdown beside it.")

PATIENCE = 1.0  # seconds for each number of the machine
MACHINE_SECONDS, FIRST_CALL_SECONDS = 25.0, 40.0  # about how long these take


def main() -> None:
    threads = check_flags()
    rows, calls = chosen_rows()
    patience = PATIENCE / 50 if QUICK.value else PATIENCE
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that measure
    bar = Bar(2 * MACHINE_SECONDS + sum(row.seconds for row in rows) + FIRST_CALL_SECONDS * len(calls))
    with bar.step("the machine", MACHINE_SECONDS):
        report = Report(threads, *measure_machine(threads, patience), QUICK.value)
    for row in rows:
        with bar.step(row.name, row.seconds):
            report.measured.append(measure(row, REPEATS.value, threads, QUICK.value))
        report.save(OUT.value)
    for name in calls:
        with bar.step(f"first call: {name}", FIRST_CALL_SECONDS):
            report.first_calls.append(measure_first_call(name, threads, QUICK.value))
        report.save(OUT.value)
    with bar.step("the machine again", MACHINE_SECONDS):
        report.measured_again(*measure_machine(threads, patience))
    report.save(OUT.value)
    bar.close()
    print(report.text())
    if any(result.problem for result in report.results):
        sys.exit(1)


def check_flags() -> int:
    """The number of threads; refuses what cannot be run."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"To compare with, install {', '.join(missing)} by: pip install -e '.[test]'")
    try:
        re.compile(ROWS.value)
    except re.error as error:
        raise ConfigError(f"--rows={ROWS.value} is not a regular expression: {error}") from error
    cores = len(os.sched_getaffinity(0))
    if REPEATS.value < 1:
        raise ConfigError(f"--repeats must be at least 1, got {REPEATS.value}")
    if not 0 <= THREADS.value <= cores:
        raise ConfigError(f"--threads must be from 1 to {cores}, the cores of this machine, got {THREADS.value}")
    if OUT.value and not Path(OUT.value).absolute().parent.is_dir():
        raise ConfigError(f"--out={OUT.value} is in a folder that does not exist")
    return THREADS.value or cores


def chosen_rows() -> tuple[list[Row], list[str]]:
    """The rows, and those whose first call is measured, by --rows and --full."""
    known = [row for row in all_rows(QUICK.value) if FULL.value or not row.full]
    rows = [row for row in known if re.search(ROWS.value, row.name, re.IGNORECASE)]
    calls = [name for name in NAMES if re.search(ROWS.value, f"first call: {name}", re.IGNORECASE)]
    if not rows and not calls:
        names = [*(row.name for row in known), *(f"first call: {name}" for name in NAMES)]
        raise ConfigError(f"No row is called like --rows={ROWS.value}; there are:\n  " + "\n  ".join(names))
    return rows, calls


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
