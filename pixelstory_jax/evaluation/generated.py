"""What `evaluate` of the PixelLM objective does: generated answers on held-out pictures, their table and pages of them.

During training a few fixed questions are asked (`eval.quick_examples` of each kind, scenes of `eval.seed` + 1). The
score by which the best checkpoint is chosen always comes from them. The table at the end is of other scenes
(`eval.examples` of each kind, scenes of `eval.seed`), so that the choice does not flatter it. `eval.splits` may name
published benchmarks as well, see `benchmark_evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pixelstory_jax.data.builtin.photos import COMMANDS as PHOTO_COMMANDS
from pixelstory_jax.data.builtin.photos import asked_photos
from pixelstory_jax.data.builtin.questions import KINDS, Conversation, ask
from pixelstory_jax.data.builtin.scenes import Scene, compose, scene_rng
from pixelstory_jax.data.builtin.things import Thing
from pixelstory_jax.data.sources import build_scenes
from pixelstory_jax.data.tokenizers import Tokenizer
from pixelstory_jax.evaluation.benchmark_evaluator import BenchmarkEvaluator
from pixelstory_jax.evaluation.protocol import EvaluationExample, Report, ScoredAnswer, evaluate_answers
from pixelstory_jax.evaluation.sheets import answer_sheet
from pixelstory_jax.inference.segmenter import Segmenter
from pixelstory_jax.models.pixellm import PixelLMConfig
from pixelstory_jax.objectives.objective import Evaluation, Params

TITLES = {"test": "new_scenes", "unseen": "new_names", "photos": "photos"}
_SCENES_PER_QUESTION = 40  # scenes that are tried for one question of a kind before the kind is given up
_DRAWS = 8  # questions that are drawn about a scene before it is given up for a kind


class AnswerEvaluator:
    """Scores parameters on the splits of `config.eval`.

    Args:
      config: the whole config; read are `data`, `eval`, `train.steps`.
      model: sizes. tokenizer: the vocabulary of the training data.

    Raises:
      ValueError: an unknown split. FileNotFoundError: `data.photos` names a folder without annotated photos.
    """

    def __init__(self, config: Any, model: PixelLMConfig, tokenizer: Tokenizer) -> None:
        unknown = sorted(split for split in set(config.eval.splits) - set(TITLES) if "|" not in split)
        if unknown:
            known = ", ".join((*TITLES, "benchmarks as 'reason_seg|val'"))
            raise ValueError(f"Unknown eval.splits {unknown[0]!r}; known are {known}.")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.benchmarks = BenchmarkEvaluator(config)
        self.photos = asked_photos(config.data.photos or None) if "photos" in config.eval.splits else None

    @property
    def splits(self) -> list[str]:
        """Those of `config.eval.splits` that are no benchmarks."""
        return [split for split in self.config.eval.splits if split in TITLES]

    def __call__(self, params: Params, step: int) -> Evaluation:
        settings = self.config.eval
        segmenter = Segmenter(
            self.model, params, self.tokenizer, self.config.data.style, max_new_tokens=settings.max_new_tokens
        )
        quick = evaluate_answers(segmenter.ask_many, self.quick_examples, settings.batch_size)
        results = self.benchmarks.quick(segmenter)
        scores = [*([score(quick)] if self.splits else []), *(result.score for result in results)]
        whole = quick
        notes = ""
        if step >= self.config.train.steps:
            whole = evaluate_answers(segmenter.ask_many, self.reported_examples, settings.batch_size)
            results = self.benchmarks.whole(segmenter)
            if "photos" in settings.splits and self.photos is None:
                notes = f"\n\nphotos: none found. Get some with:\n{PHOTO_COMMANDS}"
        tables = [*([whole.table + notes] if self.splits else []), *(result.report.table for result in results)]
        images = sheets(whole.answers, settings.sheet)
        for result in results:
            images |= result.images
        return Evaluation(
            metrics=whole.metrics | {name: value for result in results for name, value in result.metrics.items()},
            score=float(np.mean(scores)),
            table="\n\n".join(tables),
            images=images,
            records=[*whole.records, *(record for result in results for record in result.records)],
        )

    @cached_property
    def quick_examples(self) -> list[EvaluationExample]:
        """A few questions of each kind about new scenes of trained things, none of them in the reported table.

        Photos are few: where they are the only split, the score comes from all of them.
        """
        settings = self.config.eval
        if not self.splits:
            return []
        split = "test" if "test" in self.splits else self.splits[0]
        if split == "photos":
            return self._photo_examples()
        return self._scene_examples(split, min(settings.quick_examples, settings.examples), settings.seed + 1)

    @cached_property
    def reported_examples(self) -> list[EvaluationExample]:
        """The questions of the table at the end, split by split."""
        settings = self.config.eval
        examples = []
        for split in self.splits:
            if split == "photos":
                examples += self._photo_examples()
            else:
                examples += self._scene_examples(split, settings.examples, settings.seed)
        return examples

    def _scene_examples(self, split: str, count: int, seed: int) -> list[EvaluationExample]:
        """`count` questions of every kind about the scenes of `seed`; they are always the same."""
        source = build_scenes(self.config, split, seed)
        if not source.library.pool("train" if split == "test" else split):
            return []
        found: dict[str, int] = dict.fromkeys(source.kinds, 0)
        examples = []
        for index in range(_SCENES_PER_QUESTION * count):
            wanted = [kind for kind in found if found[kind] < count]
            if not wanted:
                break
            scene = compose(source.seed, index, split, size=source.size, library=source.library)
            for kind in wanted:
                # A stream of its own for each kind: which kinds are asked changes no question of the others.
                rng = scene_rng(source.seed, index, split, f"evaluation {kind}")
                conversation = _draw(scene, kind, rng, split, source.absent_from)
                if conversation is not None:
                    found[kind] += 1
                    examples.append(_example(split, scene, conversation))
        return examples

    def _photo_examples(self) -> list[EvaluationExample]:
        return [_example("photos", scene, conversation) for scene, conversation in _pairs(self.photos or ())]


def _draw(
    scene: Scene, kind: str, rng: np.random.Generator, split: str, absent_from: Sequence[Thing]
) -> Conversation | None:
    """A conversation of one kind; in the split "unseen" every question of it is about a never-trained name.

    An unseen scene shows trained things beside the one or two others, and most questions would be about those.
    """
    if split != "unseen":
        return ask(scene, kind, rng, absent_from)
    never_trained = [thing for thing in absent_from if thing.split == "unseen"]
    if kind in ("absent", "absent_group"):
        return ask(scene, kind, rng, never_trained)
    for _ in range(_DRAWS):
        conversation = ask(scene, kind, rng, never_trained)
        # The first of two turns is scored too, under its own kind.
        if conversation and all(
            any(scene.things[target].split == "unseen" for target in turn.targets) for turn in conversation
        ):
            return conversation
    return None


def _pairs(source: Any) -> Iterator[tuple[Scene, Conversation]]:
    for index in range(len(source)):
        scene, conversations = source[index]
        yield from ((scene, conversation) for conversation in conversations)


def _example(split: str, scene: Scene, conversation: Conversation) -> EvaluationExample:
    return EvaluationExample(TITLES[split], scene.image, scene.masks.astype(bool), conversation)


def score(quick: Report) -> float:
    """Mean over the kinds of questions of their gIoU (for absent things: of the rejection rate)."""
    kinds = sorted({(item.example.split, item.question.kind) for item in quick.answers})
    names = [f"{split}/{kind}/{'rejected' if kind.startswith('absent') else 'giou'}" for split, kind in kinds]
    return float(np.mean([quick.metrics[name] for name in names])) if names else 0.0


def sheets(answers: Sequence[ScoredAnswer], count: int) -> dict[str, np.ndarray]:
    """One page per split with `count` answers, the kinds of questions in turn and each about another picture."""
    pages = {}
    for split in dict.fromkeys(item.example.split for item in answers):
        by_kind = [[a for a in answers if (a.example.split, a.question.kind) == (split, kind)] for kind in KINDS]
        columns = [items[number % len(items) :] for number, items in enumerate(filter(None, by_kind))]
        in_turn = [column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)]
        if count:
            pages[split] = answer_sheet(in_turn[:count], split.replace("_", " ").capitalize())
    return pages
