"""A LLaMA-family language model that our own code runs, as a `LanguageClient`: folders, GGUF files, checkpoints."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelstory_jax.inference.continuation import continue_tokens
from pixelstory_jax.inference.language_client import AnswerError, Asking, LanguageModelError, Message, Reply
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.paths import unflatten

STEP = 128  # lengths of prompts are rounded up to these, so that few programs are compiled
LEAST_ROOM = 16  # tokens that must be left for the reply
VOCABULARIES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ChatForm:
    """How a model was trained to be spoken to; {} is the text of a message.

    Attributes:
      mark: what of it stands in the model's own chat template, or among its tokens.
      answer: what the reply follows. stop: the token that ends it.
    """

    mark: str
    begin: str
    system: str
    user: str
    assistant: str
    answer: str
    stop: str

    def prompt(self, messages: Sequence[Message]) -> str:
        """All messages, up to where the reply begins."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return self.begin + "".join(turns[m.role].replace("{}", m.text) for m in messages) + self.answer


def _headed(begin: str, before: str, after: str, stop: str, end: str = "") -> ChatForm:
    """A form in which every message has a head that names its role."""
    system, user, assistant = (f"{before}{role}{after}{{}}{stop}{end}" for role in ("system", "user", "assistant"))
    return ChatForm(before, begin, system, user, assistant, f"{before}assistant{after}", stop)


CHATML = _headed("", "<|im_start|>", "\n", "<|im_end|>", "\n")
LLAMA_3 = _headed("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
LLAMA_2 = ChatForm("[INST]", "<s>[INST] ", "<<SYS>>\n{}\n<</SYS>>\n\n", "{} [/INST]", " {} </s><s>[INST] ", "", "</s>")
VICUNA = ChatForm("", "<s>", "{} ", "USER: {} ", "ASSISTANT: {}</s>", "ASSISTANT:", "</s>")
FORMS = (CHATML, LLAMA_3, LLAMA_2, VICUNA)
"""The first whose mark is found is taken; LLaVA v1 and Vicuna have none."""


@dataclass(frozen=True)
class Vocabulary:
    """`encode`: text with the marks of the chat form -> ids. `decode`: the reverse, without marks."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stop_id: int


class LocalLanguageModel:
    """Answers one question at a time.

    Args:
      name: see `LanguageClient`.
      params: tree of the language model's parameters.
    """

    def __init__(
        self, name: str, config: LlamaConfig, params: Any, vocabulary: Vocabulary, form: ChatForm, asking: Asking
    ):
        self.name = f"{name} max_tokens={asking.max_tokens} temperature={asking.temperature or 0:g}"
        self.config, self.params, self.vocabulary, self.form, self.asking = config, params, vocabulary, form, asking
        self._lock = threading.Lock()
        self._is_stopped = False

    def ask(self, messages: Sequence[Message], picture: bytes | None = None) -> Reply:
        """See `LanguageClient`. With a temperature, the same question draws the same reply."""
        if picture is not None:
            raise LanguageModelError(f"{self.name} sees no pictures.")
        text = self.form.prompt(messages)
        ids = self.vocabulary.encode(text)
        padded = -(-len(ids) // STEP) * STEP
        room = min(self.asking.max_tokens, self.config.max_length - padded)
        if room < min(LEAST_ROOM, self.asking.max_tokens):
            raise AnswerError(
                f"The question has {len(ids)} tokens; {self.name} takes {self.config.max_length} with the reply."
            )
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, : len(ids)] = ids
        valid = np.arange(padded)[None] < len(ids)
        with self._lock:
            if self._is_stopped:
                raise LanguageModelError("Asking was stopped.")
            stops = (self.vocabulary.stop_id,)
            temperature, rng = self.asking.temperature or 0.0, jax.random.key(zlib.crc32(text.encode()))
            new = continue_tokens(self.config, self.params, tokens, valid, room, stops, temperature, rng=rng)
            written = np.asarray(new.tokens)[0, : int(new.length[0])].tolist()
        kept = written[:-1] if written[-1:] == [self.vocabulary.stop_id] else written
        return Reply(self.vocabulary.decode(kept), len(ids), len(written))

    def stop(self) -> None:
        """See `LanguageClient`."""
        self._is_stopped = True


def open_local(source: str, asking: Asking) -> LocalLanguageModel:
    """The language model of a LlamaForCausalLM folder, a GGUF file or an import of `experiments.import_weights`.

    Raises:
      LanguageModelError: it holds another network, or no tokenizer. Errors of `open_source`.
    """
    from pixelstory_jax.interop.start_weights import is_checkpoint, open_source
    from pixelstory_jax.interop.weights import tokenizer_files
    from pixelstory_jax.training.checkpoints import find_checkpoint

    weights = open_source("auto", source)
    if weights.kind != "llama":
        raise LanguageModelError(f"{source} holds {weights.kind} weights; those of a LLaMA-family model are needed.")
    path = Path(source).expanduser()
    files = tokenizer_files(find_checkpoint(path) / "tokenizer") if is_checkpoint(path) else weights.files
    form = _form(files)
    vocabulary = _vocabulary(source, files, form)
    params = unflatten({name: jax.device_put(np.asarray(value)) for name, value in weights.params.items()})
    return LocalLanguageModel(f"local:{source}", weights.config, params, vocabulary, form, asking)


def _form(files: Mapping[str, Path | str]) -> ChatForm:
    """By the chat template that comes with the model; without one, by the marks among its tokens."""
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        if name in files:
            text = _text(files[name])
            if name == "tokenizer_config.json":
                text = str(json.loads(text).get("chat_template") or "")
            found = next((form for form in FORMS if form.mark and form.mark in text), None)
            if found:
                return found
    return VICUNA


def _vocabulary(source: str, files: Mapping[str, Path | str], form: ChatForm) -> Vocabulary:
    name = next((name for name in VOCABULARIES if name in files), None)
    if name == "tokenizer.json":
        from tokenizers import Tokenizer

        pieces = Tokenizer.from_str(_text(files[name]))
        stop = pieces.token_to_id(form.stop)
        if stop is None:
            raise LanguageModelError(f"The tokenizer of {source} has no {form.stop}, which ends its replies.")
        return Vocabulary(lambda text: pieces.encode(text, add_special_tokens=False).ids, pieces.decode, stop)
    if name == "tokenizer.model":
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(files[name]))
        begin = [model.bos_id()]
        return Vocabulary(lambda text: begin + model.encode(text.removeprefix("<s>")), model.decode, model.eos_id())
    raise LanguageModelError(f"{source} has no tokenizer ({' or '.join(VOCABULARIES)}).")


def _text(file: Path | str) -> str:
    return file.read_text(encoding="utf-8") if isinstance(file, Path) else file
