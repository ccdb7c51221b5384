"""Fits the small CLIP vocabulary of the tiny diffusion models to story captions.

    python -m pixelstory_jax.data.builtin.prepare_clip_vocabulary

Every byte is a token, so that any text can be spelled, and every word of the captions. What room is left goes to words
that people write about other characters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from pixelstory_jax.data.builtin.characters import NAMES
from pixelstory_jax.data.builtin.story_wording import ACTIONS, PLACE_WORDS, caption, empty_caption, pair_caption
from pixelstory_jax.data.clip_tokenizer import SMALL_CLIP_VOCABULARY, train_clip_vocabulary

SEED = 7
SIZE = 1024
LENGTH = 24
OTHER_WORDS = """
for from has her his it its not she that their they this two was were with who
big black blue brown gold happy little old pink purple sad silver small white yellow young
adventurer animal boy brother cat child dog father friend hat king lady monster mother person prince princess queen
sister woman
archer bandit dragon dwarf dwarvish elf elvish fighter ghost guard horse hunter knight lord mage master merman orc
orcish outlaw pirate ranger rider shadow skeleton soldier spearman thief troll warrior witch wizard wolf
"""


def training_texts(rounds: int = 40) -> Iterator[str]:
    """Captions of every pose in every place, with one, two or unnamed characters and with none; then other words."""
    rng = np.random.default_rng(SEED)
    names = list(NAMES.values())
    for _ in range(rounds):
        for place in PLACE_WORDS:
            yield empty_caption(rng, place)
            for pose in ACTIONS:
                first, second = rng.choice(len(names), 2, replace=False)
                yield caption(rng, names[first], pose, place)
                yield caption(rng, None, pose, place)
                yield pair_caption(rng, names[first], names[second], pose, place)
    yield OTHER_WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(SMALL_CLIP_VOCABULARY), help="folder to write")
    arguments = parser.parse_args()
    train_clip_vocabulary(training_texts(), SIZE, LENGTH).save(arguments.out)
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
