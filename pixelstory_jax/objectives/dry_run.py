"""What a run would train on, told from its first batch: `config.dry_run`. No array of the model is made."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import jax
import numpy as np

from pixelstory_jax.data import build_source
from pixelstory_jax.data.examples import SegmentationExamples
from pixelstory_jax.data.mixture import Mixture
from pixelstory_jax.data.pipeline import Example, Source, make_iterator
from pixelstory_jax.data.tokenizers import IMAGE_TOKEN, Tokenizer
from pixelstory_jax.objectives.build import build_objective
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.overview import count

Batch = dict[str, np.ndarray]


def describe_first_batch(config: Any) -> str:
    """Data sets with their sizes, the first batch, and how well it fits its static shapes, as lines of text.

    Raises:
      ValueError, OSError: what also ends training, as a tokenizer or a data set that is missing.
    """
    options = TrainOptions.from_config(config.train.to_dict())
    open_source = cache(lambda: build_source(config, "train"))
    objective = build_objective(config, open_source)
    source: Any = open_source()
    shapes = jax.eval_shape(objective.init, jax.eval_shape(jax.random.key, 0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    lines = [f"Dry run of {config.name}: nothing is trained. {objective.describe()}"]
    start = time.perf_counter()
    batch, places = (_first(one, config.seed, options.batch_size) for one in (source, _Places(source)))
    seconds = time.perf_counter() - start
    if isinstance(getattr(source, "scenes", None), Mixture):
        lines += ["", "Data sets:", *_data_sets(source.scenes)]
    lines += ["", f"First batch, made in {seconds:.1f} s:", *_arrays(batch)]
    if isinstance(source, SegmentationExamples):
        lines += ["", *_fit(source, batch, places["index"].tolist())]
        lines += ["", "A conversation of it:", *_sample(batch, source.tokenizer)]
    lines += ["", f"The model would have {count(parameters).strip()} parameters; none of them was allocated."]
    return "\n".join(lines)


def _first(source: Source, seed: int, batch_size: int) -> Batch:
    return next(make_iterator(source, batch_size, seed, threads=0))


def _data_sets(mixture: Mixture) -> list[str]:
    width = max(len(reader.name) for reader in mixture.readers)
    return [
        f"  {reader.name:<{width}}  {reader.split:<6}{len(reader):>9,} pictures, {share:6.2%} of the examples"
        for reader, share in zip(mixture.readers, mixture.shares, strict=True)
    ] + [f"  {mixture.skipped} pictures that were met cannot be used"] * bool(mixture.skipped)


def _arrays(batch: Batch) -> list[str]:
    width = max(map(len, batch))
    size = sum(array.nbytes for array in batch.values())
    rows = [f"  {name:<{width}}  {array.dtype!s:<8}{list(array.shape)}" for name, array in batch.items()]
    return [*rows, f"  {size / 1e6:,.1f} MB; of several processes, each makes its part"]


def _fit(source: SegmentationExamples, batch: Batch, indices: list[int]) -> list[str]:
    """How the conversations fit into rows, tokens and slots."""
    valid = batch["token_valid"]
    used = valid.any(axis=-1)
    lengths = valid.sum(axis=-1)[used]
    asked = [source.scenes[index][1] for index in indices]
    drawn = sum(map(len, asked)), sum(len(turn.targets) for c in asked for turns in c for turn in turns)
    kept = int(used.sum()), int(batch["target_valid"].sum())
    rows, places = used.size, used.size * valid.shape[-1]
    return [
        f"Rows with a conversation: {kept[0]} of {rows}. Tokens of these: {lengths.min()} to {lengths.max()}, "
        f"on average {lengths.mean():.0f} of {valid.shape[-1]}; {valid.sum() / places:.0%} of all places are used.",
        f"Conversations: {drawn[0]} drawn, {drawn[0] - kept[0]} left out because they do not fit.",
        f"Masks: {drawn[1]} drawn, {drawn[1] - kept[1]} left out with them; "
        f"{batch['target_valid'].size} slots, of which {kept[1]} are used.",
    ]


def _sample(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """The first conversation with a mask, or the first one, read back from its tokens."""
    length = batch["tokens"].shape[-1]
    pictures = np.flatnonzero(batch["target_valid"].any(axis=-1))
    picture = int(pictures[0]) if len(pictures) else 0
    row = int(batch["target_positions"][picture, 0, 0]) // length if len(pictures) else 0
    ids = batch["tokens"][picture, row][batch["token_valid"][picture, row]]
    images = int((ids == IMAGE_TOKEN).sum())
    text = tokenizer.decode(ids)
    return [f"  {text}", f"  ({len(ids)} tokens, of which {images} stand for the picture, which is not written here)"]


class _Places:
    """A source in whose batches stands which examples of another one the same batches would hold."""

    def __init__(self, source: Source) -> None:
        self._length, self.shuffled = len(source), getattr(source, "shuffled", False)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {"index": np.asarray(index)}
