"""Compare our code with reference numbers: `python -m tests.golden_check DIR [--except=NAME,...]`.

Every .npz file of DIR is a fixture. Models are built in the size that its `meta` gives. One line per output shows the
largest error and its tolerance. The exit code is 1 where an error is beyond its tolerance, where an output is not
computed, or where a fixture is not covered (unless it is named in --except).
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.golden_cases import CASES, prompt_parsing
from tests.golden_cases.fixture import Fixture


def compare(fixture: Fixture, ours: dict[str, np.ndarray]) -> list[tuple[bool, str]]:
    """One (passed, line) per output of the fixture, and one per output of ours that the fixture does not know."""
    lines = []
    for name, expected in fixture.expected.items():
        tolerance = fixture.tolerance(name)
        if name not in ours:
            lines.append((False, f"{fixture.name} {name}: not computed"))
            continue
        value = np.asarray(ours[name])
        if value.shape != expected.shape:
            lines.append((False, f"{fixture.name} {name}: shape {value.shape}, expected {expected.shape}"))
            continue
        error = float(np.abs(value.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
        lines.append((error <= tolerance, f"{fixture.name} {name}: error {error:.1e}, tolerance {tolerance:.1e}"))
    lines += [
        (False, f"{fixture.name} {name}: not in the fixture") for name in sorted(set(ours) - set(fixture.expected))
    ]
    return lines


def report(name: str, lines: Sequence[tuple[bool, str]], summary: list[str], seconds: float) -> bool:
    """Print the lines of a fixture and add to the summary; whether all passed."""
    for good, line in lines:
        print(f"{'ok    ' if good else 'FAILED'} {line}")
    failures = sum(not good for good, _ in lines)
    verdict = "passed" if failures == 0 else f"FAILED, {failures} outputs"
    summary.append(f"{name}: {verdict} ({len(lines)} outputs, {seconds:.0f} s)")
    return failures == 0


def check(directory: Path, excepted: Sequence[str] = ()) -> bool:
    """Check and print every fixture of `directory`; whether all passed."""
    paths = sorted([*directory.glob("*.npz"), *directory.glob("prompt_parsing.json")])
    if not paths:
        print(f"{directory}: no fixtures (.npz) here.")
        return False
    passed, summary = True, list[str]()
    for path in paths:
        start = time.monotonic()
        if path.stem == "prompt_parsing":
            lines = [] if path.stem in excepted else prompt_parsing.check(path)
            passed &= report(path.name, lines, summary, time.monotonic() - start)
            continue
        fixture = Fixture.load(path)
        if fixture.name in excepted:
            summary.append(f"{path.name}: excepted")
            continue
        if fixture.name not in CASES:
            passed = False
            summary.append(f"{path.name}: FAILED, the fixture {fixture.name} is not covered")
            continue
        try:
            lines = compare(fixture, CASES[fixture.name](fixture))
        except Exception:  # a fixture that cannot be computed fails; the others are still checked
            traceback.print_exc()
            lines = [(False, f"{fixture.name}: could not be computed")]
        passed &= report(path.name, lines, summary, time.monotonic() - start)
    print("\n".join(["", *summary]))
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--except", dest="excepted", default="", metavar="NAME,...", help="fixtures to leave out")
    options = parser.parse_args(arguments)
    return 0 if check(options.directory, [name for name in options.excepted.split(",") if name]) else 1


if __name__ == "__main__":
    sys.exit(main())
