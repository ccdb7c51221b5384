"""Encode stories once with the frozen networks of a config, so that fine-tuning need not at every step.

  python -m experiments.cache_stories --config=configs/storydiffusion.py:sdxl \\
      --config.data.folder=stories --config.init_from=PIPELINE --out=cache
  python -m experiments.train --config=configs/storydiffusion.py:sdxl --config.data.name=cached \\
      --config.data.folder=cache --config.init_from=PIPELINE

The same command goes on with a cache that was stopped half-way. Of each picture the distribution of its latents is
kept, of each caption the states of the text encoders, both in float16.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import ConfigError, UserError

CONFIG = command_line.define_config_flag()
OUT = flags.DEFINE_string("out", "", "Folder of the cache: a new one, or one to go on with.")
BATCH = flags.DEFINE_integer("batch", 1, "Stories at a time.", lower_bound=1)
SHARD = flags.DEFINE_integer(
    "shard", 32, "Stories of a file; as many may be lost where a run is stopped.", lower_bound=1
)
SPLIT = flags.DEFINE_enum("split", "train", ["train", "test"], "Which stories.")


def main() -> None:
    config = CONFIG.value
    if config is None:
        raise ConfigError("Say whose networks and stories: --config=configs/storydiffusion.py:sdxl (see --help)")
    if config.objective != "storydiffusion":
        raise ConfigError(f"{config.name} trains {config.objective}; stories are cached for storydiffusion only")
    if not OUT.value:
        raise ConfigError("--out is needed, as --out=cache (see --help)")
    if not config.init_from:
        raise ConfigError("The networks need weights: --config.init_from=PIPELINE, the folder of a diffusers pipeline")
    out = Path(OUT.value)

    from pixelstory_jax.data import build_source
    from pixelstory_jax.data.cached_stories import CachedStories, cache_stories, encoder_params
    from pixelstory_jax.objectives import build_objective
    from pixelstory_jax.training.compilation_cache import set_compilation_cache

    set_compilation_cache()
    objective: Any = command_line.explain(lambda: build_objective(config))
    if objective.train_text:
        raise ConfigError(
            "This config trains its text encoder, whose states change; they can be cached where it is frozen"
        )
    source = command_line.explain(lambda: build_source(config, SPLIT.value))
    print(f"Reading the weights ({config.init_from}).", flush=True)
    params = command_line.explain(lambda: encoder_params(objective.model, objective.starting_weights()))
    bar = ProgressBar()
    try:
        command_line.explain(
            lambda: cache_stories(
                objective.model,
                params,
                source,
                out,
                objective.empty,
                data_digest(config, source, SPLIT.value),
                BATCH.value,
                SHARD.value,
                bar,
            )
        )
    except KeyboardInterrupt:
        raise UserError(f"Stopped. The same command goes on with {out}") from None
    finally:
        bar.close()
    stories = command_line.explain(lambda: CachedStories(out))
    size = sum(file.stat().st_size for file in out.rglob("*.npy"))
    print(
        f"{out} holds {len(stories)} stories, {size / 1e6:,.1f} MB. To train on them, with the same --config.init_from:"
    )
    print(f"--config.data.name=cached --config.data.folder={out}")


def data_digest(config: Any, source: Any, split: str) -> str:
    """SHA-256 of what decides the examples: the data section, the seed and, for a folder, the file of its stories.

    Pictures are not read: where one was exchanged under its old name, a new cache has to be begun.
    """
    parts = [config.data.to_dict(), config.seed, split, getattr(source, "digest", "")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ProgressBar:
    """Called with (stories done, all stories): a bar with the time left; elsewhere than on a terminal, now and then."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:  # what an earlier run has done says nothing about the time left
            from tqdm import tqdm

            seconds = 0.2 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(total=total, initial=done, unit=" stories", mininterval=seconds, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
