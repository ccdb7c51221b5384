"""What each benchmark asks."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data.annotations import Annotation, Provenance, Region, Request
from pixelstory_jax.evaluation.benchmarks import BENCHMARKS, choose_forms, find_benchmark, open_benchmark

MASK = np.ones((4, 4), bool)


def asked(name, form, requests, regions=9, seed=0):
    found = tuple(Region(MASK, f"thing {k}", f"Thing {k}") for k in range(regions))
    own = Annotation((4, 4), "names", found, tuple(requests), Provenance("toy", "val", "a.jpg"))
    return list(BENCHMARKS[name].ask[form](own, np.random.default_rng(seed)))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_every_expression_of_every_object(form):
    questions = asked("refcoco", form, [Request((" Left Dog ", "dog"), (1,)), Request(("cat",), (0,))])
    assert [one.text for one in questions] == [
        f"What is {words} in this image? Please output segmentation mask." for words in ("left dog", "dog", "cat")
    ]
    assert [one.masks for one in questions] == [((1,),), ((1,),), ((0,),)]
    assert {one.answer for one in questions} == {(0, ".")}


def test_expressions_for_several_things_or_nothing():
    questions = asked("grefcoco", "paper", [Request(("both",), (1, 2)), Request(("dog",)), Request(("cat",), (0,))])
    assert [one.masks for one in questions] == [((1, 2),), ((),), ((0,),)]
    assert [one.groups for one in questions] == [("several targets",), ("no target",), ("one target",)]


def test_several_expressions_in_one_question():
    joined = Request(("a, b and c",), (7, 2, 7), answer=(7, ", ", 2, " and ", 7, "."))
    for form in ("paper", "released"):
        (one,) = asked("multi_refcoco", form, [joined])
        assert one.text == "What is a, b and c in this image? Please output segmentation mask."
        assert one.masks == ((7,), (2,), (7,)) and one.answer == (0, ", ", 1, " and ", 2, ".")
        assert one.groups == ("3 targets",)


def test_sentences_and_phrases():
    requests = [Request(("What barks?",), (0, 1), is_sentence=True), Request(("the dog",), (0,))]
    sentence, phrase = asked("reason_seg", "paper", requests)
    assert sentence.text == "What barks? Please output segmentation mask." and sentence.groups == ("long query",)
    assert phrase.text == "What is the dog in this image? Please output segmentation mask."
    assert sentence.masks == ((0, 1),) and phrase.groups == ("short query",)
    assert asked("reason_seg", "released", requests) == [sentence]


def test_questions_of_muse():
    given = Request(("Why?",), (2, 0), True, ("Because ", 2, " and ", 0, "."))
    bare = Request(("Who?",), (4, 3, 2, 1), True)
    first, second = asked("muse", "paper", [given, bare])
    assert first.text == "Why? Please output segmentation mask." and first.masks == ((2,), (0,))
    assert first.answer == ("Because ", 0, " and ", 1, ".") and first.groups == ("few targets", "2 targets")
    assert second.answer[:2] == ("Thing 4 ", 0) and second.groups == ("many targets", "4 targets")
    wordings = {asked("muse", "released", [bare], seed=seed)[0].text for seed in range(60)}
    assert len(wordings) == 7 and all(text.startswith("Who? ") for text in wordings)


def test_forms():
    assert choose_forms("refcoco", "both") == ("paper", "released") and choose_forms("vqa", "both") == ("paper",)
    assert choose_forms("muse", "released") == ("released",)
    with pytest.raises(ValueError, match="vqa has no form 'released'; it has paper"):
        choose_forms("vqa", "released")


def test_names_and_splits(tmp_path):
    assert find_benchmark("refcocog|google").splits == ("val",) and BENCHMARKS["refcocog"].splits == ("val", "test")
    with pytest.raises(ValueError, match="did you mean reason_seg"):
        find_benchmark("reasonseg")
    with pytest.raises(ValueError, match="no split 'train'; it has val, test"):
        open_benchmark("reason_seg", tmp_path, "train")
    with pytest.raises(ValueError, match="There is no"):
        open_benchmark("reason_seg", tmp_path, "val")


def test_data_with_names_asks_for_each_name_and_a_mask_for_each_thing():
    one, several = asked("coco_instances", "paper", [Request(("cup",), (4,)), Request(("dog", "hound"), (0, 2, 1))])
    assert one.text == "What is cup in this image? Please output segmentation mask." and one.answer == (0, ".")
    assert several.masks == ((0,), (2,), (1,)) and several.answer == (0, " and ", 1, " and ", 2, ".")
    assert several.groups == ("3 targets",)
    own = find_benchmark("coco_instances:a.json:pictures")
    assert own.reader == "coco_instances:a.json:pictures" and own.splits == ("val", "test", "train")
