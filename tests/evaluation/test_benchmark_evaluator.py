"""Benchmarks as what chooses the best checkpoint, on miniatures and a model that says one answer."""

from __future__ import annotations

import numpy as np
import pytest

from configs.pixellm import get_config
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.evaluation.generated import AnswerEvaluator
from tests.data.readers.all_miniatures import MAKERS
from tests.evaluation.talking_model import talking_params
from tests.inference.test_segmenter import smallest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("refcoco", "muse"):
        MAKERS[name](root)
    config = get_config("tiny,data=mixture")
    config.data.folder = str(root)
    config.eval.update({"examples": 1, "quick_examples": 1, "batch_size": 4, "max_new_tokens": 12, "sheet": 2})
    return config


@pytest.mark.parametrize("variant", ["7b", "13b", "tiny,data=mixture"])
def test_training_on_the_papers_data_is_scored_on_its_benchmarks(variant):
    assert get_config(variant).eval.splits == ("refcoco|val", "muse|val")
    assert get_config("tiny").eval.splits == ("test", "unseen", "photos")


def test_the_score_comes_from_other_pictures_than_the_table(config):
    tokenizer = small_tokenizer(6)
    model = smallest(tokenizer.vocab_size)
    evaluator = AnswerEvaluator(config, model, tokenizer)
    params = talking_params(model, tokenizer)
    quick, whole = evaluator(params, 0), evaluator(params, config.train.steps)
    assert quick.score == whole.score > 0
    names = ("refcoco_val", "muse_val")
    assert quick.score == pytest.approx(np.mean([quick.metrics[f"{name}/paper/all/giou"] for name in names]))
    assert {name.split("/")[1] for name in quick.metrics} == {"paper"}
    assert {name.split("/")[1] for name in whole.metrics} == {"paper", "released"}
    asked = {name: [(r["picture"], r["index"]) for r in one.records] for name, one in (("q", quick), ("w", whole))}
    assert [index for _, index in asked["q"]] == [0, 0]  # of refcoco and of muse
    assert [index for _, index in asked["w"]] == [0, 0, 1, 1]  # refcoco has no other, muse has; both forms
    assert "refcoco val, form paper" in whole.table and "muse val, form released" in whole.table
    assert set(whole.images) == {f"{name}_{which}" for name in names for which in ("best", "worst")}


def test_embedded_pictures_are_asked_about_beside_benchmarks(config):
    other = config.copy_and_resolve_references()
    other.eval.splits = ("test", "muse|val")
    tokenizer = small_tokenizer(6)
    evaluator = AnswerEvaluator(other, smallest(tokenizer.vocab_size), tokenizer)
    assert {example.split for example in evaluator.quick_examples} == {"new_scenes"} and evaluator.benchmarks.readers


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("refcoc|val", "Unknown benchmark 'refcoc'; did you mean refcoco?"),
        ("muse|few", "muse has no split 'few'"),
        ("grefcoco|val", r"config.eval.splits has 'grefcoco\|val'. There is no .*refer_seg"),
        ("valid", "Unknown eval.splits 'valid'; known are test, unseen, photos, benchmarks as"),
    ],
)
def test_splits_that_cannot_be_asked(config, split, message):
    other = config.copy_and_resolve_references()
    other.eval.splits = (split,)
    with pytest.raises(ValueError, match=message):
        AnswerEvaluator(other, model=None, tokenizer=None)  # type: ignore[arg-type]
