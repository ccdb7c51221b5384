"""The rules around added tokens, ids of the codebook, groups, and the way back to text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pixelstory_jax.data.tokenizers import (
    IMAGE_TOKEN,
    codebook_names,
    find_groups,
    llama_tokenizer,
    small_tokenizer,
    train_small_vocabulary,
)

LLAVA_TOKENS = {"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}
SENTENCES = (
    "The apple is on the table, left of the cup.",
    "What could you eat here? The bread and the cheese.",
    "Please find every animal in this picture. There is a dog, a cat and a bird.",
    "USER: Where is the red car? ASSISTANT: It is behind the tree.",
)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory):
    """A miniature vocabulary with LLaMA's options: BPE, dummy prefix, byte fallback, <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "mini"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def llama(sentencepiece_file):
    return llama_tokenizer(sentencepiece_file)


@pytest.fixture(scope="module")
def small():
    return small_tokenizer()


class Released32000:
    """Stands for LLaMA's 32,000 pieces where only their number matters."""

    def __init__(self, model_file: str) -> None:
        pass

    def get_piece_size(self) -> int:
        return 32000

    def encode(self, text: str) -> list[int]:
        return [3] * len(text.split())

    def decode(self, ids: list[int]) -> str:
        return " ".join("word" for _ in ids)


def test_codebook_names():
    assert codebook_names(6) == ("[SEG0]", "[SEG1]", "[SEG2]", "[SEG3]", "[SEG4]", "[SEG5]")
    assert codebook_names(1) == ("[SEG]",)


def test_released_ids_of_7b_and_13b(monkeypatch):
    """32003..32008 behind LLaVA's image tokens, 32000..32005 on a bare LLaMA-2."""
    monkeypatch.setattr("sentencepiece.SentencePieceProcessor", Released32000)
    seven = llama_tokenizer("tokenizer.model", 6, LLAVA_TOKENS)
    assert seven.codebook_ids == tuple(range(32003, 32009))
    assert (seven.image_start_id, seven.image_end_id, seven.vocab_size) == (32001, 32002, 32009)
    thirteen = llama_tokenizer("tokenizer.model", 6)
    assert thirteen.codebook_ids == tuple(range(32000, 32006))
    assert (thirteen.image_start_id, thirteen.image_end_id, thirteen.vocab_size) == (32006, 32007, 32008)
    lisa = llama_tokenizer("tokenizer.model", 1, LLAVA_TOKENS)
    assert lisa.codebook_ids == (32003,) and lisa.vocab_size == 32004


def test_special_ids(llama):
    assert (llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id) == (0, 1, 2, 0)


def test_white_space_next_to_added_tokens_vanishes(llama):
    group = list(llama.codebook_ids)
    assert llama.encode(llama.group) == group
    assert llama.encode("  [SEG0]\n[SEG1] \t[SEG2][SEG3]   [SEG4] [SEG5] \n") == group
    assert llama.encode("<im_start><im_end>\nWhere?") == llama.encode("<im_start><im_end>Where?")
    tight, loose = llama.encode("the cup[SEG0]is"), llama.encode("the cup  [SEG0]  is")
    assert tight == loose


def test_each_piece_has_its_own_word_boundary(llama, sentencepiece_file):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    ids = llama.encode(f"The apple {llama.group}.")
    tail = ids[ids.index(llama.codebook_ids[-1]) + 1 :]
    assert model.id_to_piece(tail[0]).startswith("▁")  # "▁.", never the "." inside of a sentence
    assert tail == model.encode(".")
    assert tail[0] != model.encode("The apple.")[-1]
    assert ids[: ids.index(llama.codebook_ids[0])] == model.encode("The apple")


def test_text_without_added_tokens_is_left_alone(llama, sentencepiece_file):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    text = "The  apple is\non the table "
    assert llama.encode(text) == model.encode(text)
    assert llama.encode("") == []


@pytest.mark.parametrize("text", [*SENTENCES, "3 2 9 8, then 15!"])
@pytest.mark.parametrize("vocabulary", ["llama", "small"])
def test_encode_then_decode_gives_the_text(vocabulary, text, request):
    tokenizer = request.getfixturevalue(vocabulary)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("vocabulary", ["llama", "small"])
def test_decode_keeps_groups_and_drops_markers(vocabulary, request):
    tokenizer = request.getfixturevalue(vocabulary)
    ids = [
        tokenizer.bos_id,
        IMAGE_TOKEN,
        IMAGE_TOKEN,
        *tokenizer.encode(f"The cup {tokenizer.group}."),
        tokenizer.eos_id,
    ]
    assert tokenizer.decode(ids) == f"The cup {tokenizer.group} ."
    assert tokenizer.decode([]) == ""


def test_unknown_letters(llama, small):
    assert llama.decode(llama.encode("Ein Käse für 3 €")) == "Ein Käse für 3 €"  # spelled in bytes
    ids = small.encode("the käse")
    assert small.unk_id in ids and all(0 <= id_ < small.vocab_size for id_ in ids)
    assert small.decode(ids).startswith("the k")
    for code in range(33, 127):  # any printable ASCII can be spelled
        assert small.unk_id not in small.encode(f"a{chr(code)}b")


def test_small_vocabulary_fits_the_tiny_model(small):
    from pixelstory_jax.models.pixellm import PixelLMConfig

    config = PixelLMConfig.tiny()
    assert len(small.codebook_ids) == config.group
    assert small.vocab_size <= config.llama.vocab
    assert len(set(small.added.values())) == len(small.added) == 8
    assert min(small.added.values()) == small.base_size


def test_small_vocabulary_can_be_trained(tmp_path):
    train_small_vocabulary(SENTENCES * 4, tmp_path / "vocabulary.json", size=160)
    tokenizer = small_tokenizer(2, tmp_path / "vocabulary.json")
    assert tokenizer.codebook == ("[SEG0]", "[SEG1]")
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]


def test_find_groups_keeps_complete_groups_only():
    a, b, c = group = (7, 8, 9)
    assert find_groups([1, a, b, c, 2, a, b, c], group) == [1, 5]
    assert find_groups([a, b, c, a, b, c], group) == [0, 3]
    assert find_groups([a, b, 2, a, b, c, a], group) == [3]  # cut short before and after
    assert find_groups([a, a, b, c], group) == [1]
    assert find_groups([c, b, a, 1], group) == []
    assert find_groups([a, b], group) == [] and find_groups([], group) == []
    assert find_groups([5, 5], (5,)) == [0, 1]


def test_bad_file(tmp_path):
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"no vocabulary")
    for path in (broken, tmp_path / "missing.model"):
        with pytest.raises(ValueError, match="cannot be read as a SentencePiece model"):
            llama_tokenizer(path)


def test_ids_of_released_added_tokens_are_kept(sentencepiece_file, tmp_path):
    """PixelLM-7B: LLaVA's image tokens are 32000 to 32002, so the codebook starts at 32003."""
    model = tmp_path / "tokenizer.model"
    model.write_bytes(Path(sentencepiece_file).read_bytes())
    base = llama_tokenizer(model).base_size
    released = {"<im_patch>": base, "<im_start>": base + 1, "<im_end>": base + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(released))
    tokenizer = llama_tokenizer(model)
    assert tokenizer.codebook_ids == tuple(range(base + 3, base + 9))
    assert (tokenizer.image_start_id, tokenizer.image_end_id, tokenizer.vocab_size) == (base + 1, base + 2, base + 9)
    (tmp_path / "added_tokens.json").write_text('["<im_start>"]')
    with pytest.raises(ValueError, match="added_tokens.json"):
        llama_tokenizer(model)
