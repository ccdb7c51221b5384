"""CLIP's byte-pair tokenizer: text to the fixed number of ids that the text encoders take, and back.

The rules are those of transformers' CLIPTokenizer (version 5): unicode form NFC, white space to single blanks, lower
case, then words, single digits, English contractions and runs of other signs, each spelled in bytes and merged up to
its end-of-word mark `</w>`. OpenAI's own code also resolves HTML entities and mends broken unicode; this does neither.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Vocabulary

LENGTH = 77  # ids of a text where nothing else is said
BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
SMALL_CLIP_VOCABULARY = Path(__file__).parent / "builtin" / "assets" / "clip_vocabulary"

Merges = list[tuple[str, str]]
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_OPENAI_MERGES = 49152 - 256 - 2  # OpenAI's file has 262,144 of them; the released encoders know this many
_MARKS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONTENT = "a tokenizer folder holds vocab.json and merges.txt, or tokenizer.json"


@dataclass(frozen=True)
class ClipTokenizer:
    """A vocabulary, its marks and the length of its texts.

    Attributes:
      bos_id, eos_id: marks before and after every text.
      pad_id: fills up to the length. The end mark in SD 1.5 and the first tokenizer of SDXL, 0 in its second one,
        where it is "!": an exclamation mark in a text then has this id too.
      length: ids of an encoded text, marks and padding included.
    """

    vocabulary: Vocabulary
    bos_id: int
    eos_id: int
    pad_id: int
    length: int = LENGTH

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> ClipTokenizer:
        """The tokenizer of a folder as transformers and diffusers write it.

        Read are vocab.json and merges.txt (without them tokenizer.json), the marks and the length of
        tokenizer_config.json and special_tokens_map.json, and what was added to the vocabulary later
        (tokenizer_config.json, added_tokens.json or tokenizer.json).

        Raises:
          ValueError: a file is missing or damaged; the sentence names it.
        """
        folder = Path(path)
        vocab, merges = _read_vocabulary(folder)
        config = _read_table(folder / "tokenizer_config.json", optional=True)
        kind = config.get("tokenizer_class", "CLIPTokenizer")
        if "CLIP" not in str(kind):
            raise ValueError(f"{folder} holds a {kind}; a CLIPTokenizer is needed.")
        marks = _MARKS | _read_marks(config, folder)
        if "added_tokens_decoder" not in config:  # older folders: the map has the last word
            marks |= _read_marks(_read_table(folder / "special_tokens_map.json", optional=True), folder)
        length = config.get("model_max_length", LENGTH)
        if not isinstance(length, int) or length > 1e20:  # how transformers says that there is no limit
            length = LENGTH
        return _tokenizer(vocab, merges, marks, _read_added(folder, config), length, folder)

    @classmethod
    def from_openai(cls, path: str | os.PathLike[str], pad: str = EOS) -> ClipTokenizer:
        """The tokenizer of OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

        Raises:
          ValueError: the file is missing or damaged.
        """
        try:
            lines = gzip.decompress(Path(path).read_bytes()).decode().splitlines()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as a gzipped list of merges: {error}.") from error
        merges = _parse_merges(lines[1 : _OPENAI_MERGES + 1], Path(path))
        return _tokenizer(number_tokens(merges), merges, {**_MARKS, "pad_token": pad}, {}, LENGTH, Path(path))

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.get_vocab_size()

    def pieces(self, text: str) -> list[int]:
        """Ids of the whole text, without marks and of any length."""
        return self.vocabulary.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Ids of a text between its marks, cut (the end mark stays) or padded to the length.

        Args:
          length: number of ids; None for the tokenizer's own.

        Returns:
          int32 [length].
        """
        length = self.length if length is None else length
        if length < 2:
            raise ValueError(f"length is {length}; the two marks alone need 2.")
        ids = [self.bos_id, *self.pieces(text)[: length - 2], self.eos_id]
        row = np.full(length, self.pad_id, np.int32)
        row[: len(ids)] = ids
        return row

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: lower case, pieces parted by single blanks, without marks and what follows the last end mark.

        Raises:
          ValueError: an id that the vocabulary does not have.
        """
        from tokenizers import decoders

        numbers = [int(id_) for id_ in ids]
        if self.eos_id in numbers:
            numbers = numbers[: len(numbers) - 1 - numbers[::-1].index(self.eos_id)]
        added = self.vocabulary.get_added_tokens_decoder()
        tokens = []
        for id_ in numbers:
            token = self.vocabulary.id_to_token(id_) if id_ >= 0 else None
            if token is None:
                raise ValueError(f"Id {id_} is not in this vocabulary of {self.vocab_size}.")
            if id_ not in (self.bos_id, self.eos_id):
                tokens.append(token + END_OF_WORD if id_ in added else token)
        return decoders.ByteLevel().decode(tokens).replace(END_OF_WORD, " ").strip()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the `files`, which transformers reads, into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            _write(folder / name, text)

    def files(self) -> dict[str, str]:
        """The content of vocab.json, merges.txt and tokenizer_config.json."""
        vocab = self.vocabulary.get_vocab(with_added_tokens=False)
        merges = json.loads(self.vocabulary.to_str())["model"]["merges"]
        added = self.vocabulary.get_added_tokens_decoder()
        config: dict[str, Any] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.length,
            "bos_token": self.vocabulary.id_to_token(self.bos_id),
            "eos_token": self.vocabulary.id_to_token(self.eos_id),
            "unk_token": self.vocabulary.model.unk_token,
            "pad_token": self.vocabulary.id_to_token(self.pad_id),
            "added_tokens_decoder": {
                str(id_): {"content": token.content, **{flag: getattr(token, flag) for flag in _FLAGS}}
                for id_, token in sorted(added.items())
            },
        }
        ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
        return {
            "vocab.json": json.dumps(ordered, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }


def small_clip_tokenizer() -> ClipTokenizer:
    """The vocabulary that ships with the package, for the tiny models."""
    return ClipTokenizer.from_folder(SMALL_CLIP_VOCABULARY)


def train_clip_vocabulary(texts: Iterable[str], size: int, length: int) -> ClipTokenizer:
    """A tokenizer whose merges are fitted to texts; the same texts give the same merges.

    Args:
      size: number of ids; 512 are bytes, 2 are marks.
      length: ids of an encoded text.

    Raises:
      ValueError: a size without room for a merge, or texts that do not have enough different words for it.
    """
    from tokenizers import trainers

    bare = number_tokens([])
    if size <= len(bare):
        raise ValueError(f"size is {size}; bytes and marks alone take {len(bare)}.")
    vocabulary = _tokenizer(bare, [], _MARKS, {}, length, Path()).vocabulary
    # Without numbers given beforehand the trainer numbers ends of words at random, and by number it decides ties.
    alphabet = [token for token in bare if token not in (BOS, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=alphabet, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    vocabulary.train_from_iterator(texts, trainer)
    merges: Merges = []
    for merge in json.loads(vocabulary.to_str())["model"]["merges"]:
        merges.append((merge[0], merge[1]))
        vocab = number_tokens(merges)
        if len(vocab) == size:
            return _tokenizer(vocab, merges, _MARKS, {}, length, Path())
    raise ValueError(f"The texts give {len(merges)} merges, too few for a vocabulary of {size}.")


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in CLIP's order: printable bytes first ("!" is 0)."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def number_tokens(merges: Merges) -> dict[str, int]:
    """Token to id in CLIP's order: bytes, bytes that end a word, the results of the merges, the two marks."""
    letters = byte_letters()
    ends = [letter + END_OF_WORD for letter in letters]
    tokens = dict.fromkeys([*letters, *ends, *map("".join, merges), BOS, EOS])  # two merges may give the same token
    return {token: id_ for id_, token in enumerate(tokens)}


def _tokenizer(
    vocab: Mapping[str, int],
    merges: Merges,
    marks: Mapping[str, str],
    added: Mapping[str, Mapping[str, Any]],
    length: int,
    source: Path,
) -> ClipTokenizer:
    """Puts the parts together; `added` is token -> id and flags, `source` names the place in errors."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    try:
        model = models.BPE(
            vocab=dict(vocab), merges=merges, end_of_word_suffix=END_OF_WORD, unk_token=marks["unk_token"]
        )
    except Exception as error:  # the library has no class of its own for this
        raise ValueError(f"{source}: the merges do not fit the vocabulary ({error}).") from error
    vocabulary = Tokenizer(model)
    vocabulary.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for token, entry in sorted(added.items(), key=lambda item: item[1]["id"]):
        flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
        vocabulary.add_tokens([AddedToken(token, **flags)])
        if vocabulary.token_to_id(token) != entry["id"]:
            raise ValueError(f"{source}: the added token {token!r} has id {entry['id']}, which leaves a gap.")
    ids = {}
    for mark, token in marks.items():
        id_ = vocabulary.token_to_id(token)
        if id_ is None:
            raise ValueError(f"{source}: the vocabulary has no {token!r}, its {mark}.")
        ids[mark] = id_
        if token not in added:
            vocabulary.add_tokens([AddedToken(token, special=True, normalized=False)])
    return ClipTokenizer(vocabulary, ids["bos_token"], ids["eos_token"], ids["pad_token"], length)


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], Merges]:
    files = folder / "vocab.json", folder / "merges.txt"
    whole = folder / "tokenizer.json"
    if whole.is_file() and not all(file.is_file() for file in files):
        model = _read_table(whole).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise ValueError(f"{whole} holds no byte-pair vocabulary with merges.")
        return _checked_ids(model.get("vocab"), whole), _parse_merges(model["merges"], whole)
    vocab = _checked_ids(_read_table(files[0]), files[0])
    try:
        lines = files[1].read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{files[1]} cannot be read ({error}); {_CONTENT}.") from error
    lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    return vocab, _parse_merges(lines, files[1])


def _parse_merges(lines: Sequence[Any], source: Path) -> Merges:
    merges = []
    for line in lines:
        pair = line.split() if isinstance(line, str) else line
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{source}: {line!r} is not a merge, which is two pieces.")
        merges.append((pair[0], pair[1]))
    return merges


def _checked_ids(vocab: Any, source: Path) -> dict[str, int]:
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if not ids or not all(isinstance(id_, int) and id_ >= 0 for id_ in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{source} is not a vocabulary, which is a table of tokens and their ids.")
    return vocab


def _read_table(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {_CONTENT}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a JSON table.")
    return table


def _read_marks(table: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The marks that a table names, as a text or as a table with `content`."""
    marks = {}
    for mark in _MARKS:
        token = table.get(mark)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            marks[mark] = token
        elif table.get(mark) is not None:
            raise ValueError(f"{folder}: the {mark} is {table[mark]!r}; a text was expected, or a table with content.")
    return marks


def _read_added(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tokens that were added to the vocabulary or made special: token -> id and flags."""
    whole = _read_table(folder / "tokenizer.json", optional=True)
    bare = _read_table(folder / "added_tokens.json", optional=True)
    try:
        entries = list(whole.get("added_tokens", []))
        entries += [{"content": token, "id": id_} for token, id_ in bare.items()]
        entries += [{**entry, "id": id_} for id_, entry in config.get("added_tokens_decoder", {}).items()]
        return {str(entry["content"]): {**entry, "id": int(entry["id"])} for entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its added tokens are no tables of content and id ({error!r}).") from error


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
