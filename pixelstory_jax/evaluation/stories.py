"""Does it keep the character? Stories with sharing off and on, from the same seeds, read by a classifier.

The prompts name pose and place but not the character, so that without sharing every panel chooses its own. What the
numbers mean: docs/story_metrics.md.

K stories, A panels of a story, C characters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from PIL import Image, ImageDraw

from pixelstory_jax.data.builtin.characters import Cast
from pixelstory_jax.data.builtin.places import PLACES
from pixelstory_jax.data.builtin.stories import labelled_panels
from pixelstory_jax.data.builtin.story_wording import plain_caption
from pixelstory_jax.evaluation.panel_classifier import PanelClassifier
from pixelstory_jax.evaluation.panel_metrics import (
    accuracy,
    bootstrap_error,
    character_diversity,
    frechet_distance,
    same_character_share,
)
from pixelstory_jax.inference.overlay import INK, MARGIN, PALE_INK, PAPER, font_of
from pixelstory_jax.inference.painter import Painter, PaintOptions
from pixelstory_jax.inference.sharing import Draws, SharingPlan, share_steps
from pixelstory_jax.models.consistent_attention import Sharing
from pixelstory_jax.objectives.objective import Evaluation, Params

REAL_PANELS = 1200  # of the held-out split, for the classifier's own accuracy and the Fréchet distance
OFF = "sharing off"


@dataclass(frozen=True)
class StoryTask:
    """Prompts of one story and what its panels should show (class numbers)."""

    prompts: tuple[str, ...]
    poses: tuple[int, ...]
    places: tuple[int, ...]


def story_tasks(
    cast: Cast, count: int, panels: int, seed: int, poses: Sequence[str], places: Sequence[str]
) -> list[StoryTask]:
    """Stories of nobody in particular ("a character walking on a beach"), poses and places different within a story.

    Only poses that every character has are asked for.
    """
    common = [pose for pose in poses if all(pose in own for own in cast.poses)]
    tasks = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        chosen = [common[i % len(common)] for i in _shuffled(rng, len(common), panels)]
        where = [PLACES[i % len(PLACES)] for i in _shuffled(rng, len(PLACES), panels)]
        tasks.append(
            StoryTask(
                tuple(plain_caption(None, pose, place) for pose, place in zip(chosen, where, strict=True)),
                tuple(poses.index(pose) for pose in chosen),
                tuple(places.index(place) for place in where),
            )
        )
    return tasks


def _shuffled(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.concatenate([rng.permutation(size) for _ in range(-(-count // size))])[:count]


def joint_sharing(plan: SharingPlan, painter: Painter, options: PaintOptions, panels: int, seed: int) -> Sharing:
    """Sharing of stories whose panels are made together and see each other."""
    unet = painter.model.config.unet
    grids = unet.sharing_grids(*painter.model.config.latent_size(options.height, options.width))
    draws = Draws.from_seed(seed, options.steps, unet.sharing_layers, panels, grids)
    return share_steps(plan, draws, ~np.eye(panels, dtype=bool)[None], reading=False)


def paint_stories(
    painter: Painter,
    options: PaintOptions,
    plan: SharingPlan | None,
    prompts: Sequence[Sequence[str]],
    seeds: Sequence[tuple[int, ...]],
    token_seed: int,
) -> np.ndarray:
    """Stories of equally many panels at once, uint8 [K, A, H, W, 3].

    Args:
      plan: how panels share; None for independent panels.
      seeds: of each story's noise. token_seed: decides which tokens are shared.
    """
    stories, panels = len(prompts), len(prompts[0])
    sharing = None if plan is None else joint_sharing(plan, painter, options, panels, token_seed)
    states = painter.encode([prompt for story in prompts for prompt in story], options)
    positive = jax.tree.map(lambda x: x.reshape(stories, panels, *x.shape[1:]), states)
    noise = painter.noise([(*seed, panel) for seed in seeds for panel in range(panels)], options)
    noise = noise.reshape(stories, panels, *noise.shape[1:])
    latents = painter.paint(noise, positive, painter.encode_negative(None, options), options, sharing).latents
    pictures = painter.pictures(latents.reshape(-1, *latents.shape[2:]))
    return pictures.reshape(stories, panels, *pictures.shape[1:])


class StorySheet:
    """For pictures that no classifier knows: one story with sharing off and on. The newest weights are kept."""

    def __init__(
        self, painter: Painter, options: PaintOptions, plan: SharingPlan, prompts: Sequence[str], seed: int
    ) -> None:
        self.painter, self.options, self.plan, self.prompts, self.seed = painter, options, plan, tuple(prompts), seed

    def __call__(self, params: Params, step: int) -> Evaluation:
        self.painter.params = params
        plans = {OFF: None, rate_name(self.plan): self.plan}
        pictures = {
            name: paint_stories(self.painter, self.options, plan, [self.prompts], [(self.seed,)], self.seed)
            for name, plan in plans.items()
        }
        sheet = story_sheet([StoryTask(self.prompts, (), ())], pictures, f"Step {step}")
        text = "No classifier knows these pictures: look at the sheet of stories."
        return Evaluation({}, float(step), text, {"stories": sheet})


class StoryEvaluator:
    """Paints stories in several ways and scores them.

    Attributes:
      painter: model, tokenizer and sampler; its weights are replaced by those that are evaluated.
      rates: sampling rates beside that of `plan`, on `sweep_stories` stories.
      stories, quick_stories: how many stories are scored after the last step, and before.
      batch: stories that are denoised at once.
    """

    def __init__(
        self,
        painter: Painter,
        options: PaintOptions,
        plan: SharingPlan,
        cast: Cast,
        classifier: PanelClassifier,
        steps: int,
        panels: int = 4,
        stories: int = 200,
        quick_stories: int = 16,
        sweep_stories: int = 64,
        rates: Sequence[float] = (0.3, 0.7),
        batch: int = 8,
        shown: int = 6,
        seed: int = 1000,
    ) -> None:
        self.painter, self.options, self.plan, self.cast, self.classifier = painter, options, plan, cast, classifier
        self.steps, self.panels, self.batch, self.shown, self.seed = steps, panels, batch, shown, seed
        self.stories, self.quick_stories, self.sweep_stories = stories, quick_stories, sweep_stories
        self.rates = tuple(rates)

    def __call__(self, params: Params, step: int) -> Evaluation:
        complete = step >= self.steps
        count = self.stories if complete else self.quick_stories
        self.painter.params = params  # the compiled loops stay
        poses, places = self.classifier.classes["pose"], self.classifier.classes["place"]
        tasks = story_tasks(self.cast, count, self.panels, self.seed, poses, places)
        pictures = {OFF: self.paint(tasks, None), rate_name(self.plan): self.paint(tasks, self.plan)}
        if complete:
            for rate in self.rates:
                plan = replace(self.plan, rate=rate)
                pictures[rate_name(plan)] = self.paint(tasks[: self.sweep_stories], plan)
        readings = {name: self.read(value) for name, value in pictures.items()}
        fewest = min(len(reading["pose"]) for reading in readings.values())
        rows = {name: self.score(tasks[: len(reading["pose"])], reading, fewest) for name, reading in readings.items()}
        on = rate_name(self.plan)
        metrics = {f"{_key(name)}/{key}": value for name, row in rows.items() for key, value in row.items()}
        score = (rows[on]["same_character"] + rows[on]["pose"] + rows[on]["place"]) / 3
        score += complete  # a few stories are too few to rank above a complete evaluation
        records = [{"prompts": list(task.prompts), **self.named(readings, number)} for number, task in enumerate(tasks)]
        table = self.table(rows, fewest)
        sheet = story_sheet(tasks[: self.shown], {name: pictures[name] for name in (OFF, on)}, f"Step {step}")
        return Evaluation(metrics, score, table, {"stories": sheet}, records)

    def paint(self, tasks: Sequence[StoryTask], plan: SharingPlan | None) -> np.ndarray:
        """Pictures uint8 [K, A, H, W, 3]; the noise of a story depends on its number only."""
        done = []
        for start in range(0, len(tasks), self.batch):
            part = list(tasks[start : start + self.batch])
            part += part[:1] * (self.batch - len(part))  # the last batch is filled up, so that one program serves all
            prompts = [task.prompts for task in part]
            seeds = [(self.seed, number) for number in range(start, start + self.batch)]
            done.append(paint_stories(self.painter, self.options, plan, prompts, seeds, self.seed))
        return np.concatenate(done)[: len(tasks)]

    def read(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        """What the classifier sees in pictures [K, A, H, W, 3]: class numbers [K, A] and "features" [K, A, F]."""
        reading = self.classifier(pictures.reshape(-1, *pictures.shape[2:]))
        heads = ("character", "pose", "place", "features")
        return {head: reading[head].reshape(*pictures.shape[:2], *reading[head].shape[1:]) for head in heads}

    def named(self, readings: Mapping[str, Mapping[str, np.ndarray]], story: int) -> dict[str, list[str]]:
        """The characters that were seen in a story, by way of painting."""
        words = self.classifier.classes["character"]
        return {
            _key(name): [words[int(number)] for number in reading["character"][story]]
            for name, reading in readings.items()
            if story < len(reading["character"])
        }

    def score(self, tasks: Sequence[StoryTask], reading: Mapping[str, np.ndarray], fewest: int) -> dict[str, float]:
        """The numbers of one way of painting; Fréchet distances of different numbers of stories do not compare, so
        `fewest` are taken."""
        character, features = reading["character"], reading["features"][:fewest]
        return {
            "same_character": same_character_share(character),
            "same_character_error": bootstrap_error(same_character_share, character),
            "pose": accuracy(reading["pose"], np.array([task.poses for task in tasks])),
            "place": accuracy(reading["place"], np.array([task.places for task in tasks])),
            "diversity": character_diversity(character, len(self.cast)),
            "frechet": frechet_distance(features.reshape(-1, features.shape[-1]), self.real[0]),
            "stories": float(len(character)),
        }

    @functools.cached_property
    def real(self) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """The classifier's features of held-out real panels, those of as many others, and its scores on the others."""
        size = self.options.height
        features = self.classifier(labelled_panels(self.cast, REAL_PANELS, self.seed, "test", size)[0])["features"]
        images, *labels = labelled_panels(self.cast, REAL_PANELS, self.seed + 1, "test", size)
        reading = self.classifier(images)
        heads = ("character", "pose", "place")
        scores = {head: accuracy(reading[head], label) for head, label in zip(heads, labels, strict=True)}
        return features, reading["features"], scores

    def table(self, rows: Mapping[str, Mapping[str, float]], fewest: int) -> str:
        """What a person reads at the end."""
        head = f"{'panels of stories':<24}{'same character':>20}{'pose':>8}{'place':>8}{'diversity':>11}"
        lines = [head + f"{'Fréchet':>10}{'stories':>9}"]
        for name, row in rows.items():
            same = f"{row['same_character']:.3f} ± {row['same_character_error']:.3f}"
            lines.append(
                f"{name:<24}{same:>20}{row['pose']:>8.3f}{row['place']:>8.3f}{row['diversity']:>11.3f}"
                f"{row['frechet']:>10.2f}{int(row['stories']):>9}"
            )
        features, others, real = self.real
        floor = frechet_distance(others[: fewest * self.panels], features)
        lines.append(f"{'real panels':<24}{'':>20}{real['pose']:>8.3f}{real['place']:>8.3f}{'':>11}{floor:>10.2f}")
        lines.append(
            f"The classifier names the character of {real['character']:.1%} of real panels that it never saw. "
            f"Fréchet distances are those of {fewest} stories each."
        )
        return "\n".join(lines)


def rate_name(plan: SharingPlan) -> str:
    """What a table calls a way of painting."""
    return f"sharing on, rate {plan.rate}"


def _key(name: str) -> str:
    return name.replace("sharing ", "").replace(", rate ", "_")


def story_sheet(tasks: Sequence[StoryTask], pictures: Mapping[str, np.ndarray], title: str) -> np.ndarray:
    """A page, one row per story: its panels in each way of painting, side by side, prompts below."""
    side = 144
    first = next(iter(pictures.values()))
    panels = first.shape[1]
    block = panels * (side + 4) + 2 * MARGIN
    row_height = side + 12 + 15 * panels
    head = 66
    page = Image.new("RGB", (block * len(pictures), head + row_height * len(tasks)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, 10), title, INK, font_of(20))
    for column, (name, stories) in enumerate(pictures.items()):
        left = column * block + MARGIN
        draw.text((left, 40), name, INK, font_of(16))
        for row, task in enumerate(tasks):
            top = head + row * row_height
            for number in range(panels):
                picture = Image.fromarray(stories[row, number]).resize((side, side), Image.Resampling.LANCZOS)
                page.paste(picture, (left + number * (side + 4), top))
            if column == 0:
                for number, prompt in enumerate(task.prompts):
                    draw.text((left, top + side + 4 + 15 * number), f"{number + 1}. {prompt}", PALE_INK, font_of(12))
    return np.asarray(page)
