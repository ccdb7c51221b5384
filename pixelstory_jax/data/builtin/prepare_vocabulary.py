"""Fits the small vocabulary of the tiny models to the text of training scenes.

    python -m pixelstory_jax.data.builtin.prepare_vocabulary

Never-trained names are not among the texts; they are spelled from shorter pieces.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from pixelstory_jax.data.builtin.questions import AskedScenes
from pixelstory_jax.data.builtin.things import builtin_library
from pixelstory_jax.data.examples import caption, whereabouts
from pixelstory_jax.data.tokenizers import SMALL_VOCABULARY, train_small_vocabulary

SEED = 5
SIZE = 900


def training_texts(scenes: int = 2500) -> Iterator[str]:
    """Questions and answers of training scenes, in the form that the models read, and every trained name."""
    library = builtin_library()
    for number in library.pool("train"):
        thing = library.things[number]
        yield from [f"the {thing.name}", f"the {thing.plural}", thing.with_article] * 8
    asked = AskedScenes(seed=SEED, split="train", size=32, conversations=3)
    for index in range(scenes):
        scene, conversations = asked[index]
        rng = np.random.default_rng(index)
        for conversation in conversations:
            for question in conversation:
                parts = [part for part in question.answer if isinstance(part, str)]
                yield f"USER: {question.text} ASSISTANT:"
                yield from parts
                yield question.plain_answer
        for turn in (*caption(scene, rng), *whereabouts(scene, rng)):
            yield turn.question
            yield str((turn.answer or ("",))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(SMALL_VOCABULARY), help="JSON file to write")
    arguments = parser.parse_args()
    train_small_vocabulary(training_texts(), arguments.out, SIZE)
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
