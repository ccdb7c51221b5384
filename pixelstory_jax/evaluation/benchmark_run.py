"""A benchmark from folder to folder: in parts, by several devices and processes, and on after an interruption.

The pictures are cut into chunks of `batch_size` by their numbers. A chunk is always asked as a whole, in the same
batches, by one copy of the model, so its records are the same whoever asks it and when. Each copy writes the chunks
that it has done to a file of its own; at the end the records of all files are put in order, and the scores are computed
from them. A run that is started again asks what is missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.data.builtin.questions import question as make_question
from pixelstory_jax.data.masks import decode_rle, mask_box
from pixelstory_jax.data.readers.reader import Reader, open_picture
from pixelstory_jax.evaluation.benchmark_records import Answerer, Record, make_records
from pixelstory_jax.evaluation.benchmark_scores import LABELS, BenchmarkReport, iou, question_iou
from pixelstory_jax.evaluation.benchmarks import find_benchmark
from pixelstory_jax.evaluation.metrics import QuestionScore
from pixelstory_jax.evaluation.protocol import EvaluationExample, ScoredAnswer
from pixelstory_jax.evaluation.sheets import answer_sheet
from pixelstory_jax.inference.answers import Answer, Target
from pixelstory_jax.training.files import replacing

SETTINGS, PARTS, RECORDS = "settings.json", "parts", "records.jsonl"


@dataclass(frozen=True)
class BenchmarkRun:
    """What decides the records of a run, beside the data.

    Attributes:
      benchmark, split: what is asked; forms: of `benchmarks.FORMS`.
      checkpoint: which weights; max_new_tokens: longest answer.
      pictures: the first so many are asked about.
      batch_size: pictures in a chunk, and questions in a batch.
      seed: see `make_records`.
    """

    benchmark: str
    split: str
    forms: tuple[str, ...]
    checkpoint: str
    max_new_tokens: int
    pictures: int
    batch_size: int
    seed: int

    @property
    def chunks(self) -> list[tuple[str, range]]:
        """(form, numbers of its pictures), in the order in which they are shared out."""
        starts = range(0, self.pictures, self.batch_size)
        return [
            (form, range(start, min(start + self.batch_size, self.pictures))) for form in self.forms for start in starts
        ]


def claim_folder(run: BenchmarkRun, out: Path) -> None:
    """Makes the folder of a run, or goes on with it.

    Raises:
      ValueError: it holds another run, or something else.
    """
    wanted = json.loads(json.dumps(asdict(run)))
    path = out / SETTINGS
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} exists and holds no benchmark that was begun; choose another --out")
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in wanted if found.get(name) != wanted[name]]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out") from error
    if differing:
        what = ", ".join(f"{name} {found.get(name)!r} rather than {wanted[name]!r}" for name in differing)
        raise ValueError(f"{out} holds another run ({what}); choose another --out")


def ask_missing(
    run: BenchmarkRun,
    reader: Reader,
    answerers: Sequence[Answerer],
    out: Path,
    process: int = 0,
    processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Asks the share of this process of what is missing in `out`, with one thread for each of `answerers`.

    Process i of n with m answerers has the workers i * m to i * m + m - 1, and worker w the chunks w, w + n * m, ...
    """
    done = {(record["form"], record["index"]) for record in read_parts(out)}
    workers = processes * len(answerers)
    stopped, lock = threading.Event(), threading.Lock()
    left = [
        number
        for number, (form, indices) in enumerate(run.chunks)
        if number % workers // len(answerers) == process and any((form, index) not in done for index in indices)
    ]
    finished = 0

    def work(own: int) -> None:
        nonlocal finished
        worker = process * len(answerers) + own
        path = out / PARTS / f"{worker:05d}.jsonl"
        with open(path, "ab") as file:
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # ends a line that was cut when the run before was ended
            for number in left:
                if number % workers != worker or stopped.is_set():
                    continue
                form, indices = run.chunks[number]
                benchmark = find_benchmark(run.benchmark)
                records = make_records(benchmark, form, reader, indices, answerers[own], run.batch_size, run.seed)
                file.write("".join(json.dumps(record) + "\n" for record in records).encode("ascii"))
                file.flush()
                with lock:
                    finished += 1
                    say(f"{finished} of {len(left)} chunks of {run.batch_size} pictures")

    with ThreadPoolExecutor(len(answerers)) as pool:
        futures = [pool.submit(work, own) for own in range(len(answerers))]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()


def read_parts(out: Path) -> Iterator[Record]:
    """All records that were written; a line that was cut is passed over."""
    for path in sorted((out / PARTS).glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def merge_records(run: BenchmarkRun, out: Path) -> list[Record]:
    """All records in order, each once; written to records.jsonl."""
    found = {(record["form"], record["index"]): record for record in read_parts(out)}
    wanted = [(form, index) for form in run.forms for index in range(run.pictures)]
    missing = [place for place in wanted if place not in found]
    if missing:
        raise ValueError(f"{out} lacks the records of {len(missing)} pictures; run the same command again.")
    records = [found[place] for place in wanted]
    write_lines(out / RECORDS, records)
    return records


def write_lines(path: Path, records: Iterable[Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_report(report: BenchmarkReport, out: Path, more: dict[str, Any]) -> None:
    """metrics.json (with `more` beside the scores) and table.txt."""
    with replacing(out / "metrics.json") as temporary:
        labels = {form: LABELS[form] for form in report.scores}
        content = {**more, "skipped": report.skipped, "forms": labels, "scores": report.scores}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with replacing(out / "table.txt") as temporary:
        temporary.write_text(report.table + "\n", encoding="utf-8")


def best_and_worst(records: Sequence[Record], count: int) -> dict[str, list[tuple[Record, Record]]]:
    """ "best" and "worst": (record, question) of the paper form by IoU, those of equal IoU in order."""
    scored = [
        (question_iou(question), record, question)
        for record in records
        if record["form"] == "paper" and "skipped" not in record
        for question in record["questions"]
        if "pairs" in question
    ]
    ordered = sorted(scored, key=lambda item: -item[0])
    worst = sorted(scored, key=lambda item: item[0])
    return {
        name: [(record, question) for _, record, question in items[:count]]
        for name, items in (("best", ordered), ("worst", worst))
        if items and count
    }


def answer_pages(
    benchmark: str, split: str, seed: int, reader: Reader, records: Sequence[Record], count: int
) -> dict[str, np.ndarray]:
    """Pages with the answers of the best and the worst IoU: "best" and "worst"."""
    title = f"{benchmark} {split}"
    return {
        which: answer_sheet(
            [_shown(benchmark, title, seed, reader, record, question) for record, question in items],
            f"{title}: {which} answers",
        )
        for which, items in best_and_worst(records, count).items()
    }


def _shown(benchmark: str, title: str, seed: int, reader: Reader, record: Record, question: Record) -> ScoredAnswer:
    """A record as the sheets take it: the picture and the true masks are read again."""
    annotation = reader[record["index"]]
    image = open_picture(reader, record["index"], record["picture"])
    rng = np.random.default_rng((seed, record["index"]))
    number = next(k for k, other in enumerate(record["questions"]) if other is question)
    asked = list(find_benchmark(benchmark).ask["paper"](annotation, rng))[number]
    true = [
        np.any([annotation.mask(region) for region in mask], axis=0) if mask else np.zeros(annotation.size, bool)
        for mask in asked.masks
    ]
    size = tuple(record["size"])
    predicted = [decode_rle({"size": size, "counts": counts}) for counts in question["masks"]]
    targets = tuple(
        Target(phrase, mask, 0.0, mask_box(mask)) for phrase, mask in zip(question["said"], predicted, strict=True)
    )
    example = EvaluationExample(title, image, np.array(true).reshape(-1, *size), ())
    ious = tuple(iou(pair[2], pair[3]) for pair in question["pairs"])
    overlap, union = (sum(pair[k] for pair in question["pairs"]) for k in (2, 3))
    return ScoredAnswer(
        example,
        make_question(", ".join(asked.groups[:1]) or "answer", asked.text, asked.answer),
        Answer(question["answer"], targets, tuple(question["pieces"])),
        QuestionScore(ious, overlap, union, named=None, rejected=None),
    )
