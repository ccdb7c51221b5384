"""Runs in parts: interrupted, by several workers, and their folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixelstory_jax.evaluation import benchmark_run as module
from pixelstory_jax.evaluation.benchmark_run import (
    BenchmarkRun,
    answer_pages,
    ask_missing,
    best_and_worst,
    claim_folder,
    merge_records,
    read_parts,
    write_report,
)
from pixelstory_jax.evaluation.benchmark_scores import question_iou, score_records
from tests.evaluation.toy_benchmark import ToyReader, annotation, guessing

PICTURES = 11


@pytest.fixture(scope="module")
def reader():
    rng = np.random.default_rng(0)
    return ToyReader(annotation(rng, "questions", targets=4) for _ in range(PICTURES))


def run(**changes) -> BenchmarkRun:
    settings = {
        "benchmark": "muse", "split": "val", "forms": ("paper", "released"), "checkpoint": "runs/x",
        "max_new_tokens": 8, "pictures": PICTURES, "batch_size": 2, "seed": 5,
    }  # fmt: skip
    return BenchmarkRun(**{**settings, **changes})


def whole(reader, out) -> dict[str, bytes]:
    """Files of a run by one process without an interruption."""
    claim_folder(run(), out)
    ask_missing(run(), reader, [guessing()], out)
    return finished(out)


def finished(out) -> dict[str, bytes]:
    records = merge_records(run(), out)
    write_report(score_records("muse", "val", records), out, {"benchmark": "muse"})
    return {name: (out / name).read_bytes() for name in ("records.jsonl", "metrics.json", "table.txt")}


class Killed(Exception):
    pass


def failing_after(calls: int):
    answerer = guessing()
    original = answerer.answer

    def answer(number, turns):
        if answerer.calls > calls:
            raise Killed
        return original(number, turns)

    answerer.answer = answer
    return answerer


def test_a_run_that_was_ended_anywhere_goes_on_to_the_same_files(reader, tmp_path):
    expected = whole(reader, tmp_path / "whole")
    out = tmp_path / "ended"
    claim_folder(run(), out)
    for calls in (1, 7, 3):
        with pytest.raises(Killed):
            ask_missing(run(), reader, [failing_after(calls)], out)
        with open(out / "parts" / "00000.jsonl", "ab") as file:
            file.write(b'{"form": "paper", "ind')  # the line that was being written
    with pytest.raises(ValueError, match="lacks the records of .* pictures"):
        merge_records(run(), out)
    claim_folder(run(), out)
    last = guessing()
    ask_missing(run(), reader, [last], out)
    assert finished(out) == expected
    calls = last.calls
    ask_missing(run(), reader, [last], out)  # nothing is left to ask
    assert last.calls == calls > 0


@pytest.mark.parametrize(("processes", "copies"), [(1, 3), (2, 1), (3, 2), (20, 1)])
def test_any_number_of_processes_and_copies_gives_the_same_files(reader, tmp_path, processes, copies):
    expected = whole(reader, tmp_path / "whole")
    out = tmp_path / "shared_out"
    claim_folder(run(), out)
    answerers = [[guessing() for _ in range(copies)] for _ in range(processes)]
    for process in reversed(range(processes)):
        ask_missing(run(), reader, answerers[process], out, process, processes)
    assert finished(out) == expected
    places = [(record["form"], record["index"]) for record in read_parts(out)]
    assert len(places) == len(set(places)) == 2 * PICTURES  # nothing twice
    if processes * copies <= len(run().chunks):
        assert all(answerer.calls for own in answerers for answerer in own)


def test_another_number_of_workers_may_go_on(reader, tmp_path):
    expected = whole(reader, tmp_path / "whole")
    out = tmp_path / "ended"
    claim_folder(run(), out)
    ask_missing(run(), reader, [guessing()], out, 1, 3)
    for process in (0, 1):
        ask_missing(run(), reader, [guessing()], out, process, 2)
    assert finished(out) == expected


def test_a_failing_copy_ends_the_others(reader, tmp_path):
    claim_folder(run(), tmp_path)
    with pytest.raises(Killed):
        ask_missing(run(), reader, [guessing(), failing_after(0)], tmp_path)


def test_folders_of_other_runs_are_kept(tmp_path):
    claim_folder(run(), tmp_path / "new")
    claim_folder(run(), tmp_path / "new")
    with pytest.raises(ValueError, match=r"another run \(split 'val' rather than 'test_less', seed 5 rather than 6\)"):
        claim_folder(run(split="test_less", seed=6), tmp_path / "new")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds no benchmark that was begun"):
        claim_folder(run(), tmp_path / "notes")
    (tmp_path / "new" / module.SETTINGS).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        claim_folder(run(), tmp_path / "new")


def test_best_and_worst_answers_are_shown(reader, tmp_path):
    whole(reader, tmp_path / "out")
    records = merge_records(run(), tmp_path / "out")
    chosen = best_and_worst(records, 3)
    everything = sorted(question_iou(q) for r in records if r["form"] == "paper" for q in r["questions"])
    assert [question_iou(q) for _, q in chosen["worst"]] == everything[:3]
    assert [question_iou(q) for _, q in chosen["best"]] == everything[::-1][:3]
    pages = answer_pages("muse", "val", 5, reader, records, 3)
    assert set(pages) == {"best", "worst"} and all(page.ndim == 3 and page.dtype == np.uint8 for page in pages.values())
    assert best_and_worst(records, 0) == {}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["scores"]) == {"paper", "released"} and metrics["skipped"] == 0
