"""Small annotated pictures, a reader of them, and an answerer that says what it is told."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from pixelstory_jax.data.annotations import Annotation, Provenance, Region, Request
from pixelstory_jax.inference.answers import RawAnswer

SIDE = 16


def random_masks(rng: np.random.Generator, count: int) -> np.ndarray:
    """bool [count, SIDE, SIDE]: rectangles, some of them empty."""
    masks = np.zeros((count, SIDE, SIDE), bool)
    for mask in masks:
        top, left = rng.integers(0, SIDE - 2, 2)
        height, width = rng.integers(0, 9, 2)
        mask[top : top + height, left : left + width] = True
    return masks


def annotation(
    rng: np.random.Generator, task: str, regions: int = 5, requests: int = 4, targets: int = 1, ignored: bool = False
) -> Annotation:
    """Each request is for up to `targets` regions (just one where that is 1), in two wordings."""
    masks = random_masks(rng, regions)
    found = tuple(
        Region(mask, name=f"thing{k}", rephrased=f"the thing{k} by the wall", id=str(k)) for k, mask in enumerate(masks)
    )
    asked = []
    for number in range(requests):
        count = 1 if targets == 1 else int(rng.integers(0, targets + 1))
        chosen = tuple(rng.permutation(regions)[:count].tolist())
        words = (f"What about {number}?",) if task == "questions" else (f" Thing {number}", f"It {number} ")
        answer: tuple[str | int, ...] | None = None
        if task == "several":  # expressions joined to one question
            chosen, words = tuple(rng.integers(0, regions, 2).tolist()), ("one and the other",)
            answer = (chosen[0], " and ", chosen[1], ".")
        asked.append(Request(words, chosen, task == "questions" or number % 2 == 1, answer))
    number = int(rng.integers(10**9))
    provenance = Provenance("toy", "val", f"{number}.png", str(number))
    return Annotation(
        (SIDE, SIDE), task, found, tuple(asked), provenance, random_masks(rng, 2).any(0) if ignored else None
    )


class ToyReader:
    """Annotations, with pictures of one colour that tells their number."""

    name, split = "toy", "val"

    def __init__(self, annotations):
        self.annotations = list(annotations)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Annotation:
        if isinstance(self.annotations[index], Exception):
            raise self.annotations[index]
        return self.annotations[index]

    def picture(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((SIDE, SIDE, 3), index, np.uint8)).save(file, "PNG")
        return file.getvalue()


def raw(pieces, masks) -> RawAnswer:
    """An answer whose logits are those of the masks, or the logits themselves."""
    logits = np.asarray(masks, np.float32).reshape(-1, SIDE, SIDE)
    return RawAnswer(tuple(pieces), np.where(logits, 4.0, -4.0) if np.asarray(masks).dtype == bool else logits, SIDE)


class ToyAnswerer:
    """answer(number of the picture, its conversation) -> RawAnswer; `calls` counts batches."""

    def __init__(self, answer: Callable):
        self.answer, self.calls, self.forced = answer, 0, 0

    def fits(self, conversation) -> bool:
        return "too long" not in conversation[-1].question

    def ask_raw(self, images, conversations, tokens_of=None):
        self.calls += 1
        assert all(turns[-1].answer is None for turns in conversations)
        return [self.answer(int(image[0, 0, 0]), turns) for image, turns in zip(images, conversations, strict=True)]

    def point_raw(self, images, conversations):
        self.forced += 1
        assert all(turns[-1].answer is not None for turns in conversations)
        return [self.answer(int(image[0, 0, 0]), turns) for image, turns in zip(images, conversations, strict=True)]


def guessing(seed: int = 0, most: int = 4) -> ToyAnswerer:
    """Answers drawn for each picture and question; forced ones have as many masks as the answer that is given."""

    def answer(number, turns):
        rng = np.random.default_rng((seed, number, *turns[-1].question.encode()))
        given = turns[-1].answer
        count = int(rng.integers(0, most)) if given is None else sum(isinstance(piece, int) for piece in given)
        masks = random_masks(rng, count)
        pieces = [piece for k in range(count) for piece in (f"the thing{k} is ", k)]
        return raw(pieces, np.where(masks, 3.0, -3.0) + rng.normal(size=masks.shape))

    return ToyAnswerer(answer)
