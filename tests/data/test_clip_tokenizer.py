"""CLIP's tokenizer: agreement with transformers and others, folders of every form, and the vocabulary that ships."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from pixelstory_jax.data.builtin.prepare_clip_vocabulary import OTHER_WORDS, training_texts
from pixelstory_jax.data.clip_tokenizer import (
    BOS,
    EOS,
    SMALL_CLIP_VOCABULARY,
    ClipTokenizer,
    byte_letters,
    number_tokens,
    small_clip_tokenizer,
    train_clip_vocabulary,
)

TEXTS = (
    "a robot is walking on a beach",
    "A  Girl\n\tin the PARK,   with a DOG!!",
    "it's the man's dog; they're 25 years old (2024)",
    "I'll I'VE 'S don't DON'T don''t 'tis 's's",
    "",
    "   ",
    "!",
    "a cat! and a dog? [NC] #tag (word:1.3)",
    "under_score-and--dashes... ?!?!",
    "e-mail@host.com 100% http://a.b/c?d=e",
    "naïve café cafe\u0301 ÉÀ ß ŒUVRE ΣΑΣ İstanbul Å ﬁn",
    "日本語のテキスト 漢字 한국어 عربى हिन्दी ไทย",
    "emoji 😀👩\u200d👩\u200d👧 🏳️\u200d🌈 ❤️",
    "1234567890 ½ Ⅷ ٣ 2nd 4k",
    "&amp; &lt;b&gt; &quot;",
    "“quotes” ‘single’ it’s",
    "a\u00a0b\u2003c\u3000d \ufeffbom \x00\x01ctrl\x7f",
    "<|startoftext|>hello<|endoftext|>! <|STARTOFTEXT|> </w> <w>",
    "the " * 200,
    "x" * 500,
)


@pytest.fixture(scope="module")
def small() -> ClipTokenizer:
    return small_clip_tokenizer()


@pytest.fixture(scope="module")
def openai_file() -> Path:
    """The file of OpenAI's package, where one that carries it is installed (clip-anytorch)."""
    package = importlib.util.find_spec("clip")
    for folder in (package and package.submodule_search_locations) or ():
        if (file := Path(folder) / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return file
    pytest.skip("no package with OpenAI's vocabulary is installed")


def assert_same_as_transformers(folder: Path, texts=TEXTS) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = ClipTokenizer.from_folder(folder)
    for text in texts:
        for length in (24, 77):
            expected = theirs(text, padding="max_length", truncation=True, max_length=length).input_ids
            assert ours.encode(text, length).tolist() == expected, text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.length == theirs.model_max_length or theirs.model_max_length > 1e20


def with_pad(folder: Path, pad: str) -> Path:
    """The small vocabulary with the settings of SDXL's second tokenizer, in the form of released folders."""
    tokenizer = small_clip_tokenizer()
    tokenizer.save(folder)
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    marks = {
        "bos_token": {"content": BOS, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        "eos_token": {"content": EOS, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        "pad_token": pad,
        "unk_token": EOS,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    return folder


def test_the_small_vocabulary_in_transformers():
    assert_same_as_transformers(SMALL_CLIP_VOCABULARY)


def test_a_pad_token_that_is_a_sign(tmp_path):
    """SDXL's second tokenizer pads with "!", which is then one id of its own, wherever it stands."""
    folder = with_pad(tmp_path, "!")
    assert_same_as_transformers(folder)
    tokenizer = ClipTokenizer.from_folder(folder)
    assert (tokenizer.pad_id, tokenizer.length) == (0, 77)
    start, cat, *rest = tokenizer.encode("cat!!", 8).tolist()
    assert rest == [0, 0, tokenizer.eos_id, 0, 0, 0]
    tokenizer.save(tmp_path / "saved")
    assert_same_as_transformers(tmp_path / "saved")
    assert ClipTokenizer.from_folder(with_pad(tmp_path, EOS)).pieces("!") == [256]  # "!</w>"


def test_added_tokens(tmp_path):
    """Tokens beyond the vocabulary, in each of the three files that may hold them."""
    folder = with_pad(tmp_path, EOS)
    (folder / "added_tokens.json").write_text(json.dumps({"img": 1024, "<my-cat>": 1025}))
    texts = (*TEXTS, "girl img, 4k", "an IMG of <my-cat>img")
    assert_same_as_transformers(folder, texts)
    tokenizer = ClipTokenizer.from_folder(folder)
    assert tokenizer.pieces("girl img, <my-cat>")[1::2] == [1024, 1025]
    assert tokenizer.decode(tokenizer.encode("girl img, <my-cat> img")) == "girl img , <my-cat> img"

    tokenizer.save(tmp_path / "saved")
    assert_same_as_transformers(tmp_path / "saved", texts)
    again = ClipTokenizer.from_folder(tmp_path / "saved")
    assert all(again.pieces(text) == tokenizer.pieces(text) for text in texts)


def test_a_folder_with_nothing_but_tokenizer_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(with_pad(tmp_path / "released", "!"))
    theirs.add_tokens(["img"], special_tokens=True)
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    assert_same_as_transformers(tmp_path / "saved", (*TEXTS, "girl img!"))
    assert ClipTokenizer.from_folder(tmp_path / "saved").pieces("img !") == [1024, 0]


def test_released_vocabulary_in_transformers(openai_file, tmp_path):
    tokenizer = ClipTokenizer.from_openai(openai_file)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (49408, 49406, 49407, 49407)
    assert tokenizer.encode("a photo of a cat", 8).tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    tokenizer.save(tmp_path)
    assert_same_as_transformers(tmp_path)


def test_released_vocabulary_in_another_implementation(openai_file):
    instant = pytest.importorskip("instant_clip_tokenizer").Tokenizer()
    tokenizer = ClipTokenizer.from_openai(openai_file)
    for text in TEXTS:
        if "cafe\u0301" not in text and BOS not in text:  # it knows neither NFC nor marks in a text
            assert tokenizer.pieces(text) == [int(id_) for id_ in instant.encode(text)], text


def test_openai_file_of_a_small_vocabulary(tmp_path, small):
    lines = (SMALL_CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(lines.encode()))
    tokenizer = ClipTokenizer.from_openai(tmp_path / "merges.txt.gz")
    assert all(tokenizer.pieces(text) == small.pieces(text) for text in TEXTS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.length) == (1022, 1023, 1023, 77)
    assert ClipTokenizer.from_openai(tmp_path / "merges.txt.gz", pad="!").pad_id == 0


def test_order_of_the_tokens():
    """Printable bytes first: "!" is 0, "~" 93, the last byte 255; then the same with the end of a word."""
    letters = byte_letters()
    assert (letters[0], letters[93], len(letters)) == ("!", "~", 256)
    table = number_tokens([("a", "b"), ("ab", "c</w>"), ("b", "c</w>"), ("a", "bc</w>")])
    assert [table[token] for token in ("!", "!</w>", "ab", "abc</w>", "bc</w>", BOS, EOS)] == [
        *(0, 256, 512, 513, 514, 515, 516)  # the last merge gives a token that is there already
    ]


def test_cut_and_padded(small):
    row = small.encode("a robot is walking on a beach")
    assert row.dtype == np.int32 and row.shape == (24,)
    assert row[0] == small.bos_id and row[7] != small.eos_id and (row[8:] == small.eos_id).all()
    cut = small.encode("a robot is walking on a beach", 5)
    assert cut.tolist() == [*row[:4], small.eos_id]
    assert small.encode("a robot", 2).tolist() == [small.bos_id, small.eos_id]
    with pytest.raises(ValueError, match="length is 1"):
        small.encode("a robot", 1)


def test_decode(small, tmp_path):
    assert small.decode(small.encode("A Robot,  walking 4 miles!")) == "a robot , walking 4 miles !"
    assert small.decode(small.encode("ein Käfer für 😀 日本", 60)) == "ein käfer für 😀 日本"
    assert small.decode([]) == small.decode(small.encode("")) == ""
    second = ClipTokenizer.from_folder(with_pad(tmp_path, "!"))
    assert second.decode(second.encode("stop!")) == "stop !"  # not the padding
    with pytest.raises(ValueError, match="Id 1024 is not in this vocabulary of 1024"):
        small.decode([3, 1024])
    with pytest.raises(ValueError, match="Id -1"):
        small.decode([-1])


def test_survives_pickling(small):
    again = pickle.loads(pickle.dumps(small))
    assert all(again.encode(text).tolist() == small.encode(text).tolist() for text in TEXTS)


def test_words_of_captions_are_single_tokens(small):
    """Run `python -m pixelstory_jax.data.builtin.prepare_clip_vocabulary` where captions got new words."""
    captions = [text for text in training_texts() if text != OTHER_WORDS]
    words = {word for caption in captions for word in re.findall("[a-z]+", caption)}
    assert len(words) > 100
    assert {word: len(small.pieces(word)) for word in words if len(small.pieces(word)) > 1} == {}
    assert max(len(small.pieces(caption)) for caption in captions) <= small.length - 2


def test_every_byte_can_be_spelled(small):
    assert small.vocab_size == 1024
    for code in (*range(33, 127), *range(0xA1, 0x800, 7)):
        text = f"a{chr(code)}b"
        assert small.eos_id not in small.pieces(text), text


def test_training_again_gives_the_same(tmp_path):
    """Although most of the pairs in so few words are equally frequent."""
    tokenizers = [train_clip_vocabulary([OTHER_WORDS], size=700, length=16) for _ in range(5)]
    for number, tokenizer in enumerate(tokenizers):
        tokenizer.save(tmp_path / str(number))
    assert len({(tmp_path / str(number) / "merges.txt").read_text() for number in range(5)}) == 1


def test_training(tmp_path):
    tokenizer = train_clip_vocabulary(["a robot on the moon", "the robot walks"] * 3, size=526, length=16)
    assert (tokenizer.vocab_size, tokenizer.length, tokenizer.eos_id) == (526, 16, 525)
    assert len(tokenizer.pieces("the robot")) < len("therobot")
    tokenizer.save(tmp_path)
    again = ClipTokenizer.from_folder(tmp_path)
    assert again.encode("A robot walks").tolist() == tokenizer.encode("A robot walks").tolist()
    with pytest.raises(ValueError, match="too few for a vocabulary of 1024"):
        train_clip_vocabulary(["a robot"], size=1024, length=16)
    with pytest.raises(ValueError, match="bytes and marks alone take 514"):
        train_clip_vocabulary(["a robot"], size=514, length=16)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("vocab.json", None, "vocab.json cannot be read"),
        ("merges.txt", None, "merges.txt cannot be read"),
        ("vocab.json", "{", "vocab.json is not JSON"),
        ("vocab.json", "[1]", "vocab.json is not a JSON table"),
        ("vocab.json", '{"a": 0, "b": 0}', "vocab.json is not a vocabulary"),
        ("vocab.json", '{"a": "0"}', "vocab.json is not a vocabulary"),
        ("vocab.json", '{"a": 0, "b": 1}', "the merges do not fit the vocabulary"),
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt: 'a b c' is not a merge"),
        ("merges.txt", "#version: 0.2\nthe robot\n", "the merges do not fit the vocabulary"),
        ("tokenizer_config.json", "no", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", '{"pad_token": "<pad>"}', "the vocabulary has no '<pad>', its pad_token"),
        ("tokenizer_config.json", '{"pad_token": 3}', "the pad_token is 3"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "holds a GPT2Tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "img"}}}', "its added tokens are no"),
        ("added_tokens.json", '{"img": 1030}', "'img' has id 1030, which leaves a gap"),
    ],
)
def test_damaged_folders(tmp_path, file, content, sentence):
    small_clip_tokenizer().save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        ClipTokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_openai_file(tmp_path):
    for content in (b"not gzipped", gzip.compress(b"#version\na b\n")[:-9]):
        (tmp_path / "merges.txt.gz").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a gzipped list of merges"):
            ClipTokenizer.from_openai(tmp_path / "merges.txt.gz")
    with pytest.raises(ValueError, match="cannot be read"):
        ClipTokenizer.from_openai(tmp_path / "absent.gz")
