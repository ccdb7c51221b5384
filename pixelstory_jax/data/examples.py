"""Scenes with questions as the static arrays that the objectives read.

Each class here is a random-access source: `source[i]` is a pure function of the source's arguments and i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from pixelstory_jax.data.builtin.questions import Conversation, Question, ask_presence
from pixelstory_jax.data.builtin.scenes import Scene, scene_rng
from pixelstory_jax.data.builtin.wording import listed
from pixelstory_jax.data.conversations import Turn, encode_conversation, pad_conversations
from pixelstory_jax.data.images import fit_canvas, fit_mask
from pixelstory_jax.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Layout:
    """Static sizes of an example: canvas side, questions, tokens per question, target slots, image tokens, prompt
    style."""

    canvas: int
    questions: int
    length: int
    slots: int
    image_tokens: int
    style: str = "plain"


def turns_of(conversation: Sequence[Question], with_masks: bool = True) -> list[Turn]:
    """The conversation's turns; without masks the answers are plain words."""
    return [Turn(q.text, tuple(q.answer) if with_masks else (q.plain_answer,)) for q in conversation]


LEFT_OUT_WARNINGS = 5
IGNORED = 255  # in a target mask: this pixel is neither object nor background


class SegmentationExamples:
    """Pictures with questions whose answers hold masks: the batches of the PixelLM objective.

    Args:
      scenes: source of (picture with `image`, `masks` and, where some pixels do not count, `ignored`; conversations).
    """

    def __init__(self, scenes: Any, tokenizer: Tokenizer, layout: Layout):
        self.scenes, self.tokenizer, self.layout = scenes, tokenizer, layout
        self.shuffled = getattr(scenes, "shuffled", False)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        scene, conversations = self.scenes[index]
        layout = self.layout
        image, image_size = fit_canvas(scene.image, layout.canvas)
        fitted = [fit_mask(mask, layout.canvas) for mask in scene.masks]
        masks = np.array(fitted, np.uint8).reshape(-1, layout.canvas, layout.canvas)
        if (ignored := getattr(scene, "ignored", None)) is not None:
            masks[(masks == 0) & (fit_mask(ignored, layout.canvas) > 0)] = IGNORED
        encoded = [
            encode_conversation(turns_of(c), self.tokenizer, layout.image_tokens, layout.style) for c in conversations
        ]
        group = len(self.tokenizer.codebook)
        arrays = pad_conversations(encoded, layout.questions, layout.length, layout.slots, group, masks)
        left_out = len(encoded) - int(arrays["token_valid"].any(axis=1).sum())
        if left_out and self.shuffled:  # composed scenes are plenty, and what does not fit is drawn again elsewhere
            logging.log_first_n(
                logging.WARNING,
                "Example %d: %d of %d conversations do not fit data.length=%d or data.slots=%d and are left out "
                "(named %d times at most; config.dry_run counts them).",
                LEFT_OUT_WARNINGS,
                *(index, left_out, len(encoded), layout.length, layout.slots, LEFT_OUT_WARNINGS),
            )
        return {"image": image, "image_size": np.asarray(image_size, np.int32), **arrays}


CAPTION_QUESTIONS = ("What is in this picture?", "Describe this picture.", "What do you see?", "Name the things here.")
MAX_OBJECTS = 6
GRID = 16  # boxes in words are given on a grid of this many steps


class PretrainingExamples:
    """Pictures with questions answered in words, and the map of objects that the vision tower learns from.

    Beside the questions of the scenes there are captions (all names, left to right) and boxes in words
    ("Where is the apple?", "3 2 9 8": left, top, right, bottom on a grid of 16 steps), which tie names to places. With
    `boxes_in_captions` captions say the place of every thing as well. With `presence` the second row holds the other
    questions as one conversation, and each further row of the layout asks for `presence` names, half of them not there:
    many decisions for the price of one picture's tokens.
    """

    def __init__(
        self,
        scenes: Any,
        tokenizer: Tokenizer,
        layout: Layout,
        class_numbers: dict[str, int],
        boxes_in_captions: bool = False,
        presence: int = 0,
    ):
        self.scenes, self.tokenizer, self.layout, self.class_numbers = scenes, tokenizer, layout, class_numbers
        self.boxes_in_captions, self.presence = boxes_in_captions, presence

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        scene, conversations = self.scenes[index]
        rng = scene_rng(self.scenes.seed, index, self.scenes.split, "pretraining")
        layout = self.layout
        image, image_size = fit_canvas(scene.image, layout.canvas)
        rows = self.rows(scene, conversations, rng)
        encoded = [encode_conversation(turns, self.tokenizer, layout.image_tokens, layout.style) for turns in rows]
        arrays = pad_conversations(
            encoded, layout.questions, layout.length, 0, len(self.tokenizer.codebook), np.zeros((0, 1, 1), np.uint8)
        )
        objects = np.zeros((layout.canvas, layout.canvas), np.uint8)  # 0 background, k object k
        classes = np.zeros(MAX_OBJECTS + 1, np.int32)
        boxes = np.zeros((MAX_OBJECTS + 1, 4), np.float32)
        scale = layout.canvas / max(scene.image.shape[:2])
        for k in range(len(scene.things)):
            objects[fit_mask(scene.masks[k], layout.canvas) > 0] = k + 1
            classes[k + 1] = self.class_numbers[scene.things[k].name]
            boxes[k + 1] = np.asarray(scene.boxes[k]) * scale / layout.canvas
        return {
            "image": image,
            "image_size": np.asarray(image_size, np.int32),
            "tokens": arrays["tokens"],
            "token_valid": arrays["token_valid"],
            "labels": arrays["labels"],
            "objects": objects,
            "object_classes": classes,
            "object_boxes": boxes,
        }

    def rows(self, scene: Scene, conversations: Sequence[Conversation], rng: np.random.Generator) -> list[list[Turn]]:
        """The conversations of a picture, one a row."""
        describe = inventory if self.boxes_in_captions else caption
        first, where = describe(scene, rng), whereabouts(scene, rng)
        worded = [turns_of(conversation, with_masks=False) for conversation in conversations]
        if not self.presence:
            return [first, where, *worded]
        asked = [
            turns_of(ask_presence(scene, rng, self.scenes.absent_from, self.presence), with_masks=False)
            for _ in range(self.layout.questions - 2)
        ]
        # In a small library all names may be in the scene, and some twice: then there is nothing to ask.
        return [first, [*where, *(turn for turns in worded for turn in turns)], *filter(None, asked)]


def caption(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """All names of the scene, from left to right."""
    order = np.argsort([box[0] + box[2] for box in scene.boxes], kind="stable")
    names = [scene.things[i].with_article for i in order]
    return [Turn(CAPTION_QUESTIONS[rng.integers(len(CAPTION_QUESTIONS))], (listed(names) + ".",))]


INVENTORY_QUESTIONS = ("List everything and where it is.", "What is where?", "Name each thing with its place.")


def box_in_words(scene: Scene, number: int) -> str:
    """Name, left, top, right and bottom of an object, in steps of the grid: "apple 3 2 9 8"."""
    side = max(scene.image.shape[:2])
    box = np.clip(np.asarray(scene.boxes[number]) / side * GRID, 0, GRID - 1).astype(int)
    return f"{scene.things[number].name} {' '.join(map(str, box))}"


def inventory(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """All things of the scene with their boxes, from left to right."""
    order = np.argsort([box[0] + box[2] for box in scene.boxes], kind="stable")
    question = INVENTORY_QUESTIONS[rng.integers(len(INVENTORY_QUESTIONS))]
    return [Turn(question, (", ".join(box_in_words(scene, int(i)) for i in order) + ".",))]


def whereabouts(scene: Scene, rng: np.random.Generator, most: int = 3) -> list[Turn]:
    """Boxes in words of up to `most` things whose name is unique in the scene."""
    names = [thing.name for thing in scene.things]
    unique = [i for i, name in enumerate(names) if names.count(name) == 1]
    if not unique:
        return caption(scene, rng)
    chosen = rng.permutation(unique)[: rng.integers(1, most + 1)]
    parts = [box_in_words(scene, int(i)) for i in chosen]
    verb = "is" if len(chosen) == 1 else "are"
    asked = listed([f"the {names[i]}" for i in chosen])
    return [Turn(f"Where {verb} {asked}?", (", ".join(parts) + ".",))]
