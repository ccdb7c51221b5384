"""Any endpoint that speaks OpenAI's chat completions: POST {base}/chat/completions.

Failures that may pass (busy, broken, silent, garbled) are tried again, later and later, or when the server says. The
key goes into one header and nowhere else: it is taken out of every error.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from email.message import Message as Headers
from typing import Any

from pixelstory_jax.inference.language_client import AnswerError, Asking, LanguageModelError, Message, Reply

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that a later attempt may not meet
FATAL = (401, 402, 403, 404, 405)
LARGEST_REPLY = 8 << 20  # bytes; more is no answer
LONGEST_WAIT = 600.0  # seconds between two attempts, whatever the server asks for
HOPELESS = 5  # questions in a row without an answer: then the endpoint is down
MARKS = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"\xff\xd8\xff": "jpeg"}  # how files of pictures begin


class ChatEndpoint:
    """A `LanguageClient` over the network.

    Args:
      url: up to and without "/chat/completions". key: "" sends none.
      backoff: seconds before the second attempt, doubled with each further one.

    Raises:
      LanguageModelError: the URL is none.
    """

    def __init__(self, url: str, key: str, model: str, asking: Asking, backoff: float = 1.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise LanguageModelError(
                f"The endpoint {_without_user(url)!r} is no URL such as https://host/v1 (OPENAI_BASE_URL)."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise LanguageModelError("The key (OPENAI_API_KEY) has characters that no key has, as spaces or line ends.")
        self.url, self.model, self.asking, self.backoff = url.rstrip("/") + "/chat/completions", model, asking, backoff
        warmth = "" if asking.temperature is None else f" temperature={asking.temperature:g}"
        self.name = f"openai:{model} max_tokens={asking.max_tokens}{warmth}"
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._pace = _Pace(asking.requests_per_minute)
        self._limit = "max_tokens"
        self._failures = 0

    def ask(self, messages: Sequence[Message], picture: bytes | None = None) -> Reply:
        """See `LanguageClient`."""
        for attempt in range(self.asking.retries + 1):
            self._pace.wait()
            try:
                reply = self._attempt(messages, picture)
            except _Passing as failure:
                why = str(failure)
                self._pace.hold(failure.wait)
                if attempt < self.asking.retries:
                    self._pace.sleep(min(LONGEST_WAIT, self.backoff * 2**attempt) * random.uniform(0.5, 1))
            except AnswerError as error:
                self._count_failure(str(error))
                raise
            else:
                self._failures = 0
                return reply
        self._count_failure(why)
        raise AnswerError(f"{self.url} gave no answer in {self.asking.retries + 1} attempts; the last: {why}")

    def stop(self) -> None:
        """See `LanguageClient`."""
        self._pace.stopped.set()

    def _count_failure(self, why: str) -> None:
        self._failures += 1
        if self._failures >= HOPELESS:
            raise LanguageModelError(f"{self.url} answers nothing: {self._failures} questions failed in a row; {why}")

    def _attempt(self, messages: Sequence[Message], picture: bytes | None) -> Reply:
        limit = self._limit
        body: dict[str, Any] = {"model": self.model, "messages": _as_json(messages, picture)}
        body[limit] = self.asking.max_tokens
        if self.asking.temperature is not None:
            body["temperature"] = self.asking.temperature
        try:
            return _reply(self._post(json.dumps(body).encode()))
        except urllib.error.HTTPError as error:
            why = self._safe(_reason(error))
            if error.code == 400 and limit == "max_tokens" and "max_completion_tokens" in why:
                self._limit = "max_completion_tokens"  # as OpenAI's newer models call it
                return self._attempt(messages, picture)
            if error.code in FATAL or 300 <= error.code < 400 or "insufficient_quota" in why:
                raise LanguageModelError(f"{self.url} refuses: {why}") from None
            if error.code in PASSING:
                raise _Passing(why, _retry_after(error.headers)) from None
            raise AnswerError(f"{self.url} does not take this question: {why}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, AnswerError | LanguageModelError):
                raise
            raise _Passing(self._safe(f"{type(error).__name__}: {error}")) from None

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        deadline = time.monotonic() + self.asking.timeout
        received = bytearray()
        with self._opener.open(request, timeout=self.asking.timeout) as response:
            while part := response.read1(1 << 16):
                received += part
                if len(received) > LARGEST_REPLY:
                    raise ValueError(f"the reply is longer than {LARGEST_REPLY >> 20} MB")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the reply took more than {self.asking.timeout:g} s")
            if response.length:  # read1 takes a connection that ends too early for the end
                raise http.client.IncompleteRead(bytes(received), response.length)
        return bytes(received)

    def _safe(self, text: str) -> str:
        """One line without the key, which some servers repeat."""
        return " ".join((text.replace(self._key, "[key]") if self._key else text).split())[:300].rstrip(".")


class _Passing(Exception):
    """A failure that may pass; `wait`: seconds that the server asks to wait."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key along to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Pace:
    """When the next request may leave: not too many a minute, and none while the server asks to wait."""

    def __init__(self, requests_per_minute: float):
        self._gap = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + self._gap
        self.sleep(mine - now)

    def sleep(self, seconds: float) -> None:
        if self.stopped.wait(max(0.0, seconds)):
            raise LanguageModelError("Asking was stopped.")

    def hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + min(seconds, LONGEST_WAIT))


def _as_json(messages: Sequence[Message], picture: bytes | None) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [{"role": message.role, "content": message.text} for message in messages]
    if picture is not None:
        kind = next((kind for mark, kind in MARKS.items() if picture.startswith(mark)), None)
        if kind is None:
            raise AnswerError("The picture is no JPEG, PNG, WebP or GIF file, which is what endpoints read.")
        url = f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
        last = max(number for number, message in enumerate(messages) if message.role == "user")
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": messages[last].text}]
        listed[last]["content"] = parts
    return listed


def _reply(body: bytes) -> Reply:
    """Raises ValueError where the body is not what the protocol says."""
    try:
        fields = json.loads(body)
        content = fields["choices"][0]["message"].get("content") or ""  # none where the model refuses
        usage = fields.get("usage") or {}
        counts = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        return Reply(text, *counts)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        start = body[:80].decode("utf-8", "replace")
        raise ValueError(f"the reply is no chat completion but {start!r}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """Status and what the server says about it, in one line."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        told = json.loads(text)["error"]
        text = f"{told.get('message', '')} {told.get('code') or ''}" if isinstance(told, dict) else str(told)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f"{error.code} {error.reason}: {text}".rstrip(": ")


def _retry_after(headers: Headers) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 without one."""
    told = headers.get("Retry-After") or ""
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _without_user(url: str) -> str:
    """The URL without a name and password in it, for errors."""
    return url.rpartition("@")[2]
