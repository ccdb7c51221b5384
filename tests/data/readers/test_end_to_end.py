"""From the miniature of every data set to scores: read, ask, batch, two steps, evaluation."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from pixelstory_jax.data import build_source
from pixelstory_jax.data.pipeline import make_iterator
from pixelstory_jax.data.readers.reader import LayoutError
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.evaluation.benchmark_records import make_records
from pixelstory_jax.evaluation.benchmark_scores import score_records
from pixelstory_jax.evaluation.benchmarks import find_benchmark, open_benchmark
from pixelstory_jax.inference.segmenter import Segmenter
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives import build_objective
from tests.data.readers.all_miniatures import MAKERS
from tests.objectives.smallest import drawn_params, smallest_mixture, smallest_pixellm

TRAINED = [name for name in MAKERS if not name.startswith("multi_") and "|" not in name]
WITHOUT_MASKS = ("llava_instruct_150k",)


@pytest.fixture(scope="module")
def stepped():
    """(parameters, function of a batch that makes one step): compiled once for all data sets."""
    config = smallest_pixellm()
    config.data.update({"questions": 3, "slots": 12, "length": 160})
    objective = build_objective(config)
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(params, batch):
        (loss, terms), gradients = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, jax.random.key(0))
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        return optax.apply_updates(params, updates), loss, terms

    return objective, drawn_params(objective), step


@pytest.mark.parametrize("name", TRAINED)
def test_a_data_set_is_read_trained_on_and_evaluated(name, stepped, tmp_path):
    MAKERS[name](tmp_path)
    objective, params, step = stepped
    batches = make_iterator(build_source(smallest_mixture(tmp_path, name)), 2, 1, threads=0)
    losses, targets = [], 0
    for _ in range(2):
        batch = next(batches)
        assert batch["token_valid"].any((1, 2)).all()
        targets += int(batch["target_valid"].sum())
        before, (params, loss, terms) = params, step(params, batch)
        losses.append(float(loss))
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert (targets == 0) == (name in WITHOUT_MASKS) and (float(terms["bce"]) == 0) == (name in WITHOUT_MASKS)
    moved = {path for path, leaf in flatten(params).items() if not np.array_equal(leaf, flatten(before)[path])}
    assert any(path.startswith("llama") for path in moved)
    assert any(path.startswith("mask_decoder") for path in moved) == bool(targets)
    scores = evaluate(name, tmp_path, Segmenter(objective.config, params, small_tokenizer(), max_new_tokens=8))
    assert scores["questions"] > 0
    assert 0 <= scores["token_f1" if name in WITHOUT_MASKS else "giou"] <= 1


def evaluate(name, root, segmenter) -> dict[str, float]:
    """Scores of generated answers to the questions about all pictures of the first split that is evaluated."""
    name = {"llava_instruct_150k": "vqa"}.get(name, name)
    benchmark = find_benchmark(name)
    split = next(split for split in benchmark.splits if has_split(name, root, split))
    reader = open_benchmark(name, root, split)
    records = make_records(benchmark, "paper", reader, range(len(reader)), segmenter, batch_size=4)
    return score_records(name, split, records).scores["paper"]["all"]


def has_split(name, root, split) -> bool:
    try:
        return bool(open_benchmark(name, root, split))
    except LayoutError:
        return False


def test_pixels_that_are_ignored_do_not_count(stepped, tmp_path):
    MAKERS["ade20k"](tmp_path)
    _, params, step = stepped
    batch = next(make_iterator(build_source(smallest_mixture(tmp_path, "ade20k")), 2, 1, threads=0))
    masks = batch["target_masks"]
    assert (masks == 255).any() and (masks == 1).any() and (masks == 0).any()
    _, loss, terms = step(params, batch)
    _, _, as_background = step(params, {**batch, "target_masks": np.where(masks == 255, 0, masks)})
    _, _, other = step(params, {**batch, "target_masks": np.where(masks == 255, 7, masks)})
    assert float(terms["bce"]) == float(other["bce"]) != float(as_background["bce"])


def test_conversations_that_do_not_fit_are_named(tmp_path, caplog):
    MAKERS["muse"](tmp_path)
    config = smallest_mixture(tmp_path, "muse")
    config.data.slots = 1
    next(make_iterator(build_source(config), 8, 1, threads=0))
    assert "conversations do not fit data.length=160 or data.slots=1 and are left out" in caplog.text
