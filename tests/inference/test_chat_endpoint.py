"""Asking an endpoint that is slow, busy, broken or hostile."""

from __future__ import annotations

import base64
import threading
import time

import pytest

from pixelstory_jax.inference.chat_endpoint import HOPELESS, ChatEndpoint
from pixelstory_jax.inference.language_client import (
    AnswerError,
    Asking,
    LanguageModelError,
    Message,
    Reply,
    open_client,
)
from tests.inference.chat_server import ChatServer, serving

KEY = "sk-very-secret"
QUESTION = (Message("system", "You are brief."), Message("user", "What is it?"))
PNG = b"\x89PNG\r\n\x1a\n and more"


def ask(server, asking=None, picture=None, backoff=0.01):
    endpoint = ChatEndpoint(server.url, KEY, "tiny", asking or Asking(retries=2, timeout=1.0), backoff)
    return endpoint.ask(QUESTION, picture)


def test_request_and_reply():
    with serving(ChatServer(lambda body: "An apple.")) as server:
        assert ask(server, Asking(max_tokens=9, temperature=0.5), PNG) == Reply("An apple.", 11, 7)
    (body,), (headers,) = server.bodies, server.headers
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 9, 0.5)
    assert body["messages"][0] == {"role": "system", "content": "You are brief."}
    picture, text = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    kind, _, data = picture["image_url"]["url"].partition(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", PNG)


@pytest.mark.parametrize("trouble", ["429 0", "500", "503", "hang up", "garbage", "no choices", "too long", "slow 1.3"])
def test_failures_that_pass(trouble):
    with serving(ChatServer(lambda body: "Yes.", (trouble,))) as server:
        assert ask(server).text == "Yes."
        assert len(server.bodies) == 2


def test_reply_that_drips_is_given_up():
    with serving(ChatServer(lambda body: "Yes.", ("drip",))) as server:
        began = time.monotonic()
        assert ask(server, Asking(retries=1, timeout=0.4)).text == "Yes."
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "trouble, error, words",
    [
        ("401 {}", LanguageModelError, "refuses: 401"),
        ('404 {"error": {"message": "no model tiny"}}', LanguageModelError, "no model tiny"),
        ('429 {"error": {"message": "pay", "code": "insufficient_quota"}}', LanguageModelError, "insufficient_quota"),
        ("302 http://127.0.0.1:1/elsewhere", LanguageModelError, "refuses: 302"),
        ('400 {"error": "bad words"}', AnswerError, "bad words"),
    ],
)
def test_failures_that_stay_are_not_asked_again(trouble, error, words):
    with serving(ChatServer(lambda body: "Yes.", (trouble,))) as server:
        with pytest.raises(error, match=words):
            ask(server)
        assert len(server.bodies) == 1


def test_attempts_end():
    with serving(ChatServer(lambda body: "Yes.", ("500",) * 9)) as server:
        with pytest.raises(AnswerError, match="no answer in 3 attempts; the last: 500"):
            ask(server)
        assert len(server.bodies) == 3


def test_endpoint_that_answers_nothing_stops_all():
    endpoint = ChatEndpoint("http://127.0.0.1:9", "", "tiny", Asking(retries=0), 0.01)
    for _ in range(HOPELESS - 1):
        with pytest.raises(AnswerError):
            endpoint.ask(QUESTION)
    with pytest.raises(LanguageModelError, match="answers nothing: 5 questions failed in a row"):
        endpoint.ask(QUESTION)


def test_retry_after_is_kept():
    with serving(ChatServer(lambda body: "Yes.", ("429 0.7",))) as server:
        ask(server)
        assert server.times[1] - server.times[0] >= 0.7


def test_rate_limit():
    with serving(ChatServer(lambda body: "Yes.")) as server:
        endpoint = ChatEndpoint(server.url, "", "tiny", Asking(requests_per_minute=600))
        for _ in range(4):
            endpoint.ask(QUESTION)
        assert server.times[-1] - server.times[0] >= 0.29


def test_newer_name_of_the_limit():
    trouble = '400 {"error": {"message": "Use max_completion_tokens"}}'
    with serving(ChatServer(lambda body: "Yes.", (trouble,))) as server:
        assert ask(server).text == "Yes."
        assert "max_completion_tokens" in server.bodies[1] and "max_tokens" not in server.bodies[1]


def test_key_is_in_no_error():
    with serving(ChatServer(lambda body: "Yes.", (f'401 {{"error": {{"message": "wrong key {KEY}"}}}}',))) as server:
        with pytest.raises(LanguageModelError, match=r"wrong key \[key\]") as caught:
            ask(server)
        assert KEY not in repr(caught.value)


def test_stop_ends_waiting():
    with serving(ChatServer(lambda body: "Yes.", ("500",))) as server:
        endpoint = ChatEndpoint(server.url, "", "tiny", Asking(), backoff=60)
        threading.Timer(0.3, endpoint.stop).start()
        began = time.monotonic()
        with pytest.raises(LanguageModelError, match="stopped"):
            endpoint.ask(QUESTION)
        assert time.monotonic() - began < 5


def test_picture_of_another_kind():
    with serving(ChatServer(lambda body: "Yes.")) as server, pytest.raises(AnswerError, match="no JPEG, PNG"):
        ask(server, picture=b"BM bitmap")


@pytest.mark.parametrize(
    "spec, environment, words",
    [
        ("openai:gpt", {}, "OPENAI_API_KEY is empty"),
        ("openai:gpt", {"OPENAI_BASE_URL": "file:///etc/passwd"}, "is no URL such as"),
        ("openai:gpt", {"OPENAI_API_KEY": "a\n"}, "no key has"),
        ("openai:", {"OPENAI_API_KEY": "a"}, "Unknown language model"),
        ("claude", {}, "Unknown language model"),
    ],
)
def test_wrong_specifications(spec, environment, words):
    with pytest.raises(LanguageModelError, match=words):
        open_client(spec, Asking(), environment)
