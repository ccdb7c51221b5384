"""Benchmarks of the miniature data sets, from the command line and in several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.copies import copies_on_devices
from pixelstory_jax.evaluation.benchmark_records import make_records
from pixelstory_jax.evaluation.benchmark_scores import score_records
from pixelstory_jax.evaluation.benchmarks import BENCHMARKS, open_benchmark
from pixelstory_jax.inference.segmenter import read_trained
from tests.data.readers.all_miniatures import MAKERS
from tests.evaluation.talking_model import write_checkpoint
from tests.inference.chat_server import ChatServer, serving

ROOT = Path(__file__).resolve().parents[2]
FILES = ("records.jsonl", "metrics.json", "table.txt", "best.png", "worst.png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("refcoco", "refclef", "grefcoco", "reason_seg", "muse", "llava_instruct_150k"):
        MAKERS[name](root)
    return root


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return copies_on_devices(read_trained(checkpoint), max_new_tokens=12, devices_per_copy=1)[0]


@pytest.mark.parametrize(
    ("name", "questions"),
    # Questions of the paper form and of the released form in the first split that is scored.
    [
        ("refcoco", (6, 6)),
        ("refclef", (6, 6)),
        ("grefcoco", (10, 10)),
        ("multi_refcoco", (1, 1)),
        ("reason_seg", (4, 1)),
        ("muse", (4, 4)),
        ("vqa", (4,)),
    ],
)
def test_every_benchmark_from_its_official_layout(answerer, data, name, questions):
    benchmark = BENCHMARKS[name]
    reader = open_benchmark(name, data, benchmark.splits[0])
    records = [
        record
        for form in benchmark.forms
        for record in make_records(benchmark, form, reader, range(len(reader)), answerer, batch_size=4)
    ]
    scores = score_records(name, reader.split, records).scores
    assert tuple(scores[form]["all"]["questions"] for form in benchmark.forms) == questions
    if name == "vqa":
        return
    said = {
        question["answer"]
        for record in records
        if record["form"] == "paper"
        for question in record.get("questions", ())
    }
    assert said == {"cow [1]"}
    # In multi_refcoco the only mask is not where the first expression is. The miniature of refCLEF has every mask in
    # two equal parts, whose sum is no object for the released code.
    nothing = {("multi_refcoco", "paper"), ("refclef", "released")}
    for form in benchmark.forms:
        assert scores[form]["all"]["ciou"] == 0 if (name, form) in nothing else 0 < scores[form]["all"]["ciou"] < 1


def test_the_test_split_of_muse_is_both_of_its_files(data):
    whole, few, many = (open_benchmark("muse", data, split) for split in ("test", "test_few", "test_many"))
    assert len(whole) == len(few) + len(many) == 4
    ask = BENCHMARKS["muse"].ask["paper"]
    for index, (reader, place) in enumerate([(few, 0), (few, 1), (many, 0), (many, 1)]):
        assert whole[index].requests == reader[place].requests and whole.picture(index) == reader.picture(place)
        groups = {question.groups[0] for question in ask(whole[index], np.random.default_rng())}
        assert groups == {"few targets" if reader is few else "many targets"}


def evaluate(*arguments: str, launch: tuple[str, ...] = (), **more: str) -> subprocess.CompletedProcess:
    module = ["experiments.launch", *launch, "--", "evaluate"] if launch else ["experiments.evaluate"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-m", *module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_command_writes_scores_and_goes_on(checkpoint, data, tmp_path):
    out = tmp_path / "out"
    line = ("--benchmark=muse", f"--data={data}", f"--checkpoint={checkpoint}", f"--out={out}", "--show=2")
    done = evaluate(*line)
    assert done.returncode == 0, done.stderr
    assert "muse val, form paper" in done.stdout and "muse val, form released" in done.stdout
    assert set(FILES) <= {path.name for path in out.iterdir()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pictures"] == 2 and metrics["scores"]["paper"]["all"]["questions"] == 4
    few = metrics["scores"]["paper"]["few targets"]
    assert few["ciou"] > few["ciou_names"] > 0 and 0 < few["words_names"] < 1  # the cow is matched in some answers
    assert Image.open(out / "worst.png").width > 500
    records = (out / "records.jsonl").read_bytes()
    server = ChatServer(lambda body: "9")  # points for one mask
    with serving(server):
        judged = evaluate(*line, "--judge=openai:toy", OPENAI_BASE_URL=server.url, OPENAI_API_KEY="")
    assert judged.returncode == 0, judged.stderr
    scores = json.loads((out / "metrics.json").read_text())
    assert scores["scores"]["paper"]["all"]["giou_judged"] == scores["scores"]["paper"]["all"]["giou"]
    assert scores["judge"]["failed"] == 0 and len(server.bodies) == 4
    assert (out / "records.jsonl").read_bytes() == records
    assert [json.loads(line)["points"] for line in (out / "judged.jsonl").open()] == [[9]] * 4
    other = evaluate(*line, "--seed=4")
    assert other.returncode == 2 and "holds another run (seed 0 rather than 4)" in other.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--benchmark=refcocoo",), "did you mean refcoco"),
        (("--benchmark=muse", "--split=train"), "no split 'train'; it has val, test, test_few, test_many"),
        (("--benchmark=vqa", "--form=released"), "vqa has no form 'released'"),
        (("--benchmark=refcoco", "--judge=openai:toy"), "--judge is for the paper form of muse"),
        (("--benchmark=muse", "--judge=toy"), "Unknown language model 'toy'; known are openai:MODEL"),
        (("--benchmark=refcoco+",), "There is no .*refcoco\\+/refs\\(unc\\).p"),
    ],
)
def test_what_cannot_be_scored(flags, message, data, tmp_path):
    done = evaluate(*flags, f"--data={data}", f"--checkpoint={tmp_path}")
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.slow
def test_two_processes_with_two_devices_each_give_the_files_of_one(checkpoint, data, tmp_path):
    line = ("--benchmark=grefcoco", "--split=val", f"--data={data}", f"--checkpoint={checkpoint}", "--batch=1")
    alone = evaluate(*line, f"--out={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    shared = evaluate(*line, f"--out={tmp_path / 'two'}", launch=("--processes=2", "--devices=2"))
    assert shared.returncode == 0, shared.stderr
    assert len(list((tmp_path / "two/parts").iterdir())) == 4
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    cut_up = evaluate(
        *line, f"--out={tmp_path / 'cut'}", "--devices_per_copy=2", launch=("--processes=1", "--devices=2")
    )
    assert cut_up.returncode == 0, cut_up.stderr
    scores = [json.loads((tmp_path / out / "metrics.json").read_text())["scores"] for out in ("one", "cut")]
    assert len(list((tmp_path / "cut/parts").iterdir())) == 1
    for form in ("paper", "released"):
        assert scores[1][form]["all"] == pytest.approx(scores[0][form]["all"], abs=1e-3)  # sums in another order
