"""LLaMA-family language models in GGUF files, the container of llama.cpp: sizes, weights and tokenizer of one file.

The header is read here, never beyond the end of the file, because lengths in a file of unknown origin cannot be
trusted. Quantised blocks are decoded by the package `gguf` (extra `gguf`), one tensor at a time.

V vocabulary, D width, N heads, H head width. In the patterns: o and i outputs and inputs of a matrix, n heads, and
H = two * half, the axes of rotary pairs.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pixelstory_jax.interop.llama_folder import llama_shapes
from pixelstory_jax.interop.tensors import FileTensor, LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Layout, Row, Table, map_tensors
from pixelstory_jax.models.llama import LlamaConfig

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_AXES = 4  # of a tensor, in llama.cpp
ALIGNMENT = 32  # of the tensors, where the file names none
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PLAIN: dict[int, Any] = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}  # kinds of tensors without blocks

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"


@dataclass(frozen=True)
class GgufFile:
    """What a file holds.

    Attributes:
      tensors: name -> tensor, not read yet; matrices are (out, in). Float tensors have the dtype of the file, quantised
        ones are float32.
      metadata: key -> number, text, or list of them.
    """

    tensors: dict[str, FileTensor]
    metadata: dict[str, Any]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """A GGUF file, version 2 or 3, little-endian; tensors are read when they are asked for.

    Raises:
      WeightsError: absent, no GGUF file, truncated or otherwise damaged, a name twice, a quantisation that cannot be
        read, or one that needs the package `gguf` where that is not installed.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file.")
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Header(data)
        metadata = header.metadata()
        return GgufFile(header.tensors(str(path), metadata.get("general.alignment", ALIGNMENT)), metadata)
    except EOFError as error:
        raise WeightsError(f"{path} is truncated: {error}.") from error
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a GGUF file: {error}.") from error


class _Header:
    """Reads a header from front to back.

    Raises:
      EOFError: the file ends before what the header promises. ValueError: anything else is wrong.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0
        if self.take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; little-endian files of version 2 or 3 were expected")
        self.tensor_count, self.value_count = self.number("Q"), self.number("Q")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise EOFError(f"its header goes on where the file ends, after {len(self.data)} bytes")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        raise ValueError(f"a value is of the unknown kind {kind}")

    def array(self, kind: int, count: int) -> list[Any]:
        if kind in NUMBERS:
            form = np.dtype("<" + NUMBERS[kind])
            return np.frombuffer(self.take(count * form.itemsize), form).tolist()
        if kind == STRING:
            return [self.text() for _ in range(count)]
        raise ValueError(f"an array is of the unknown kind {kind}")

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(self.value_count):
            name = self.text()
            if name in found:
                raise ValueError(f"it holds two values of the name {name}")
            found[name] = self.value(self.number("I"))
        return found

    def tensors(self, file: str, alignment: Any) -> dict[str, FileTensor]:
        """All tensors; their bytes follow the header, from the next multiple of `alignment` on."""
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        entries: dict[str, _Entry] = {}
        for _ in range(self.tensor_count):
            name = self.text()
            if name in entries:
                raise ValueError(f"it holds two tensors of the name {name}")
            entries[name] = self.entry(name)
        start = -(-self.place // alignment) * alignment
        return {name: _tensor(self.data, start, file, name, entry) for name, entry in entries.items()}

    def entry(self, name: str) -> _Entry:
        axes = self.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{name} has {axes} axes")
        sizes = [self.number("Q") for _ in range(axes)]
        return _Entry(tuple(reversed(sizes)), self.number("I"), self.number("Q"))  # the file has the last axis first


class _Entry(NamedTuple):
    """A tensor as the header has it; `offset` counts from the first tensor's place."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def _tensor(data: mmap.mmap, start: int, file: str, name: str, entry: _Entry) -> FileTensor:
    """Raises EOFError where the file is too short for it, ValueError where it cannot be decoded."""
    kind = _kind(entry.kind, name)
    if entry.shape[-1] % kind.size:
        raise ValueError(f"the rows of {name} have {entry.shape[-1]} numbers, which are no whole blocks of {kind.size}")
    row = entry.shape[-1] // kind.size * kind.width
    count, place = math.prod(entry.shape[:-1]) * row, start + entry.offset
    if place + count > len(data):
        raise EOFError(f"{name} ends at byte {place + count}, the file at byte {len(data)}")

    def read() -> np.ndarray:
        stored = np.frombuffer(data, np.uint8, count, place).reshape(*entry.shape[:-1], row)
        return kind.decode(stored)

    return FileTensor(entry.shape, kind.dtype, read, file)


class _Kind(NamedTuple):
    """How numbers are stored: `size` of them in `width` bytes; `decode` takes rows of bytes to rows of numbers."""

    size: int
    width: int
    dtype: np.dtype
    decode: Callable[[np.ndarray], np.ndarray]


def _kind(number: int, name: str) -> _Kind:
    """Raises ValueError, naming the tensor, where its kind cannot be decoded or the package `gguf` is needed for it."""
    if number in PLAIN:
        dtype = np.dtype(PLAIN[number])
        return _Kind(1, dtype.itemsize, dtype, lambda stored: stored.view(dtype))
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{name} is quantised, and the package gguf is not installed (pip install 'pixelstory-jax[gguf]')"
        ) from error
    known = {member.value: member for member in gguf.GGMLQuantizationType}
    if number not in known:
        raise ValueError(f"{name} is of the unknown kind {number}")
    size, width = gguf.GGML_QUANT_SIZES[known[number]]
    decode = functools.partial(gguf.quants.dequantize, qtype=known[number])
    try:
        decode(np.zeros((1, width), np.uint8))
    except NotImplementedError as error:
        raise ValueError(f"{name} is of the kind {known[number].name}, which cannot be decoded") from error
    return _Kind(size, width, np.dtype(np.float32), decode)


# What follows is about LLaMA.

SIZES = {
    "block_count": "layers",
    "embedding_length": "width",
    "feed_forward_length": "mlp_width",
    "attention.head_count": "heads",
    "context_length": "max_length",
}
HEAD_WIDTHS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
ONLY: dict[str, Any] = {  # what our network is, where a file says it
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
}
KEY_VALUE_HEADS, ROPE_BASE, EPS = "attention.head_count_kv", "rope.freq_base", "attention.layer_norm_rms_epsilon"
REMARKS = ("vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned")
KNOWN = {*SIZES, *HEAD_WIDTHS, *ONLY, KEY_VALUE_HEADS, ROPE_BASE, EPS, *REMARKS}


def gguf_config(metadata: Mapping[str, Any], tensors: TensorMap, **changes: Any) -> LlamaConfig:
    """Sizes of a file's network; `changes` replace fields.

    The vocabulary is counted on the embedding [V, D], which may be longer than the list of tokens.

    Raises:
      WeightsError: another architecture, a value that is missing, or one that our network does not have.
    """
    _is("general.architecture", metadata.get("general.architecture"), "llama")
    own = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    for key, value in own.items():
        if key not in KNOWN:
            raise WeightsError(f"llama.{key} is {value!r}, which our network does not have.")
        if key in ONLY:
            _is(f"llama.{key}", value, ONLY[key])
    _check_rope_factors(tensors)
    sizes: dict[str, Any] = {ours: _number(own, key, int) for key, ours in SIZES.items()}
    sizes["kv_heads"] = _number(own, KEY_VALUE_HEADS, int, sizes["heads"])
    sizes["rope_theta"] = _number(own, ROPE_BASE, float, 10000.0)
    sizes["norm_eps"] = float(str(np.float32(_number(own, EPS, float))))  # 1e-05 rather than 9.999999747378752e-06
    if EMBEDDING not in tensors:
        raise WeightsError(f"The file has no tensor {EMBEDDING}.")
    sizes["vocab"] = tensors[EMBEDDING].shape[0]
    try:
        config = LlamaConfig(**{**sizes, **changes})
    except ValueError as error:
        raise WeightsError(f"The sizes in the file make no network: {error}") from error
    for key in HEAD_WIDTHS:
        _is(f"llama.{key}", own.get(key, config.head_width), config.head_width)
    return config


def _is(key: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise WeightsError(f"{key} is {value!r}; {expected!r} is what can be read.")


def _number(own: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = own.get(key, default)
    if value is None:
        raise WeightsError(f"The file has no llama.{key}.")
    if not isinstance(value, kind):
        raise WeightsError(f"llama.{key} is {value!r}; one {'whole number' if kind is int else 'number'} was expected.")
    return value


def _check_rope_factors(tensors: TensorMap) -> None:
    """Llama 3.1 and later scale rotary frequencies by a tensor, and no key of their files says so."""
    factors = np.asarray(tensors[ROPE_FACTORS]) if ROPE_FACTORS in tensors else np.ones(1)
    if np.any(factors != 1):
        raise WeightsError(
            f"{ROPE_FACTORS} scales the rotary frequencies by up to {factors.max():g}, which our network does not have."
        )


def gguf_table(config: LlamaConfig, tied: bool) -> Table:
    """Names of llama.cpp and our parameters.

    llama.cpp rotates adjacent numbers, so its converter has interleaved the rows of queries and keys within each head;
    ours are in halves. Tied: there is no output matrix, the embedding is read for it.
    """
    layer = "blk.{n}."

    def paired(heads: int) -> Layout:
        return Layout("(n half two) i", "i (n two half)", (("n", heads), ("two", 2)))

    return Table(
        rows=(
            Row(EMBEDDING, "embedding"),
            Row("output_norm.weight", "final_norm/scale"),
            Row(EMBEDDING if tied else HEAD, "head", "linear"),
            Row(layer + "attn_norm.weight", "layers/attention_norm/scale"),
            Row(layer + "ffn_norm.weight", "layers/mlp_norm/scale"),
            Row(layer + "attn_q.weight", "layers/attention/query/kernel", paired(config.heads)),
            Row(layer + "attn_k.weight", "layers/attention/key/kernel", paired(config.kv_heads)),
            Row(layer + "attn_v.weight", "layers/attention/value/kernel", "linear"),
            Row(layer + "attn_output.weight", "layers/attention/out/kernel", "linear"),
            Row(layer + "ffn_gate.weight", "layers/mlp/gate/kernel", "linear"),
            Row(layer + "ffn_up.weight", "layers/mlp/up/kernel", "linear"),
            Row(layer + "ffn_down.weight", "layers/mlp/down/kernel", "linear"),
        ),
        ignored=(r"rope_freqs\.weight",),
        ours_only=(r"layers/.*/lora_[ab]",),
    )


def gguf_llama(file: GgufFile, **changes: Any) -> tuple[LlamaConfig, LazyParams]:
    """The network of a file: sizes and parameters by slash path, not read yet; `changes` replace fields of the sizes.

    Raises:
      WeightsError: the network is not ours, or tensors do not fit; all of them are named.
    """
    config = gguf_config(file.metadata, file.tensors, **changes)
    return config, map_tensors(gguf_table(config, HEAD not in file.tensors), file.tensors, llama_shapes(config))


# What follows is about text.

_MARKS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def gguf_marks(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the marks of a text, as `generation_config.json` calls them: bos_token_id, eos_token_id, …"""
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in _MARKS.items()}
    return {f"{ours}_id": int(id_) for ours, id_ in ids.items() if id_ is not None}


def gguf_tokenizer_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `tokenizer_config.json` beside `gguf_tokenizer_json`: marks by their text, and the template of chats."""
    tokens = metadata["tokenizer.ggml.tokens"]
    marks = {name.removesuffix("_id"): tokens[id_] for name, id_ in gguf_marks(metadata).items() if id_ < len(tokens)}
    template = metadata.get("tokenizer.chat_template")
    length = metadata.get("llama.context_length")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        **({"model_max_length": int(length)} if length else {}),
        **({"chat_template": str(template)} if template else {}),
        "clean_up_tokenization_spaces": False,
    }


UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of tokens that are found in a text before all else
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The tokenizer of a file, for the library `tokenizers`: byte-level BPE over words of GPT-2, SmolLM or Llama 3.

    Raises:
      WeightsError: another kind of tokenizer, or lists that do not fit one another. A SentencePiece vocabulary
        (`tokenizer.ggml.model` "llama") is refused: `tokenizers` merges by the rank of pairs, SentencePiece by the
        score of what they become, and the two do not always agree.
    """
    from tokenizers import AddedToken, decoders

    if metadata.get("tokenizer.ggml.model") == "llama":
        raise WeightsError(
            'tokenizer.ggml.model is "llama", a SentencePiece vocabulary, which has no exact form as a JSON of '
            "tokenizers; use the tokenizer.model that the weights were released with."
        )
    _is("tokenizer.ggml.model", metadata.get("tokenizer.ggml.model"), "gpt2")
    tokens, kinds = _list(metadata, "tokens"), _list(metadata, "token_type")
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise WeightsError(f"{len(tokens)} tokenizer.ggml.tokens repeat, or do not fit {len(kinds)} kinds.")
    tokenizer = _byte_pairs(metadata, tokens)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    _add_ends(tokenizer, metadata, tokens)
    return tokenizer.to_str()


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list):
        raise WeightsError(f"The file has no list tokenizer.ggml.{name}.")
    return value


def _byte_pairs(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """A `tokenizers.Tokenizer` without added tokens. Raises WeightsError."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    gpt_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {
        "gpt-2": gpt_2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt_2]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in words:
        raise WeightsError(f"tokenizer.ggml.pre is {pre!r}; {' or '.join(map(repr, words))} is what can be read.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges")]
    try:
        # Llama 3 takes a word that is a token as it is, even where no merges lead to it.
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises nothing more precise
        raise WeightsError(f"tokenizer.ggml.merges do not fit the tokens: {error}.") from error
    tokenizer.pre_tokenizer = words[pre]
    return tokenizer


def _add_ends(tokenizer: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """The marks that are put before and after every text, if the file wants them."""
    from tokenizers import processors

    wanted = {"bos": metadata.get("tokenizer.ggml.pre") == "llama-bpe", "eos": False}  # as llama.cpp has it
    marks: dict[str, tuple[str, int]] = {}
    for name, default in wanted.items():
        if not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            continue
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise WeightsError(f"tokenizer.ggml.{name}_token_id is {number!r}, which is no token of the file.")
        marks[name] = tokens[number], number
    if marks:
        first, last = ([marks[name][0]] if name in marks else [] for name in wanted)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], special_tokens=list(marks.values())
        )
