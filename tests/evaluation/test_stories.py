"""Scores of generated stories, from a network of random weights and a classifier whose readings are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.builtin.places import PLACES
from pixelstory_jax.data.builtin.story_wording import plain_caption
from pixelstory_jax.evaluation import stories as module
from pixelstory_jax.evaluation.panel_metrics import character_diversity, frechet_distance, same_character_share
from pixelstory_jax.evaluation.stories import StoryEvaluator, StorySheet, story_sheet, story_tasks
from pixelstory_jax.inference.painter import PaintOptions
from pixelstory_jax.inference.sharing import SharingPlan
from tests.story_sizes import SIDE, STEPS, story_painter, story_params

CAST = builtin_cast()
POSES = CAST.pose_words
OPTIONS = PaintOptions(steps=STEPS, guidance=2.0, height=SIDE, width=SIDE)
PLAN = SharingPlan("joint", window=0, rate=0.5)
FINAL = 4  # the step after which the evaluation is complete


class BrightnessClassifier:
    """Reads character, pose and place off the mean of each colour."""

    classes = {"character": CAST.names, "pose": POSES, "place": PLACES}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert images.dtype == np.uint8 and images.shape[1:] == (SIDE, SIDE, 3)
        means = images.mean((1, 2))
        heads = {
            head: (means[:, colour] * 7).astype(np.int32) % len(words)
            for colour, (head, words) in enumerate(self.classes.items())
        }
        return {**heads, "features": means.astype(np.float32)}


@pytest.fixture(scope="module")
def evaluator():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REAL_PANELS", 20)
        yield StoryEvaluator(
            story_painter(), OPTIONS, PLAN, CAST, BrightnessClassifier(), FINAL,
            panels=3, stories=5, quick_stories=3, sweep_stories=2, rates=(1.0,), batch=2, shown=2, seed=11,
        )  # fmt: skip


@pytest.fixture(scope="module")
def complete(evaluator):
    return evaluator(story_params(), FINAL)


def tasks(count: int, panels: int = 3, seed: int = 11):
    return story_tasks(CAST, count, panels, seed, POSES, PLACES)


def test_tasks_are_a_function_of_seed_and_number():
    assert tasks(5) == tasks(5) and tasks(2) == tasks(5)[:2]
    assert len({task.prompts for seed in (11, 12) for task in tasks(20, seed=seed)}) == 40


def test_tasks_name_pose_and_place_but_nobody():
    """Different ones within a story, as long as there are any left; the classes are those of the prompts."""
    for task in tasks(20, panels=5):
        assert len(set(task.poses)) == len(set(task.places)) == 5
        for prompt, pose, place in zip(task.prompts, task.poses, task.places, strict=True):
            assert prompt == plain_caption(None, POSES[pose], PLACES[place])
            assert not any(name in prompt for name in CAST.names)
    (longest,) = tasks(1, panels=13)
    counts = np.bincount(longest.poses, minlength=len(POSES))
    assert counts.max() - counts.min() <= 1 and len(set(longest.places[:12])) == 12


def test_only_poses_that_everybody_has():
    classes = ("flying", *POSES)
    chosen = {pose for task in story_tasks(CAST, 30, 3, 0, classes, PLACES) for pose in task.poses}
    assert chosen == {classes.index(pose) for pose in POSES}


def close(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal but for the rounding of grey levels."""
    return np.abs(first.astype(int) - second).max() <= 1


@pytest.mark.slow
def test_the_noise_is_the_same_with_sharing_off_and_on(evaluator):
    """Where nothing is shown, they are the same pictures; else other ones."""
    off = evaluator.paint(tasks(3), None)
    assert off.shape == (3, 3, SIDE, SIDE, 3) and off.dtype == np.uint8
    assert close(evaluator.paint(tasks(3), SharingPlan("joint", window=0, rate=0.0)), off)
    on = evaluator.paint(tasks(3), PLAN)
    assert (np.abs(on.astype(int) - off).max((2, 3, 4)) > 20).all()


def test_the_noise_of_a_story_depends_on_its_number(evaluator):
    """Neither on the batch that it is in nor on what fills the batch up."""
    everything = evaluator.paint(tasks(3), None)
    np.testing.assert_array_equal(evaluator.paint(tasks(2), None), everything[:2])
    np.testing.assert_array_equal(evaluator.paint(tasks(1), None), everything[:1])
    alike = evaluator.paint(tasks(1) * 3, None).astype(int)  # the same prompts, other noise
    assert all(np.abs(alike[a] - alike[b]).max() > 20 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_complete_evaluation(evaluator, complete):
    """All stories with sharing off and on, some with other rates; each number from what the classifier reads."""
    names = {"off": 5, "on_0.5": 5, "on_1.0": 2}
    keys = ("same_character", "same_character_error", "pose", "place", "diversity", "frechet", "stories")
    assert complete.metrics.keys() == {f"{name}/{key}" for name in names for key in keys}
    assert {name: complete.metrics[f"{name}/stories"] for name in names} == names
    read = BrightnessClassifier()
    real = module.labelled_panels(CAST, 20, 11, "test", SIDE)[0]
    for name, plan in (("off", None), ("on_0.5", PLAN)):
        pictures = evaluator.paint(tasks(5), plan)
        reading = read(pictures.reshape(-1, SIDE, SIDE, 3))
        character = reading["character"].reshape(5, 3)
        expected = {
            "same_character": same_character_share(character),
            "pose": (reading["pose"].reshape(5, 3) == [task.poses for task in tasks(5)]).mean(),
            "place": (reading["place"].reshape(5, 3) == [task.places for task in tasks(5)]).mean(),
            "diversity": character_diversity(character, 6),
            "frechet": frechet_distance(
                reading["features"][: 2 * 3], read(real)["features"]
            ),  # the sweep has 2 stories
        }
        for key, value in expected.items():
            np.testing.assert_allclose(complete.metrics[f"{name}/{key}"], value, rtol=1e-5, err_msg=key)
        assert [record[name] for record in complete.records] == [[CAST.names[n] for n in row] for row in character]
    on = [complete.metrics[f"on_0.5/{key}"] for key in ("same_character", "pose", "place")]
    np.testing.assert_allclose(complete.score, 1 + np.mean(on))  # above every evaluation on few stories


def test_what_is_written(complete):
    lines = complete.table.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "sharing off",
        "sharing on, rate 0.5",
        "sharing on, rate 1.0",
        "real panels",
    ]
    for line, name in zip(lines[1:3], ("off", "on_0.5"), strict=True):
        metrics = {key.split("/")[1]: value for key, value in complete.metrics.items() if key.startswith(name)}
        assert f"{metrics['same_character']:.3f} ± {metrics['same_character_error']:.3f}" in line
        assert line.split()[-1] == "5" and f"{metrics['frechet']:.2f}" in line
    images, character, pose, place = module.labelled_panels(CAST, 20, 12, "test", SIDE)
    read = BrightnessClassifier()(images)
    scores = [(read["pose"] == pose).mean(), (read["place"] == place).mean()]
    others = BrightnessClassifier()(module.labelled_panels(CAST, 20, 11, "test", SIDE)[0])
    scores.append(frechet_distance(read["features"][: 2 * 3], others["features"]))
    assert lines[4].split()[2:] == [f"{scores[0]:.3f}", f"{scores[1]:.3f}", f"{scores[2]:.2f}"]
    assert f"names the character of {(read['character'] == character).mean():.1%} of real panels" in lines[5]
    assert len({len(line) for line in lines[:4]}) == 1  # the columns stand below each other
    assert [record["prompts"] for record in complete.records] == [list(task.prompts) for task in tasks(5)]
    assert "on_1.0" in complete.records[1] and "on_1.0" not in complete.records[2]
    json.dumps([complete.records, complete.metrics])
    sheet = complete.images["stories"]
    assert sheet.dtype == np.uint8 and sheet.ndim == 3 and len(complete.images) == 1


def test_evaluations_during_training_are_short(evaluator, complete):
    """Fewer stories and no other rates; the stories are the first of the complete evaluation."""
    quick = evaluator(story_params(), FINAL - 1)
    assert {key.split("/")[0] for key in quick.metrics} == {"off", "on_0.5"}
    assert quick.metrics["off/stories"] == 3
    first = [{name: record[name] for name in ("prompts", "off", "on_0.5")} for record in complete.records[:3]]
    assert quick.records == first


def test_new_weights_are_painted_with(evaluator, complete):
    other = {**story_params(), "unet": {**story_params()["unet"]}}
    other["unet"]["conv_out"] = {name: -value for name, value in other["unet"]["conv_out"].items()}
    assert evaluator(other, FINAL - 1).metrics["off/frechet"] != evaluator(story_params(), 1).metrics["off/frechet"]


def test_the_sheet_shows_every_panel():
    """One row for each story: its panels in every way of painting from left to right."""
    rng = np.random.default_rng(0)
    colours = rng.integers(30, 226, (2, 2, 3, 3))  # ways, stories, panels, colour
    pictures = {
        f"way {way}": np.broadcast_to(colours[way][:, :, None, None].astype(np.uint8), (2, 3, 48, 48, 3))
        for way in range(2)
    }
    sheet = story_sheet(tasks(2), pictures, "Step 3")
    found = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    places = {}
    for index in np.ndindex(2, 2, 3):
        colour = tuple(colours[index].tolist())
        assert colour in found
        rows, columns = np.nonzero((sheet == colour).all(-1))
        assert len(rows) >= 144 * 144
        places[index] = (int(np.median(rows)), int(np.median(columns)))
    assert sorted(places, key=lambda index: (places[index][0], places[index][1])) == [
        (way, story, panel) for story in range(2) for way in range(2) for panel in range(3)
    ]


def test_a_sheet_where_no_classifier_knows_the_pictures():
    """One story with sharing off and on; the newest weights have the best score."""
    prompts = ("a dog on a beach", "a dog at home")
    show = StorySheet(story_painter(), OPTIONS, PLAN, prompts, seed=3)
    evaluation = show(story_params(), 7)
    assert evaluation.metrics == {} and evaluation.score == 7 and "look at the sheet" in evaluation.table
    (off, on) = (module.paint_stories(show.painter, OPTIONS, plan, [prompts], [(3,)], 3) for plan in (None, PLAN))
    expected = story_sheet(
        [module.StoryTask(prompts, (), ())], {"sharing off": off, "sharing on, rate 0.5": on}, "Step 7"
    )
    np.testing.assert_array_equal(evaluation.images["stories"], expected)
    assert np.abs(off.astype(int) - on).max() > 20
