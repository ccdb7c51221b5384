import dataclasses

import numpy as np
import pytest

from pixelstory_jax.data.annotations import (
    Annotation,
    AnnotationError,
    Provenance,
    Region,
    Request,
    from_json,
    to_json,
)
from pixelstory_jax.data.asking import Asking, ask_about
from pixelstory_jax.data.masks import encode_rle

IMAGE = np.zeros((6, 8, 3), np.uint8)


def box_mask(left: int) -> np.ndarray:
    mask = np.zeros((6, 8), bool)
    mask[1:4, left : left + 2] = True
    return mask


def annotation(task: str, count: int = 4, **request) -> Annotation:
    regions = tuple(Region(box_mask(k), name=f"thing {k}", rephrased=f"The thing at {k}") for k in range(count))
    requests = tuple(Request((f"thing {k}",), (k,), **request) for k in range(count))
    return Annotation((6, 8), task, regions, requests, Provenance("toy", "train", "toy.jpg", "1"))


def drawn(annotation, times=200, **asking):
    rng = np.random.default_rng(0)
    return [ask_about(IMAGE, annotation, rng, Asking(**asking)) for _ in range(times)]


@pytest.mark.parametrize("wording", ["released", "varied"])
def test_names_are_dealt_over_questions_and_every_int_is_the_mask_of_its_name(wording):
    sizes = set()
    for example in drawn(annotation("names"), wording=wording):
        assert len(example.conversations) == 3
        asked = [turn for (turn,) in example.conversations]
        assert sorted(target for turn in asked for target in turn.targets) == list(range(4))
        sizes.update(len(turn.targets) for turn in asked)
        for turn in asked:
            for target in turn.targets:
                left = int(example.boxes[target][0])
                np.testing.assert_array_equal(example.masks[target], box_mask(left))
                assert f"thing {left}" in turn.text
            if wording == "varied":
                words = [f"thing {int(example.boxes[target][0])} " for target in turn.targets]
                said = [piece for piece in turn.answer if isinstance(piece, str)]
                assert [any(word in piece for piece in said) for word in words] == [True] * len(words)
    assert sizes == {1, 2}


def test_a_name_of_several_things_counts_them_all():
    counts = (1, 2, 2, 5, 0, 1, 3)
    numbers = iter(range(sum(counts)))
    requests = [Request((f"name {k}",), tuple(next(numbers) for _ in range(count))) for k, count in enumerate(counts)]
    regions = tuple(Region(box_mask(k % 6), id=str(k)) for k in range(sum(counts)))
    several = Annotation((6, 8), "names", regions, tuple(requests), Provenance("toy", "train", "toy.jpg"))
    seen = set()
    for example in drawn(several):
        for (turn,) in example.conversations:
            asked = [k for k in range(len(counts)) if f"name {k}" in turn.text]
            assert len(turn.targets) == sum(counts[k] for k in asked)
            assert len(asked) == 1 or sum(max(1, counts[k]) for k in asked) <= 3
            seen.add(len(turn.targets))
    assert seen == {0, 1, 2, 3, 5}


def test_released_answers_have_the_released_forms():
    answers = {
        turn.answer for example in drawn(annotation("names", 2), 400, questions=1) for (turn,) in example.conversations
    }
    shapes = {"".join("#" if isinstance(piece, int) else piece for piece in answer) for answer in answers}
    assert "thing 0 is # and thing 1 is #." in shapes and "# and #." in shapes
    assert "the segmentation result of thing 1 and thing 0 are # and #, separately." in shapes
    assert "The segmentation result of thing 0 is # and The segmentation result of thing 1 is #." in shapes
    one = {turn.answer for example in drawn(annotation("names", 1)) for (turn,) in example.conversations}
    assert one == {
        ("It is ", 0, "."),
        ("Sure, ", 0, "."),
        ("Sure, it is ", 0, "."),
        ("Sure, the segmentation result is ", 0, "."),
        (0, "."),
    }


def test_what_is_not_there_has_no_mask():
    nothing = Annotation((6, 8), "questions", (), (Request(("the dog",)),), Provenance("toy", "train", "toy.jpg"))
    for wording in ("released", "varied"):
        (turn,) = drawn(nothing, 1, wording=wording)[0].conversations[0]
        assert turn.targets == () and turn.answer == ("There is no dog in this image.",)


@pytest.mark.parametrize("wording", ["released", "varied"])
def test_what_is_not_there_is_said_behind_what_is(wording):
    """gRefCOCO: several things for one expression, and none for another."""
    regions = tuple(Region(box_mask(k), name=f"thing {k}") for k in range(2))
    requests = (Request(("both things",), (1, 0)), Request(("the dog",)))
    mixed = Annotation((6, 8), "names", regions, requests, Provenance("toy", "train", "toy.jpg"))
    for example in drawn(mixed, 50, wording=wording, questions=1):
        (turn,) = example.conversations[0]
        assert len(turn.targets) == 2 and turn.answer[-1].endswith(" There is no dog in this image.")
        assert "dog" not in "".join(piece for piece in turn.answer[:-1] if isinstance(piece, str))


def test_reasoning_with_an_explanation_is_answered_in_three_ways():
    kinds = {"mask": 0, "both": 0, "words": 0}
    source = annotation("reasoning", 1, is_sentence=True, explanation="Because.")
    for example in drawn(source, 1000):
        (turn,) = example.conversations[0]
        explained = turn.answer[-1].endswith("Because.")
        kinds["words" if not turn.targets else "both" if explained else "mask"] += 1
        assert ("explain" in turn.text or "explanation" in turn.text) == (explained and bool(turn.targets))
        assert len(example.masks) == len(turn.targets)
    assert 60 < kinds["words"] < 140 and abs(kinds["mask"] - kinds["both"]) < 100


def test_answers_of_the_data_set_are_kept():
    given = annotation("questions", 2, is_sentence=True)
    request = Request(("What stands here?",), (1, 0), True, ("The second ", 1, " and the first ", 0, "."))
    (turn,) = drawn(Annotation(given.size, "questions", given.regions, (request,), given.provenance), 1)[
        0
    ].conversations[0]
    assert turn.answer == ("The second ", 0, " and the first ", 1, ".") and turn.targets == (0, 1)


def test_a_dialogue_is_one_conversation_as_it_stands():
    turns = (Request(("What is {this}?",), answer=("A cup.",)), Request(("Whose?",), answer=("Mine.",)))
    talk = Annotation((6, 8), "dialogue", (), turns, Provenance("toy", "train", "toy.jpg"))
    (conversation,) = drawn(talk, 1, questions=1)[0].conversations
    assert [(turn.text, turn.answer) for turn in conversation] == [
        ("What is {this}?", ("A cup.",)),
        ("Whose?", ("Mine.",)),
    ]


def test_annotations_survive_json():
    for task in ("names", "questions", "reasoning"):
        before = annotation(task, 3, explanation="x", id=str(2**40))
        after = from_json(to_json(before))
        assert after.requests == before.requests and after.provenance == before.provenance and after.size == before.size
        for number in range(3):
            np.testing.assert_array_equal(after.mask(number), before.mask(number))
    runs = encode_rle(box_mask(2)), encode_rle(box_mask(5), compressed=False)
    parts = [runs[1], {**runs[0], "counts": runs[0]["counts"].encode()}]  # bytes, as pycocotools has them
    whole = dataclasses.replace(before, regions=(Region(parts),), ignored=[[1, 1, 4, 1, 4, 4]])
    np.testing.assert_array_equal(from_json(to_json(whole)).mask(0), box_mask(2) | box_mask(5))
    np.testing.assert_array_equal(from_json(to_json(whole)).ignored_mask(), whole.ignored_mask())
    with pytest.raises(AnnotationError, match="not a packed annotation"):
        from_json('{"size": [1]}')


def test_a_mask_or_picture_of_another_size_is_named():
    wrong = Annotation(
        (6, 8),
        "names",
        (Region(np.ones((5, 8), bool), "x", id="77"),),
        (Request(("x",), (0,)),),
        Provenance("toy", "train", "a.jpg"),
    )
    with pytest.raises(AnnotationError, match="toy, a.jpg, mask 77 is 5 x 8 pixels, its picture 6 x 8"):
        drawn(wrong, 1)
    with pytest.raises(AnnotationError, match="a.jpg is 7 x 8 pixels"):
        ask_about(np.zeros((7, 8, 3), np.uint8), wrong, np.random.default_rng(0), Asking())
