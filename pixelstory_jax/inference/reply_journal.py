"""Replies of a language model on disk, so that a run that was stopped asks for nothing twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from pixelstory_jax.inference.language_client import LanguageClient, Message, Reply


class ReplyJournal:
    """A `LanguageClient` that asks another one, and keeps each reply as a line of a file before it hands it on.

    A question is known by the SHA-256 of the model's name, the messages and the picture. The file is only ever appended
    to; a last line that was cut is dropped. Another process that opens it meanwhile gets an error.

    Attributes:
      asked: replies that were asked for, not read from the file. prompt_tokens, completion_tokens: those of `asked`.

    Raises:
      ValueError: the file cannot be used, or is in use.
    """

    def __init__(self, client: LanguageClient, path: Path):
        self.name, self.path, self._client = client.name, path, client
        self.asked = self.prompt_tokens = self.completion_tokens = 0
        self._changed = threading.Condition()
        self._under_way: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115, it stays open
        _lock(self._file.fileno(), path)
        self._replies = self._read()

    def __enter__(self) -> ReplyJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._replies)

    def ask(self, messages: Sequence[Message], picture: bytes | None = None) -> Reply:
        """See `LanguageClient`. A question that is under way in another thread is waited for."""
        key = question_key(self.name, messages, picture)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._under_way)
            if key in self._replies:
                return self._replies[key]
            self._under_way.add(key)
        try:
            reply = self._client.ask(messages, picture)
            self._keep(key, reply)
        finally:
            with self._changed:
                self._under_way.remove(key)
                self._changed.notify_all()
        return reply

    def stop(self) -> None:
        """See `LanguageClient`."""
        self._client.stop()

    def _keep(self, key: str, reply: Reply) -> None:
        line = json.dumps({"key": key, **dataclasses.asdict(reply)}) + "\n"
        with self._changed:
            self._file.write(line.encode("ascii"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._replies[key] = reply
            self.asked += 1
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens

    def _read(self) -> dict[str, Reply]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        replies = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                fields = json.loads(line)
                key = fields.pop("key")
                replies[key] = Reply(**fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}, holds no reply; delete the line to have that question asked again."
                ) from error
        return replies


def question_key(model: str, messages: Sequence[Message], picture: bytes | None = None) -> str:
    """SHA-256 of a question to a model."""
    shown = hashlib.sha256(picture).hexdigest() if picture is not None else ""
    parts = [model, [[message.role, message.text] for message in messages], shown]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _lock(descriptor: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{path} is in use by another run.") from None
