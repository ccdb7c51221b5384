"""Cutting generated ids into phrases and targets."""

from __future__ import annotations

import pytest

from pixelstory_jax.data.tokenizers import Tokenizer
from pixelstory_jax.inference.answers import phrase_spans, phrases, pieces_of, readable, rejects

WORDS = ["<unk>", "<s>", "</s>", "The", "apple", "is", "and", "car", "."]


def word_tokenizer() -> Tokenizer:
    added = {"[SEG0]": 9, "[SEG1]": 10, "<im_start>": 11, "<im_end>": 12}
    return Tokenizer(
        lambda text: [WORDS.index(word) if word in WORDS else 0 for word in text.split()],
        lambda ids: " ".join(WORDS[i] for i in ids),
        len(WORDS),
        added,
        ("[SEG0]", "[SEG1]"),
    )


def test_complete_groups_become_targets():
    tokenizer = word_tokenizer()
    ids = [3, 4, 5, 9, 10, 6, 7, 5, 9, 10, 8, 2, 4, 9, 10]
    pieces, starts = pieces_of(ids, tokenizer)
    assert pieces == ("The apple is", 0, "and car is", 1, ".") and starts == [3, 8]
    assert readable(pieces) == "The apple is [1] and car is [2]."


def test_incomplete_groups_are_left_out_and_the_others_kept():
    tokenizer = word_tokenizer()
    pieces, starts = pieces_of([9, 3, 4, 9, 10, 6, 7, 10, 9, 10, 5, 9], tokenizer)
    assert pieces == ("The apple", 0, "and car", 1, "is") and starts == [3, 8]
    assert pieces_of([9, 10], tokenizer) == ((0,), [0])
    assert pieces_of([2, 3], tokenizer) == ((), [])


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("The apple is ", 2, " and the red car is ", 0, "."), ["apple", "red car"]),
        (("Sure, it is the violin ", 0, "."), ["violin"]),
        (("Sure, ", 0, "."), [""]),
        (("It is ", 0, "."), [""]),
        (("You could eat the green apple ", 0, ", the slice of cake ", 1, " and a pear ", 2, "."),
         ["green apple", "slice of cake", "pear"]),
        (("There are two: an apple ", 0, " and an apple ", 1, "."), ["apple", "apple"]),
        (("The segmentation result of The cat is ", 0, "."), ["cat"]),
        (("Sure, the cup, dog and old tree are ", 0, ", ", 1, " and ", 2, ", separately."), ["cup", "dog", "old tree"]),
        (("Here is the isle ", 0), ["isle"]),
        (("No apple here.",), []),
        ((), []),
    ],
)  # fmt: skip
def test_phrases(pieces, expected):
    assert phrases(pieces) == expected


def test_spans_join_to_the_line_and_colour_the_phrase():
    for pieces in (
        ("The apple is ", 2, " and the red car is ", 0, "."),
        ("Sure, ", 0, "."),
        ("Sure, cup and dog are ", 0, " and ", 1, "."),
        ("Nothing.",),
    ):
        spans = phrase_spans(pieces)
        assert "".join(text for text, _ in spans) == readable(pieces)
    spans = phrase_spans(("The apple is ", 2, " and the red car is ", 0, "."))
    assert ("apple", 0) in spans and ("red car", 1) in spans and (" is ", None) in spans
    spans = phrase_spans(("Sure, cup and dog are ", 0, " and ", 1, "."))
    assert [text for text, number in spans if number == 0] == ["cup", "[1]"]
    assert phrases(("Sure, the segmentation result is ", 0, ".")) == [""]
    assert phrases(("I see football ", 0, " and ", "the cup ", 1, ".")) == ["football", "cup"]
    assert [text for text, number in spans if number == 1] == ["dog", "[2]"]


def test_rejections_need_words_and_no_mask():
    assert rejects(("There is no apple in the picture.",))
    assert rejects(("I don't see a car.",))
    assert not rejects(("The apple.",))
    assert not rejects(("There is no car, but the apple is ", 0, "."))
    assert not rejects(())
