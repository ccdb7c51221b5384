"""Text to ids and back, with the added tokens of a multimodal LLaMA: image markers and the segmentation codebook.

Two kinds of vocabularies sit behind one class: SentencePiece files (LLaMA, LLaVA, PixelLM releases) and JSON files of
`tokenizers` (the small one that ships with the package, and those that came with other weights). The rules around
added tokens are those of the slow LLaMA tokenizer that the released weights were trained with (transformers 4.31,
`legacy=True`):

* added tokens split the text first, and white space next to one of them is dropped on both sides;
* every piece between them is encoded alone, so it starts with its own word boundary (after `[SEG5]` a full stop is
  `▁.`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

IMAGE_TOKEN = -200  # stands for one image embedding; it has no row in the embedding table
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"
SMALL_VOCABULARY = Path(__file__).parent / "builtin" / "assets" / "tokenizer.json"


def codebook_names(count: int) -> tuple[str, ...]:
    """Names of the `count` codebook tokens: `[SEG0]`, `[SEG1]`, …; a codebook of one token is LISA's plain `[SEG]`."""
    return ("[SEG]",) if count == 1 else tuple(f"[SEG{i}]" for i in range(count))


@dataclass(frozen=True)
class Tokenizer:
    """A base vocabulary plus added tokens.

    Attributes:
      encode_piece: text without added tokens to ids, with a word boundary in front.
      decode_pieces: ids of the base vocabulary to text.
      base_size: number of ids of the base vocabulary.
      added: added token to id. Ids above the base are given in order; a released vocabulary may hold some already.
    """

    encode_piece: Callable[[str], list[int]]
    decode_pieces: Callable[[list[int]], str]
    base_size: int
    added: dict[str, int]
    codebook: tuple[str, ...]
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    _split: re.Pattern = field(init=False, repr=False)

    def __post_init__(self):
        names = sorted(self.added, key=len, reverse=True)
        object.__setattr__(self, "_split", re.compile(r"\s*(" + "|".join(map(re.escape, names)) + r")\s*"))

    @property
    def vocab_size(self) -> int:
        return max(self.base_size, max(self.added.values()) + 1)

    @property
    def codebook_ids(self) -> tuple[int, ...]:
        """Ids of the codebook tokens of one target, scale by scale."""
        return tuple(self.added[name] for name in self.codebook)

    @property
    def image_start_id(self) -> int:
        return self.added[IMAGE_START]

    @property
    def image_end_id(self) -> int:
        return self.added[IMAGE_END]

    @property
    def group(self) -> str:
        """The text of one target: its codebook tokens joined by single spaces."""
        return " ".join(self.codebook)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without beginning or end of sequence."""
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self.added[piece])
            elif piece:
                ids.extend(self.encode_piece(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; image placeholders are left out, added tokens are kept, white space is single."""
        names = {id_: name for name, id_ in self.added.items()}
        words: list[str] = []
        run: list[int] = []
        skipped = {self.bos_id, self.eos_id, self.pad_id, IMAGE_TOKEN}
        for id_ in [*(int(i) for i in ids), None]:
            if id_ is not None and id_ not in names:
                if id_ not in skipped:
                    run.append(id_)
                continue
            if run:
                words.append(self.decode_pieces(run).strip())
                run = []
            if id_ is not None:
                words.append(names[id_])
        return re.sub(r"\s+", " ", " ".join(words)).strip()


def _with_added(
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    base_size: int,
    codebook_tokens: int,
    known: dict[str, int],
) -> Tokenizer:
    """Gives the codebook and the image markers the next free ids, in the order of the reference, unless already
    known."""
    codebook = codebook_names(codebook_tokens)
    added = dict(known)
    following = max([base_size - 1, *known.values()]) + 1
    for name in (*codebook, IMAGE_START, IMAGE_END):
        if name not in added:
            added[name] = following
            following += 1
    return Tokenizer(encode, decode, base_size, added, codebook)


def small_tokenizer(codebook_tokens: int = 6, path: str | Path = SMALL_VOCABULARY) -> Tokenizer:
    """The vocabulary that ships with the package, for the tiny models."""
    from tokenizers import Tokenizer as Vocabulary

    vocabulary = Vocabulary.from_file(str(path))

    def encode(text: str) -> list[int]:
        return vocabulary.encode(text).ids

    return _with_added(encode, vocabulary.decode, vocabulary.get_vocab_size(), codebook_tokens, {})


def llama_tokenizer(path: str | Path, codebook_tokens: int = 6, known: dict[str, int] | None = None) -> Tokenizer:
    """A LLaMA SentencePiece file (`tokenizer.model`).

    Args:
      known: ids of tokens that the weights know beyond the file's. By default those of an `added_tokens.json` beside
        it, where LLaVA and PixelLM releases keep them.

    Raises:
      ValueError: a file is missing or damaged.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a SentencePiece model: {error}") from error
    if known is None:
        known = _added_tokens_beside(Path(path))
    return _with_added(model.encode, model.decode, model.get_piece_size(), codebook_tokens, known)


def json_tokenizer(path: str | Path, codebook_tokens: int = 6) -> Tokenizer:
    """A `tokenizer.json` of the library `tokenizers`; codebook and image marks that it has already keep their ids.

    The marks of a text are those that a `tokenizer_config.json` beside it names, else <s>, </s> and <unk>.

    Raises:
      ValueError: the file is missing or damaged, or has no such marks.
    """
    from tokenizers import Tokenizer as Vocabulary

    try:
        vocabulary = Vocabulary.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{path} cannot be read as a tokenizer.json: {error}") from error
    own = {*codebook_names(codebook_tokens), IMAGE_START, IMAGE_END}
    ids = vocabulary.get_vocab(with_added_tokens=True)
    known = {name: id_ for name, id_ in ids.items() if name in own}
    base_size = max((id_ for name, id_ in ids.items() if name not in own), default=-1) + 1
    bos, eos, unk = _marks_beside(Path(path))
    absent = [mark for mark in (bos, eos) if mark not in ids]
    if absent:
        raise ValueError(
            f"{path} has no {' and no '.join(absent)}; a tokenizer_config.json beside it has to name its marks."
        )

    def encode(text: str) -> list[int]:
        return vocabulary.encode(text, add_special_tokens=False).ids

    tokenizer = _with_added(encode, vocabulary.decode, base_size, codebook_tokens, known)
    unk_id = ids.get(unk, ids[eos])
    return replace(tokenizer, unk_id=unk_id, bos_id=ids[bos], eos_id=ids[eos], pad_id=unk_id)


def _marks_beside(path: Path) -> tuple[str, str, str]:
    """Beginning and end of a text, and the unknown token."""
    file = path.with_name("tokenizer_config.json")
    if not file.is_file():
        return "<s>", "</s>", "<unk>"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        named = [settings.get(name) for name in ("bos_token", "eos_token", "unk_token")]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a table of settings: {error}") from error
    bos, eos, unk = (mark.get("content") if isinstance(mark, dict) else mark for mark in named)
    eos = eos or "</s>"
    return bos or eos, eos, unk or "<unk>"  # some vocabularies have one mark for both ends


def _added_tokens_beside(path: Path) -> dict[str, int]:
    file = path.with_name("added_tokens.json")
    if not file.is_file():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): int(id_) for name, id_ in known.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a table of tokens and ids: {error}") from error


def train_small_vocabulary(texts: Iterable[str], path: str | Path, size: int = 900) -> None:
    """Fits the small byte-pair vocabulary to texts and writes its JSON file.

    Printable ASCII is always part of the alphabet, so that any English text can be spelled; other letters are `<unk>`.
    """
    from tokenizers import Tokenizer as Vocabulary
    from tokenizers import decoders, models, pre_tokenizers, trainers

    vocabulary = Vocabulary(models.BPE(unk_token="<unk>", fuse_unk=True))
    # Punctuation first, so that "apple." and "apple" share a token; the boundary mark then marks starts of words only.
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation()]
    )
    vocabulary.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*map(chr, range(33, 127)), "▁"],
        min_frequency=4,
    )
    vocabulary.train_from_iterator(texts, trainer)
    vocabulary.save(str(path), pretty=False)


def find_groups(ids: Sequence[int], codebook_ids: Sequence[int]) -> list[int]:
    """Start positions of the complete token groups in ids: the codebook's tokens, all of them, in order.

    An incomplete or disordered group is passed over; the complete ones around it are kept.
    """
    group = list(codebook_ids)
    starts = []
    i = 0
    while i + len(group) <= len(ids):
        if [int(x) for x in ids[i : i + len(group)]] == group:
            starts.append(i)
            i += len(group)
        else:
            i += 1
    return starts
