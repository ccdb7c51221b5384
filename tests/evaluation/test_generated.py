"""The evaluation of the PixelLM objective, with an answerer that knows the truth in place of a model."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from configs.pixellm import get_config
from pixelstory_jax.data.builtin import KINDS, builtin_library
from pixelstory_jax.data.builtin.photos import AskedPhotos
from pixelstory_jax.data.builtin.scenes import compose
from pixelstory_jax.data.masks import mask_box
from pixelstory_jax.evaluation import generated
from pixelstory_jax.evaluation.generated import AnswerEvaluator
from pixelstory_jax.inference.answers import Answer, Target, phrases, readable

NEVER_TRAINED = tuple(thing for thing in builtin_library().things if thing.split == "unseen")


@pytest.fixture
def evaluator(monkeypatch) -> AnswerEvaluator:
    config = get_config("tiny")
    config.eval.update({"splits": ("test", "unseen"), "examples": 3, "quick_examples": 2, "batch_size": 4})
    config.model.vision.canvas = 64
    evaluator = AnswerEvaluator(config, model=None, tokenizer=None)  # type: ignore[arg-type]

    class Oracle:
        def __init__(self, *_, **__):
            examples = evaluator.quick_examples + evaluator.reported_examples
            self.known = {(e.image.tobytes(), q.text): (e, q) for e in examples for q in e.conversation}

        def ask_many(self, images, conversations):
            return [self.answer(image, turns[-1].question) for image, turns in zip(images, conversations, strict=True)]

        def answer(self, image, text):
            example, question = self.known[image.tobytes(), text]
            numbers = iter(range(99))
            pieces = tuple(next(numbers) if isinstance(piece, int) else piece for piece in question.answer)
            masks = [example.masks[k] for k in question.targets]
            named = zip(phrases(pieces), masks, strict=True)
            return Answer(readable(pieces), tuple(Target(n, m, 1.0, mask_box(m)) for n, m in named), pieces)

    monkeypatch.setattr(generated, "Segmenter", Oracle)
    return evaluator


def test_the_truth_scores_one(evaluator):
    quick, whole = evaluator({}, 0), evaluator({}, 10**6)
    assert quick.score == whole.score == 1.0
    kinds = {record["kind"] for record in whole.records}
    assert kinds == {
        "one",
        "several",
        "category",
        "attribute",
        "relation",
        "count",
        "absent",
        "absent_group",
        "follow_up",
    }
    assert {record["split"] for record in quick.records} == {"new_scenes"}
    assert {record["split"] for record in whole.records} == {"new_scenes", "new_names"}
    assert whole.metrics["new_names/all/giou"] == whole.metrics["new_scenes/all/names"] == 1.0
    assert whole.metrics["new_scenes/one/giou_united"] < 0.9
    assert set(whole.images) == {"new_scenes", "new_names"} and "New names" in whole.table
    for page in whole.images.values():
        assert page.dtype == np.uint8 and page.ndim == 3


def test_photos_are_asked_about_at_their_own_size(evaluator):
    evaluator.config.eval.splits = ("test", "photos")
    evaluator.photos = AskedPhotos([compose(5, 1, "test", size=200)])
    whole = evaluator({}, 10**6)
    assert whole.metrics["photos/all/giou"] == 1.0 and "Photos" in whole.table and "none found" not in whole.table
    evaluator.photos = None
    del evaluator.reported_examples
    assert "photos: none found" in evaluator({}, 10**6).table


def test_questions_are_always_the_same_and_never_asked_twice(evaluator):
    again = AnswerEvaluator(evaluator.config, model=None, tokenizer=None)  # type: ignore[arg-type]
    texts = [[q.text for e in ev.quick_examples for q in e.conversation] for ev in (evaluator, again)]
    assert texts[0] == texts[1]
    examples = evaluator.quick_examples + evaluator.reported_examples
    asked = {(e.image.tobytes(), e.conversation[-1].text, e.conversation[-1].kind) for e in examples}
    assert len(asked) == len(examples) == len(KINDS) * (2 + 3 * 2)


def test_every_question_about_new_names_is_about_one(evaluator):
    evaluator.config.eval.examples = 12
    evaluator.config.eval.splits = ("unseen",)
    pictures = {}
    for index in range(generated._SCENES_PER_QUESTION * 12):
        scene = compose(evaluator.config.eval.seed, index, "unseen", size=64)
        pictures.setdefault(scene.image.tobytes(), scene)
    names = {name for thing in NEVER_TRAINED for name in (thing.name, thing.plural)}
    asked = collections.Counter()
    for example in evaluator.reported_examples:
        scene = pictures[example.image.tobytes()]
        asked[example.conversation[-1].kind] += 1
        for turn in example.conversation:
            if turn.kind == "absent_group":
                assert turn.targets == ()
            elif turn.kind == "absent":
                assert turn.targets == ()
                denied = re.search(r"no ([\w -]+?) (?:in this picture|here)\.", turn.plain_answer)
                assert denied and denied[1] in names, turn.plain_answer
            else:
                assert any(scene.things[target].split == "unseen" for target in turn.targets), turn.text
    assert asked == dict.fromkeys(KINDS, 12)


def test_the_best_is_chosen_by_other_scenes_than_the_reported_ones(evaluator):
    chosen_by, reported = evaluator.quick_examples, evaluator.reported_examples
    assert not {e.image.tobytes() for e in chosen_by} & {e.image.tobytes() for e in reported}
    kinds = [e.conversation[-1].kind for e in reported if e.split == "new_scenes"]
    assert all(kinds.count(kind) == evaluator.config.eval.examples for kind in kinds)
    assert len(evaluator({}, 10**6).records) == sum(len(e.conversation) for e in reported)


def test_unknown_split_is_refused(evaluator):
    evaluator.config.eval.splits = ("test", "tset")
    with pytest.raises(ValueError, match="'tset'"):
        AnswerEvaluator(evaluator.config, model=None, tokenizer=None)  # type: ignore[arg-type]
