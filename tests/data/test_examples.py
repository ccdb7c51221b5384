"""Examples as the objectives read them, and what the training text may say."""

from __future__ import annotations

import re

import numpy as np
import pytest

from configs.pixellm import get_config
from configs.pretrain_tiny import get_config as get_pretraining_config
from pixelstory_jax.data.builtin import AskedScenes, Thing, ThingLibrary, builtin_library
from pixelstory_jax.data.conversations import IGNORE
from pixelstory_jax.data.examples import GRID, PretrainingExamples, caption, turns_of, whereabouts
from pixelstory_jax.data.sources import build_scenes, build_source, class_numbers
from pixelstory_jax.data.tokenizers import IMAGE_TOKEN, find_groups

SCENES = 300


@pytest.fixture(scope="module")
def segmentation():
    return build_source(get_config(), "train")


@pytest.fixture(scope="module")
def pretraining():
    return build_source(get_pretraining_config(), "train")


@pytest.mark.parametrize("source", ["segmentation", "pretraining"])
def test_examples_have_static_shapes_and_are_reproducible(source, request):
    examples = request.getfixturevalue(source)
    shapes = {key: (value.shape, value.dtype) for key, value in examples[0].items()}
    for index in (1, 2, 7):
        example = examples[index]
        assert {key: (value.shape, value.dtype) for key, value in example.items()} == shapes
        again = examples[index]
        assert all(np.array_equal(example[key], again[key]) for key in example)
    assert not np.array_equal(examples[1]["image"], examples[2]["image"])


def test_targets_point_at_their_groups_and_masks(segmentation):
    codebook = segmentation.tokenizer.codebook_ids
    second_turns = 0
    for index in range(40):
        example = segmentation[index]
        scene, conversations = segmentation.scenes[index]
        flat = example["tokens"].reshape(-1)
        valid = example["target_valid"]
        assert valid.any() and not example["target_masks"][~valid].any()
        assert len(find_groups(flat, codebook)) == valid.sum()  # no group without its target
        wanted = [target for c in conversations for q in c for target in q.targets]
        assert valid.sum() <= len(wanted)
        if valid.sum() == len(wanted):
            areas = [int(scene.masks[target].sum()) for target in wanted]
            assert example["target_masks"][valid].sum((1, 2)).tolist() == areas
        for slot in np.flatnonzero(valid):
            positions = example["target_positions"][slot]
            assert tuple(flat[positions]) == codebook
        # Answers are numbered through, also those of one row.
        ends = (example["tokens"] == segmentation.tokenizer.eos_id).reshape(-1)
        answers = [int(ends[: positions[0]].sum()) for positions in example["target_positions"][valid]]
        assert example["target_question"][valid].tolist() == answers
        rows = example["target_positions"][valid, 0] // example["tokens"].shape[1]
        second_turns += len(set(answers)) > len(set(rows.tolist()))
        assert ((example["tokens"] == IMAGE_TOKEN).sum(1)[example["token_valid"].any(1)] == 36).all()
    assert second_turns > 2


def test_little_is_left_out(segmentation):
    """The layout of the tiny config holds nearly every conversation that is drawn."""
    kept = drawn = 0
    for index in range(60):
        kept += int(segmentation[index]["token_valid"].any(1).sum())
        drawn += len(segmentation.scenes[index][1])
    assert kept >= 0.95 * drawn


def test_pretraining_holds_no_masks_and_no_codebook(pretraining):
    tokenizer = pretraining.tokenizer
    for index in range(8):
        example = pretraining[index]
        scene, _ = pretraining.scenes[index]
        assert not np.isin(example["tokens"], tokenizer.codebook_ids).any()
        assert (example["labels"] != IGNORE).any(1)[example["token_valid"].any(1)].all()
        numbers = class_numbers(pretraining.scenes.library)
        for k, thing in enumerate(scene.things, start=1):
            assert example["object_classes"][k] == numbers[thing.name]
            assert (example["objects"] == k).sum() == scene.masks[k - 1].sum()
        assert not example["object_classes"][len(scene.things) + 1 :].any()
        assert example["object_boxes"].min() >= 0 and example["object_boxes"].max() <= 1


def test_rows_of_the_language_stage(pretraining):
    """Everything fits its layout, and the rows after the second ask which of four names are there."""
    source = build_source(get_pretraining_config("language"), "train")
    assert source.presence == 4
    kept = np.mean([source[index]["token_valid"].any(1) for index in range(40)], axis=0)
    assert kept.min() >= 0.9
    scene, conversations = source.scenes[0]
    rows = source.rows(scene, conversations, np.random.default_rng(0))
    assert len(rows) == source.layout.questions and [len(row) for row in rows[2:]] == [4, 4]
    assert len(rows[1]) > len(conversations)
    scene, conversations = pretraining.scenes[0]
    assert [len(row) for row in pretraining.rows(scene, conversations, np.random.default_rng(0))][:2] == [1, 1]


class OneScene:
    """A source that shows the same picture and questions under every seed and split."""

    def __init__(self, shown: AskedScenes, seed: int, split: str):
        self.seed, self.split, self.absent_from, self.shown = seed, split, shown.absent_from, shown[0]

    def __getitem__(self, index: int):
        return self.shown


def test_wording_depends_on_seed_split_and_index(pretraining):
    numbers = class_numbers(pretraining.scenes.library)

    def tokens(seed: int, split: str) -> list[bytes]:
        scenes = OneScene(pretraining.scenes, seed, split)
        examples = PretrainingExamples(scenes, pretraining.tokenizer, pretraining.layout, numbers)
        return [examples[index]["tokens"].tobytes() for index in range(8)]

    first = tokens(0, "train")
    assert first == tokens(0, "train") and len(set(first)) > 1
    assert len({tuple(first), tuple(tokens(1, "train")), tuple(tokens(0, "test"))}) == 3


def test_no_row_is_empty_where_a_library_has_nothing_left_to_ask(pretraining):
    library = ThingLibrary([Thing(name="box", plural="boxes")], [np.full((40, 60, 4), 255, np.uint8)])
    scenes = AskedScenes(seed=0, split="train", size=pretraining.scenes.size, library=library)
    examples = PretrainingExamples(scenes, pretraining.tokenizer, pretraining.layout, {"box": 1}, presence=1)
    rows = []
    for index in range(10):
        example = examples[index]
        used = example["token_valid"].any(1)
        assert (example["labels"] != IGNORE).any(1)[used].all()
        rows.append(int(used.sum()))
    assert min(rows) < pretraining.layout.questions


def test_boxes_in_words(pretraining):
    for index in range(20):
        scene, _ = pretraining.scenes[index]
        (turn,) = whereabouts(scene, np.random.default_rng(index))
        boxes = re.findall(r"([a-z -]+?) (\d+) (\d+) (\d+) (\d+)", turn.answer[0])
        for name, *corners in boxes:
            left, top, right, bottom = map(int, corners)
            assert name.strip() in scene.names
            assert 0 <= left <= right < GRID and 0 <= top <= bottom < GRID
        assert boxes or turn.answer == caption(scene, np.random.default_rng(index))[0].answer


@pytest.mark.parametrize("get", [get_config, get_pretraining_config], ids=["segmentation", "pretraining"])
def test_never_trained_names_occur_in_no_training_text(get):
    library = builtin_library()
    unseen = {thing for thing in library.things if thing.split == "unseen"}
    assert len(unseen) >= 30 and len(library.pool("train")) >= 120
    names = {name for thing in unseen for name in (thing.name, thing.plural)}
    # "fire engine" may hold a name that is trained on its own, so whole names are looked for.
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")
    trained = {name for thing in library.things if thing not in unseen for name in (thing.name, thing.plural)}
    inside_trained = {name for name in names for other in trained if re.search(rf"\b{re.escape(name)}\b", other)}
    scenes = build_scenes(get(), "train", seed=3)
    for index in range(SCENES):
        scene, conversations = scenes[index]
        assert not unseen & set(scene.things)
        rng = np.random.default_rng(index)
        turns = [t for c in conversations for with_masks in (True, False) for t in turns_of(c, with_masks)]
        for turn in [*turns, *caption(scene, rng), *whereabouts(scene, rng)]:
            text = " ".join([turn.question, *(part for part in turn.answer or () if isinstance(part, str))])
            found = set(pattern.findall(text.lower())) - inside_trained
            assert not found, f"scene {index}: {text}"
