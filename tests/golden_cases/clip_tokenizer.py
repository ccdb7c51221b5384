"""tokenizer.npz: texts and their ids by the tokenizers of a pipeline folder."""

from __future__ import annotations

import numpy as np

from pixelstory_jax.data.clip_tokenizer import ClipTokenizer
from tests.golden_cases.fixture import Fixture


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    folders = [name.strip() for name in fixture.meta["folder"].split(",")]
    tokenizers = [ClipTokenizer.from_folder(fixture.directory / name) for name in folders]
    return {
        f"{number}/{name}": tokenizer.encode(text)
        for name, tokenizer in zip(("ids", "ids_2"), tokenizers, strict=True)
        for number, text in enumerate(fixture.meta["texts"])
    }
