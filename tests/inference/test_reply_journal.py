"""Replies that are kept: nothing is asked for twice, whatever ended the run before."""

from __future__ import annotations

import threading
import time

import pytest

from pixelstory_jax.inference.language_client import AnswerError, LanguageModelError, Message, Reply
from pixelstory_jax.inference.parallel_asking import ask_all
from pixelstory_jax.inference.reply_journal import ReplyJournal, question_key


class Echo:
    """Replies with the question; counts."""

    def __init__(self, name="echo", seconds=0.0):
        self.name, self.seconds, self.questions, self.stopped = name, seconds, [], False

    def ask(self, messages, picture=None):
        self.questions.append(messages[-1].text)
        time.sleep(self.seconds)
        if messages[-1].text == "unanswerable":
            raise AnswerError("No.")
        if messages[-1].text == "fatal":
            raise LanguageModelError("Never.")
        return Reply(messages[-1].text + " é", 3, 2)

    def stop(self):
        self.stopped = True


def question(text):
    return (Message("user", text),)


def test_nothing_is_asked_twice(tmp_path):
    client = Echo()
    for _ in range(2):
        with ReplyJournal(client, tmp_path / "replies.jsonl") as journal:
            for text in ("a", "b", "a"):
                assert journal.ask(question(text)) == Reply(f"{text} é", 3, 2)
    assert client.questions == ["a", "b"]
    assert (journal.asked, journal.prompt_tokens, len(journal)) == (0, 0, 2)


def test_what_makes_another_question():
    asked = [("m", "a"), ("m", "b"), ("n", "a")]
    keys = {question_key(model, question(text)) for model, text in asked}
    assert len(keys | {question_key("m", question("a"), picture) for picture in (b"", b"x")}) == 5


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_cut_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "replies.jsonl"
    with ReplyJournal(Echo(), path) as journal:
        journal.ask(question("a"))
        journal.ask(question("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    client = Echo()
    with ReplyJournal(client, path) as journal:
        assert len(journal) == 1
        journal.ask(question("a"))
        journal.ask(question("b"))
    assert client.questions == ["b"]
    with ReplyJournal(client, path) as journal:
        assert len(journal) == 2


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 1, holds no reply"):
        ReplyJournal(Echo(), path)


def test_two_runs_do_not_share_a_journal(tmp_path):
    with (
        ReplyJournal(Echo(), tmp_path / "replies.jsonl"),
        pytest.raises(ValueError, match="in use by another run"),
    ):
        ReplyJournal(Echo(), tmp_path / "replies.jsonl")


def test_failures_are_not_kept(tmp_path):
    client = Echo()
    with ReplyJournal(client, tmp_path / "replies.jsonl") as journal:
        for _ in range(2):
            with pytest.raises(AnswerError):
                journal.ask(question("unanswerable"))
    assert len(client.questions) == 2


def test_same_question_at_the_same_time_is_asked_once(tmp_path):
    client = Echo(seconds=0.1)
    with ReplyJournal(client, tmp_path / "replies.jsonl") as journal:
        answers = dict(ask_all(["a"] * 5, lambda text: journal.ask(question(text)).text, 5, journal.stop))
    assert client.questions == ["a"] and answers == {number: "a é" for number in range(5)}


def test_all_are_asked_and_single_failures_shown():
    client = Echo()
    texts = ["a", "unanswerable", "c", "d"]
    answers = dict(ask_all(texts, lambda text: client.ask(question(text)).text, 3, client.stop))
    assert [str(answers[number]) for number in range(4)] == ["a é", "No.", "c é", "d é"]
    assert not client.stopped


@pytest.mark.parametrize("ending", ["fatal error", "caller stops"])
def test_end_waits_for_what_is_under_way_and_begins_nothing(ending):
    client, finished, threads = Echo(), [], threading.active_count()
    texts = (["fatal"] if ending == "fatal error" else ["quick"]) + [str(number) for number in range(20)]

    def ask(text):
        if text.isdigit():
            time.sleep(0.2)
        finished.append(client.ask(question(text)).text)

    answers = ask_all(texts, ask, 3, client.stop)
    if ending == "fatal error":
        with pytest.raises(LanguageModelError, match="Never"):
            list(answers)
    else:
        next(answers)
        answers.close()
    count = len(client.questions)
    assert count <= 4 and len(finished) == count - (ending == "fatal error") and client.stopped
    assert threading.active_count() <= threads
    time.sleep(0.3)
    assert len(client.questions) == count
