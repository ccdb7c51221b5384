"""The command that caches stories, with the smallest networks: what it writes, goes on with and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pixelstory_jax.data.cached_stories import CachedStories
from pixelstory_jax.data.story_folder import StoryFolder
from pixelstory_jax.models.paths import flatten
from tests.data.test_cached_stories import LENGTH, PANELS, SIZE, drawn_params, empty_ids, objective_of, smallest
from tests.data.test_story_folder import story, write_folder

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED_AT = "TEST_CACHE_STORIES_INTERRUPTED_AT"
CONFIG = """
from ml_collections import ConfigDict

def get_config(argument=None):
    return ConfigDict({
        "name": "smallest", "objective": argument or "storydiffusion", "seed": 4, "init_from": "here",
        "trained": {"text": False}, "data": {"name": "folder", "folder": ""},
    })
"""


class InterruptedStories(StoryFolder):
    """A folder whose reader presses Ctrl-C at one of the stories."""

    interrupted_at = -1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.interrupted_at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def run_with_smallest_networks() -> None:
    """In a process of its own: the command, with networks that no config names."""
    import numpy as np

    import pixelstory_jax.data
    import pixelstory_jax.objectives
    from experiments import cache_stories, command_line

    def build_source(config: Any, split: str) -> StoryFolder:
        encoders = {name: lambda text: np.full(LENGTH, len(text)) for name in ("tokens", "tokens_2")}
        stories = InterruptedStories(config.data.folder, encoders, config.seed, split, SIZE, PANELS)
        stories.interrupted_at = int(os.environ.get(INTERRUPTED_AT, -1))
        return stories

    def build_objective(config: Any) -> Any:
        model = smallest()
        objective = objective_of(model, empty_ids(model))
        objective.train_text = config.trained.text
        objective.start = lambda: flatten(drawn_params(model)) if config.init_from else {}
        return objective

    pixelstory_jax.data.build_source = build_source
    pixelstory_jax.objectives.build_objective = build_objective
    command_line.run(cache_stories.main, cache_stories.__doc__ or "")


def command(
    folder: Path, *arguments: str, variant: str = "storydiffusion", **environment: str
) -> subprocess.CompletedProcess:
    (folder / "config.py").write_text(CONFIG)
    config = (f"--config={folder / 'config.py'}:{variant}", f"--config.data.folder={folder / 'stories'}")
    return subprocess.run(
        [sys.executable, "-m", "tests.experiments.test_cache_stories", *config, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_stories_are_cached_and_a_stopped_run_goes_on(tmp_path):
    stories = [story(1, 2, 3), story(4, 5, 6), story(1), story(2, split="test")]
    write_folder(tmp_path / "stories", stories)
    out = tmp_path / "cache"
    done = command(tmp_path, f"--out={out}", "--shard=1", **{INTERRUPTED_AT: "2"})
    assert done.returncode == 2 and f"Error: Stopped. The same command goes on with {out}." in done.stderr
    written = {name: (out / name).stat().st_mtime_ns for name in ("shard-00000", "shard-00001")}
    assert not (out / "shard-00002").exists()

    done = command(tmp_path, f"--out={out}", "--shard=1", "--batch=2")
    assert done.returncode == 0, done.stderr
    assert f"{out} holds 3 stories" in done.stdout and f"--config.data.folder={out}" in done.stdout
    assert "2/3" in done.stderr and "3/3" in done.stderr  # the progress bar, from where the first run stopped
    assert written == {name: (out / name).stat().st_mtime_ns for name in written}
    cached = CachedStories(out)
    assert len(cached) == 3 and cached[2]["latents"].shape == (PANELS, 8, 8, 4)

    done = command(tmp_path, f"--out={tmp_path / 'test'}", "--split=test")
    assert done.returncode == 0, done.stderr
    assert len(CachedStories(tmp_path / "test")) == 1

    write_folder(tmp_path / "stories", [*stories, story(5)])
    done = command(tmp_path, f"--out={out}")
    assert done.returncode == 2 and "is a cache of other stories" in done.stderr and len(CachedStories(out)) == 3


REFUSED = {
    "no out": ([], "storydiffusion", "--out is needed"),
    "other objective": (
        ["--out=cache"],
        "pixellm",
        "smallest trains pixellm; stories are cached for storydiffusion only",
    ),
    "trained text": (["--out=cache", "--config.trained.text=True"], "storydiffusion", "trains its text encoder"),
    "no weights": (
        ["--out=cache", "--config.init_from="],
        "storydiffusion",
        "The networks need weights: --config.init_from=",
    ),
    "no folder": (
        ["--out=cache", "--config.data.folder=nowhere"],
        "storydiffusion",
        "nowhere/stories.jsonl cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    arguments, variant, sentence = REFUSED[case]
    write_folder(tmp_path / "stories", [story(1)])
    done = command(tmp_path, *arguments, variant=variant)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and sentence in done.stderr
    assert not (ROOT / "cache").exists()


if __name__ == "__main__":
    run_with_smallest_networks()
