"""Packs a data set into ArrayRecord shards, which `readers/packed.py` describes and reads.

Shards are written into a folder of another name and appear whole; a stopped run goes on after the last whole one. The
same pictures give the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import pixelstory_jax
from pixelstory_jax.data.annotations import Annotation, StoredMask
from pixelstory_jax.data.checking import Problem, Report, examine
from pixelstory_jax.data.images import fit_mask, fitted_size
from pixelstory_jax.data.pipeline import DataError
from pixelstory_jax.data.readers.packed import Packed, PackedSet, Shard, array_record, digest_of, record_of, set_name
from pixelstory_jax.data.readers.reader import Reader
from pixelstory_jax.training.errors import first_line, is_disk_full
from pixelstory_jax.training.files import replacing

WRITER_OPTIONS = "group_size:1,zstd:1"  # one picture can be read alone; files of pictures hardly shrink further
QUALITY = 95  # of a JPEG that is made smaller

Part = tuple[Report, bytes]  # of one picture; the record is empty where the picture cannot be used
Progress = Callable[[int], None]


class PackingError(DataError):
    """A data set that cannot be packed, or a folder that cannot be written; one sentence."""


def check(reader: Reader, numbers: range, processes: int = 0, progress: Progress = lambda done: None) -> Report:
    """The report on pictures `numbers`, read in so many processes (0: in this one); `progress` is called for each."""
    report = Report()
    with _examiner(reader, None, processes) as examined:
        for part, _ in examined(numbers):
            report.add(part)
            progress(1)
    if isinstance(reader, Packed):
        report.problems += [Problem(-1, "shard", "", sentence) for sentence in reader.changed_shards()]
    return report


def pack(
    reader: Reader,
    numbers: range,
    folder: Path,
    *,
    source: str,
    side: int = 0,
    per_shard: int = 1000,
    processes: int = 0,
    progress: Progress = lambda done: None,
) -> Report:
    """Checks and packs pictures `numbers`, but for those that cannot be used, into a new folder.

    Args:
      folder: .../packed/NAME-SPLIT, see `readers.registry.packed_folder`.
      source: where they are from, in any words.
      side: pictures with a longer side are made smaller, to this one, and their masks with them; 0: all stay as stored.
      per_shard: pictures of a shard, and so how much is lost where a run is stopped.
      processes: that read (0: this one reads). progress: called with numbers of pictures done.

    Raises:
      PackingError: the folder exists or cannot be written, the disk is full, or no picture can be used.
    """
    if folder.exists():
        raise PackingError(f"{folder} exists already; remove it to pack the data set anew.")
    plan = {"name": reader.name, "split": reader.split, "pictures": [numbers.start, numbers.stop], "side": side}
    plan |= {"source": source, "per_shard": per_shard, "version": pixelstory_jax.__version__}
    parts = [numbers[start : start + per_shard] for start in range(0, len(numbers), per_shard)]
    stem = set_name(reader.name, reader.split)
    names = [f"{stem}-{k:05d}-of-{len(parts):05d}.array_record" for k in range(len(parts))]
    partial = folder.with_name(f".{folder.name}.partial")
    report, shards = Report(), []
    with _explained(folder), _examiner(reader, side, processes) as examined:
        _begin(partial, plan)
        for name, part in zip(names, parts, strict=True):
            done = _finished(partial / name)
            if done is None:
                done = _write_shard(partial / name, examined(part), progress)
            else:
                progress(len(part))
            report.add(done[0])
            shards.append(done[1])
        if report.usable:
            _finish(partial, folder, reader, source, side, report, [shard for shard in shards if shard.pictures])
        else:
            shutil.rmtree(partial)
    return report


def smaller(annotation: Annotation, image: np.ndarray, side: int) -> tuple[Annotation, bytes]:
    """An annotated picture whose long side is `side`: (with its masks, JPEG file), as `fit_canvas` resizes them."""
    height, width = fitted_size(annotation.size, side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=QUALITY)

    def fitted(mask: np.ndarray) -> StoredMask:
        return fit_mask(mask, side)[:height, :width].astype(bool)

    regions = tuple(
        dataclasses.replace(region, mask=fitted(annotation.mask(number)))
        for number, region in enumerate(annotation.regions)
    )
    ignored = annotation.ignored_mask()
    shrunk = dataclasses.replace(
        annotation, size=(height, width), regions=regions, ignored=None if ignored is None else fitted(ignored)
    )
    return shrunk, file.getvalue()


# Reading, here or in processes.


def _part(reader: Reader, side: int | None, index: int) -> Part:
    """Report and record of a picture; `side` None: no record is wanted."""
    examined = examine(reader, index)
    annotation, picture, image = examined.annotation, examined.picture, examined.image
    if side is None or annotation is None or image is None:
        return examined.report, b""
    if side and max(annotation.size) > side:
        annotation, picture = smaller(annotation, image, side)
    return examined.report, record_of(annotation, picture)


_worker: tuple[Reader, int | None]  # of a process


def _start_worker(reader: Reader, side: int | None) -> None:
    global _worker
    _worker = reader, side


def _part_in_worker(index: int) -> Part:
    return _part(*_worker, index)


@contextmanager
def _examiner(reader: Reader, side: int | None, processes: int) -> Iterator[Callable[[range], Iterable[Part]]]:
    """A function from numbers of pictures to their parts, in order."""
    if not processes:
        yield lambda numbers: (_part(reader, side, index) for index in numbers)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (reader, side)) as pool:
        try:
            yield lambda numbers: pool.map(_part_in_worker, numbers, chunksize=8)
        except BrokenProcessPool as error:
            raise PackingError("A process that reads pictures was killed, as where memory runs out.") from error
        finally:
            pool.shutdown(cancel_futures=True)


# Writing.


def _begin(partial: Path, plan: dict) -> None:
    """The folder of unfinished work; what another plan has left there is removed."""
    file, text = partial / "plan.json", json.dumps(plan)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _finished(path: Path) -> tuple[Report, Shard] | None:
    """What an earlier call noted of a shard that it has written whole."""
    note = path.with_suffix(".json")
    if not note.is_file():
        return None
    fields = json.loads(note.read_bytes())
    return Report.from_json(fields["report"]), Shard(**fields["shard"])


def _write_shard(path: Path, parts: Iterable[Part], progress: Progress) -> tuple[Report, Shard]:
    report = Report()
    with replacing(path) as temporary:
        writer = array_record("array_record_module").ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for part, record in parts:
            report.add(part)
            if record:
                writer.write(record)
            progress(1)
        writer.close()
    shard = Shard(path.name, report.usable, path.stat().st_size, digest_of(path))
    with replacing(path.with_suffix(".json")) as temporary:
        note = {"report": report.to_json(), "shard": dataclasses.asdict(shard)}
        temporary.write_text(json.dumps(note), encoding="utf-8")
    return report, shard


def _finish(
    partial: Path, folder: Path, reader: Reader, source: str, side: int, report: Report, shards: list[Shard]
) -> None:
    """Leaves the shards, with set.json, under their own name; empty ones go."""
    kept = {shard.file for shard in shards}
    for path in partial.iterdir():
        if path.name not in kept:
            path.unlink()
    counts = {"pictures": report.usable, "left_out": report.pictures - report.usable}
    version = pixelstory_jax.__version__
    PackedSet(reader.name, reader.split, source, version, side, counts, tuple(shards)).write(partial)
    partial.rename(folder)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the disk or the library for shards raises, as one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_disk_full(error):
            raise PackingError(
                f"The disk or the quota of {folder.parent} is full; make room, and the same command goes on."
            ) from error
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PackingError(f"{folder} cannot be written: {reason}.") from error
