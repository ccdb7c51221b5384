"""A language model that writes text for us: what is asked, what comes back, and how one is opened by name.

The writer of MUSE-like data and the judge of answers ask through `LanguageClient`. `chat_endpoint.py` is one over the
network, `local_language_model.py` one that our own code runs; `reply_journal.py` keeps replies so that none is asked
for twice, `parallel_asking.py` asks several at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

KINDS = ("openai:MODEL", "local:CHECKPOINT_OR_FOLDER")
DEFAULT_URL = "https://api.openai.com/v1"


class LanguageModelError(ValueError):
    """No question can be answered: a wrong key, no such model, an endpoint that is down; one sentence."""


class AnswerError(ValueError):
    """This question cannot be answered, others may be; one sentence."""


@dataclass(frozen=True)
class Message:
    """role: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and how many tokens it read and wrote (0 where it does not say)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class LanguageClient(Protocol):
    """Asked from several threads at a time.

    Attributes:
      name: all that decides a reply beside the question, as "openai:gpt-4o max_tokens=2000".
    """

    name: str

    def ask(self, messages: Sequence[Message], picture: bytes | None = None) -> Reply:
        """The reply to the last message; `picture` is a JPEG, PNG, WebP or GIF file that the last user message shows.

        Raises:
          AnswerError: not to this question. LanguageModelError: not to any.
        """
        ...

    def stop(self) -> None:
        """Ends waiting for better times: what is under way may end, further attempts raise `LanguageModelError`."""
        ...


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
      max_tokens: the longest reply.
      temperature: None leaves it to the model; a local one then takes the likeliest token.
      timeout: seconds until one attempt is given up. retries: further attempts after a failure that may pass.
      requests_per_minute: 0 is as fast as it goes.
    """

    max_tokens: int = 2000
    temperature: float | None = None
    timeout: float = 120.0
    retries: int = 6
    requests_per_minute: float = 0.0


def open_client(spec: str, asking: Asking, environment: Mapping[str, str] = os.environ) -> LanguageClient:
    """The client of "openai:MODEL" or "local:CHECKPOINT_OR_FOLDER".

    Args:
      environment: for an endpoint, OPENAI_BASE_URL (OpenAI's own by default) and OPENAI_API_KEY (may be empty where the
        endpoint needs none).

    Raises:
      LanguageModelError: an unknown kind, or a model that cannot be opened. A local one: errors of its weights too.
    """
    check_client(spec, environment)
    kind, _, model = spec.partition(":")
    if kind == "local":
        from pixelstory_jax.inference.local_language_model import open_local

        return open_local(model, asking)
    from pixelstory_jax.inference.chat_endpoint import ChatEndpoint

    return ChatEndpoint(*_address(environment), model, asking)


def check_client(spec: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises LanguageModelError where `open_client` would without looking at a model: an unknown kind, no key."""
    kind, _, model = spec.partition(":")
    if kind not in ("openai", "local") or not model:
        raise LanguageModelError(f"Unknown language model {spec!r}; known are {', '.join(KINDS)}.")
    if kind == "openai" and _address(environment) == (DEFAULT_URL, ""):
        raise LanguageModelError("The environment variable OPENAI_API_KEY is empty; OpenAI's endpoint needs a key.")


def _address(environment: Mapping[str, str]) -> tuple[str, str]:
    """(URL of the endpoint, key)."""
    return environment.get("OPENAI_BASE_URL") or DEFAULT_URL, environment.get("OPENAI_API_KEY", "")
