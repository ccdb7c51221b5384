"""What the commands that move weights show and check: sizes, a bar over bytes, memory, errors of files."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pixelstory_jax.training.errors import UserError, first_line, is_disk_full
from pixelstory_jax.training.host_memory import PeakMemory

RECORD = "pixelstory_jax.json"  # in an export
QUIET_SECONDS = 20.0  # between the lines that stand for a bar where there is no terminal


def size_text(size: float) -> str:
    """13476839424 -> "13.48 GB"; units of 1000, as hubs list files."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def peak_text(peak: PeakMemory) -> str:
    """What `PeakMemory` saw, as a part of a sentence; empty where the system does not tell."""
    return f", at most {size_text(peak.bytes)} of memory on the way" if peak.bytes is not None else ""


@contextlib.contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """A function to call with the name and bytes of each array that is done: a bar with the time left, or lines."""
    bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, desc=title, disable=not sys.stderr.isatty())
    begin = said = time.perf_counter()
    done = 0

    def report(name: str, size: int) -> None:
        nonlocal done, said
        done += size
        bar.update(size)
        now = time.perf_counter()
        if bar.disable and now - said > QUIET_SECONDS:
            said = now
            left = (now - begin) * (total - done) / max(done, 1)
            print(f"{title}: {size_text(done)} of {size_text(total)}, {left:.0f} s left", file=sys.stderr, flush=True)

    with contextlib.closing(bar):
        yield report


@contextlib.contextmanager
def writing(out: str) -> Iterator[None]:
    """Turns what can go wrong while `out` is written into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:  # Orbax turns errors of the system into ValueErrors
        if is_disk_full(error):
            why = "the disk is full or the quota is used up"
        elif isinstance(error, OSError):
            why = error.strerror or str(error)
        else:
            lists = all(line.startswith("  ") for line in str(error).splitlines()[1:])  # below the sentence
            raise UserError(str(error) if lists else first_line(error)) from error
        raise UserError(f"{out} cannot be written ({why}); nothing was left behind") from error


def free_folder(out: str, ours: Callable[[Path], bool]) -> Path:
    """Where --out is, links followed.

    Refused is what exists, unless it is an empty folder or, by `ours`, what the command has written and nothing else:
    it will be deleted as a whole.
    """
    try:
        path = Path(out).expanduser().resolve()
        if path.exists() and not (path.is_dir() and (ours(path) or not any(path.iterdir()))):
            raise UserError(f"{out} exists and is nothing that this command alone has written; choose another --out")
        parent = next(folder for folder in path.parents if folder.exists())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out} cannot be used as --out ({getattr(error, 'strerror', None) or error})") from error
    if not parent.is_dir():
        raise UserError(f"{out} cannot be written: {parent} is no folder")
    if Path.cwd().is_relative_to(path):
        raise UserError(f"{out} is the folder that this command is called in, or above it; choose another --out")
    return path


def is_import(folder: Path) -> bool:
    """Whether a folder is a checkpoint of import_weights and nothing else; those of a training have more parts."""
    names = {path.name for path in folder.iterdir()}
    return {"params", "config"} <= names <= {"params", "config", "tokenizer"}


def write_record(folder: Path, layout: str) -> None:
    """Writes what an export consists of, so that a later one replaces it only while nothing was added to it."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    table = {"written_by": "experiments.export_weights", "format": layout, "files": files}
    (folder / RECORD).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Whether a folder is an export as `write_record` has it, and nothing else."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return isinstance(files, list) and present <= {*map(str, files), RECORD}


def total_and_largest(params: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of all parameters, and of the largest one."""
    sizes = [value.nbytes for value in params.values()]
    return sum(sizes), max(sizes)


def describe(params: Mapping[str, Any]) -> str:
    """ "6,738,415,616 parameters in 12 arrays, bfloat16, 13.48 GB" """
    count = sum(value.size for value in params.values())
    kinds = sorted({str(value.dtype) for value in params.values()})
    total, _ = total_and_largest(params)
    return f"{count:,} parameters in {len(params)} arrays, {' and '.join(kinds)}, {size_text(total)}"


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends; if it fails nothing is left, parents included.

    What a command that was killed has left is removed; one that still runs is not disturbed.

    Raises:
      UserError: another command is writing `out`.
    """
    made = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _clear_leftovers(out, partial)
        partial.mkdir()
        _clear_leftovers(out, partial)  # of one that began at the same moment
        yield partial
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _clear_leftovers(out: Path, own: Path) -> None:
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        process = leftover.name.rsplit(".", 2)[-2]
        if leftover == own or not process.isdigit():
            continue
        if _runs(int(process)):
            raise UserError(f"Another command (process {process}) is writing {out}; wait, or choose another --out")
        shutil.rmtree(leftover, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
