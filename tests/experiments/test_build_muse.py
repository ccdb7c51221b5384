"""The command that builds MUSE-like data: by rules, by an endpoint that misbehaves, and over kills."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.inference.language_client import Message
from pixelstory_jax.inference.reply_journal import question_key
from tests.data.muse.annotated import write_annotated
from tests.inference.chat_server import ChatServer, serving

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 12
KEY = "sk-never-printed"


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    return write_annotated(tmp_path_factory.mktemp("annotated"), PICTURES)


def command(annotated, out, *flags):
    path, folder = annotated
    needed = [f"--annotations={path}", f"--images={folder}", f"--out={out}"]
    return [sys.executable, "-m", "experiments.build_muse", *needed, *flags]


def environment(url=""):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}


def build(annotated, out, *flags, url=""):
    done = subprocess.run(
        command(annotated, out, *flags),
        cwd=out.parent,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert KEY not in done.stdout + done.stderr
    return done


def written(out, split="train"):
    return json.loads((out / "muse" / f"muse_{split}.json").read_text())


def good_answer(body):
    """As a model would answer: one good pair, one that names a thing that does not exist."""
    names = re.findall(r"^\d+\. (.*) at \[", body["messages"][-1]["content"], re.MULTILINE)
    seed = sum(map(ord, "".join(names)))
    pairs = [
        {
            "question": f"Which two of these would a child number {['one', 'two', 'three', 'four'][seed % 4]} pick up?",
            "answer": f"It would pick up [the {names[0]} over here](1) and [the {names[1]} over there](2).",
        },
        {"question": "What else could somebody take with them?", "answer": "They could take [it](1) and [that](99)."},
    ]
    return f"Here you are:\n```json\n{json.dumps({'pairs': pairs})}\n```"


def test_rules(annotated, tmp_path):
    done = build(annotated, tmp_path / "out", "--seed=3", "--sheet=4")
    assert done.returncode == 0, done.stderr
    assert f"{PICTURES} pictures with 2 or more clear instances" in done.stdout
    assert "1 pictures are left out, as: without_file.png is not in" in done.stdout
    assert re.search(r"questions by targets +2: \d+", done.stdout)
    reader = open_reader("muse", tmp_path / "out")
    assert 6 < len(reader) <= PICTURES and all(reader[i].mask(0).any() for i in range(len(reader)))
    folder = tmp_path / "out" / "muse"
    statistics = json.loads((folder / "muse_train_statistics.json").read_text())
    assert statistics["pairs"] == sum(len(entry["questions"]) for entry in written(tmp_path / "out"))
    assert np.asarray(Image.open(folder / "muse_train_sheet.png")).std() > 10
    assert sorted(path.name for path in folder.iterdir()) == [
        *("muse_train.json", "muse_train_sheet.png", "muse_train_statistics.json"),
    ]
    build(annotated, tmp_path / "again", "--seed=3", "--sheet=0")
    build(annotated, tmp_path / "other", "--seed=4", "--sheet=0")
    assert written(tmp_path / "again") == written(tmp_path / "out") != written(tmp_path / "other")


@pytest.mark.parametrize(
    ("split", "file", "fits"),
    [
        ("test_few", "test_less", lambda count: 2 <= count <= 3),
        ("test_many", "test_many", lambda count: count >= 4),
    ],
)
def test_the_test_files_have_few_and_many_targets(annotated, tmp_path, split, file, fits):
    done = build(annotated, tmp_path / "out", f"--split={split}", "--sheet=0", "--balance=0")
    assert done.returncode == 0, done.stderr
    counts = [len(answer) for entry in written(tmp_path / "out", file) for answer in entry["answers"]]
    assert counts and all(map(fits, counts))


def test_endpoint_in_trouble(annotated, tmp_path):
    plan = ("429 0.2", "500", "hang up", "garbage", "slow 1.5", "too long", "503", "no choices")
    flags = ("--llm=openai:tiny", "--concurrency=3", "--timeout=1", "--retries=3", "--price_in=1", "--price_out=2")
    out = tmp_path / "out"
    with serving(ChatServer(good_answer, plan)) as server:
        done = build(annotated, out, *flags, "--sheet=0", "--balance=0", url=server.url)
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == PICTURES + len(plan) and server.most <= 3
        assert f"Asked for {PICTURES} replies (0 were there): {11 * PICTURES} tokens sent" in done.stdout
        assert "which cost 0.0003" in done.stdout
        entries = written(out)
        assert len(entries) == PICTURES
        assert all(len(entry["questions"]) == 1 and len(entry["answers"][0]) == 2 for entry in entries)
        assert re.search(rf"an instance that does not exist +{PICTURES}", done.stdout)
        again = build(annotated, out, *flags, "--sheet=0", "--balance=0", url=server.url)
        assert len(server.bodies) == PICTURES + len(plan) and written(out) == entries
        assert f"Asked for 0 replies ({PICTURES} were there)" in again.stdout
    assert KEY not in "".join(path.read_text() for path in out.rglob("*") if path.is_file() and path.suffix != ".png")


def test_pictures_are_sent(annotated, tmp_path):
    with serving(ChatServer(good_answer_to_picture)) as server:
        done = build(annotated, tmp_path / "out", "--llm=openai:tiny", "--pictures", "--limit=2", url=server.url)
        assert done.returncode == 0, done.stderr
        for body in server.bodies:
            picture, text = body["messages"][-1]["content"]
            assert picture["image_url"]["url"].startswith("data:image/png;base64,")
            assert "The picture is attached." in text["text"]


def good_answer_to_picture(body):
    _, text = body["messages"][-1]["content"]
    return good_answer({"messages": [{"content": text["text"]}]})


def test_unreadable_replies_are_counted_and_not_asked_for_again(annotated, tmp_path):
    with serving(ChatServer(lambda body: "I would rather not.")) as server:
        for _ in range(2):
            done = build(annotated, tmp_path / "out", "--llm=openai:tiny", url=server.url)
            assert done.returncode == 2
            assert f"replies without a pair': {PICTURES}" in done.stderr
            assert len(server.bodies) == PICTURES
    assert not (tmp_path / "out" / "muse").exists()


def test_failed_questions_are_asked_again_by_the_next_run(annotated, tmp_path):
    flags = ("--llm=openai:tiny", "--retries=0", "--concurrency=1", "--sheet=0", "--balance=0")
    with serving(ChatServer(good_answer, ("500", "", "", "500"))) as server:
        done = build(annotated, tmp_path / "out", *flags, url=server.url)
        assert "2 pictures have no answer, as: " in done.stdout and len(written(tmp_path / "out")) == PICTURES - 2
        build(annotated, tmp_path / "out", *flags, url=server.url)
        assert len(server.bodies) == PICTURES + 2 and len(written(tmp_path / "out")) == PICTURES


@pytest.mark.slow
def test_nothing_is_asked_twice_over_kills(annotated, tmp_path):
    """What a reply was kept for is never asked for again, and of what is not kept only what was under way."""
    rng, out, concurrency = np.random.default_rng(0), tmp_path / "out", 2
    flags = ("--llm=openai:tiny", f"--concurrency={concurrency}", "--sheet=0", "--balance=0")
    journal = out / "replies.jsonl"
    kills, kept = 0, set()
    with serving(ChatServer(good_answer, seconds=0.15)) as server:
        while True:
            before = len(server.bodies)
            process = subprocess.Popen(
                command(annotated, out, *flags), cwd=tmp_path, env=environment(server.url), stdout=subprocess.DEVNULL
            )
            wait_for_requests(server, before + 1, process)
            try:
                process.wait(timeout=float(rng.uniform(0.05, 0.5)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            assert not kept & {key_of(body) for body in server.bodies[before:]}
            if process.returncode == 0:
                break
            time.sleep(0.3)  # the server still answers what was under way
            assert kept <= (kept := kept_keys(journal))
        times = collections.Counter(json.dumps(body, sort_keys=True) for body in server.bodies)
    assert process.returncode == 0 and kills >= 2
    assert len(times) == PICTURES and len(written(out)) == PICTURES
    assert sum(times.values()) <= PICTURES + kills * concurrency
    assert kept_keys(journal) == {key_of(json.loads(body)) for body in times}
    assert journal.read_bytes().count(b"\n") == PICTURES


def kept_keys(journal):
    """The keys of a journal, without a last line that was cut."""
    content = journal.read_bytes() if journal.exists() else b""
    return {json.loads(line)["key"] for line in content[: content.rfind(b"\n") + 1].splitlines()}


def key_of(body):
    """The key that a request is kept under."""
    messages = [Message(message["role"], message["content"]) for message in body["messages"]]
    return question_key("openai:tiny max_tokens=2000", messages)


def wait_for_requests(server, count, process):
    deadline = time.monotonic() + 60
    while len(server.bodies) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def hear_control_c() -> None:
    """Tests that run in the background of a shell inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_control_c_ends_cleanly(annotated, tmp_path):
    out = tmp_path / "out"
    with serving(ChatServer(good_answer, seconds=0.4)) as server:
        process = subprocess.Popen(
            command(annotated, out, "--llm=openai:tiny", "--concurrency=2"),
            cwd=tmp_path,
            env=environment(server.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_control_c,
        )
        wait_for_requests(server, 3, process)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 2 and "Traceback" not in errors
        kept = (out / "replies.jsonl").read_bytes().count(b"\n")
        assert kept == len(server.bodies) < PICTURES  # what was under way is kept
        assert f"has {kept} replies; the same command goes on" in errors
        assert f"Asked for {kept} replies" in said
    assert not (out / "muse").exists()


def test_second_control_c_ends_at_once(annotated, tmp_path):
    with serving(ChatServer(good_answer, seconds=30)) as server:
        process = subprocess.Popen(
            command(annotated, tmp_path / "out", "--llm=openai:tiny"),
            cwd=tmp_path,
            env=environment(server.url),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear_control_c,
        )
        wait_for_requests(server, 2, process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 10 and "Stopped." in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--annotations=",), "--annotations is needed, as --annotations=instances.json"),
        (("--annotations=nowhere.json",), "There is no nowhere.json. Expected are:"),
        (("--images=nowhere",), "There is no folder of pictures nowhere."),
        (("--min_targets=5", "--max_targets=3"), "--max_targets=3 is less than --min_targets=5."),
        (("--pictures",), "--pictures is for openai:MODEL; --llm=rules writes"),
        (("--llm=gpt",), "--llm=gpt is unknown; known are rules, openai:MODEL"),
        (("--llm=open:gpt",), "--llm=open:gpt is unknown; known are rules, openai:MODEL"),
        ((f"--out={__file__}",), "is a file, but a folder is needed"),
        (("--min_targets=90", "--max_targets=90"), "has no picture with 90 or more clear instances."),
        (("--llm=openai:tiny",), "OPENAI_API_KEY is empty"),
    ],
)
def test_wrong_flags(annotated, tmp_path, flags, words):
    done = subprocess.run(
        command(annotated, tmp_path / "out", *flags),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
