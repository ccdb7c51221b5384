"""The command that tells stories: a new one, the same once more, one panel of it drawn again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.inference.story_teller import picture_hash
from tests.story_sizes import SIDE, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """title: The Moon
seed: 7

[Bob] a robot
[Ada] a girl

[Bob] standing "Hello?" #It began.
[Bob] and [Ada] walking #
[NC] an empty hill
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("story")
    save_checkpoint(path / "run")
    save_checkpoint(path / "other", objective="pixellm")
    save_checkpoint(path / "retrained", {"unet/conv_out/bias": 0.5})
    (path / "moon.txt").write_text(SCRIPT)
    (path / "broken.txt").write_text(SCRIPT.replace("[Bob] and", "[Bop] and"))
    return path


def story(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.story", *arguments],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **cache},
        capture_output=True,
        text=True,
        timeout=900,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "story.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def told(folder) -> tuple[Path, str]:
    done = story(folder, "--checkpoint=run", "--story=moon.txt", "--width=700", "--steps=3")
    assert done.returncode == 0, done.stderr
    return folder / "stories" / "moon", done.stdout + done.stderr


def test_a_story_is_told(told):
    """Panels, page, PDF and manifest, in a folder with the name of the script; what it will take is said before."""
    out, output = told
    panels = ["panel_01.png", "panel_02.png", "panel_03.png"]
    assert set(files(out)) == {*panels, "portrait_01_ada.png", "page_1.png", "comic.pdf", "story.json"}
    assert "3 panels, seed 7, sharing: bank" in output and "3/3" in output
    assert "Memory at the peak: " in output and "Written: stories/moon/panel_01.png" in output
    pictures = [np.asarray(Image.open(out / name)) for name in panels]
    assert all(picture.shape == (SIDE, SIDE, 3) for picture in pictures)
    written = manifest(out)
    assert written["panels_sha256"] == [picture_hash(picture) for picture in pictures]
    assert written["sampling"]["steps"] == 3 and written["sharing"]["strategy"] == "bank"
    assert Image.open(out / "page_1.png").width == 700


def test_the_same_pictures_again_bit_for_bit(folder, told):
    """In another process and from the manifest only; every file of the two folders is the same."""
    out, _ = told
    done = story(folder, "--checkpoint=run", f"--again={out}", "--out=again")
    assert done.returncode == 0, done.stderr
    assert "The same pictures, bit for bit." in done.stdout
    assert files(folder / "again") == files(out)


@pytest.mark.slow
def test_one_panel_is_drawn_again(folder, told):
    """Only this panel, the page and the manifest are written; then the whole story comes again with it."""
    out, _ = told
    before, times = files(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    try:
        done = story(folder, "--checkpoint=run", f"--again={out}", "--redraw=2", "--seed=5")
        assert done.returncode == 0, done.stderr
        after = files(out)
        assert {name for name in before if before[name] != after[name]} == {
            "panel_02.png",
            "page_1.png",
            "comic.pdf",
            "story.json",
        }
        rewritten = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != times[path.name]}
        assert not {"panel_01.png", "panel_03.png", "portrait_01_ada.png"} & rewritten
        assert manifest(out)["redrawn"] == {"1": 5}
        whole = story(folder, "--checkpoint=run", f"--again={out / 'story.json'}", "--out=whole")
        assert whole.returncode == 0 and "The same pictures, bit for bit." in whole.stdout, whole.stderr
        assert files(folder / "whole") == after
    finally:
        for name, content in before.items():
            (out / name).write_bytes(content)


@pytest.mark.slow
def test_a_panel_is_drawn_again_into_another_folder(folder, told):
    """Then all panels are written there, and the story stays as it is."""
    out, _ = told
    before = files(out)
    done = story(folder, "--checkpoint=run", f"--again={out}", "--redraw=3", "--seed=6", "--out=elsewhere")
    assert done.returncode == 0, done.stderr
    assert files(out) == before
    written = files(folder / "elsewhere")
    assert [written[f"panel_0{n}.png"] == before[f"panel_0{n}.png"] for n in (1, 2, 3)] == [True, True, False]
    assert written.keys() == before.keys()
    assert written["portrait_01_ada.png"] == before["portrait_01_ada.png"]


@pytest.mark.slow
def test_pictures_that_differ_do_not_replace_a_story(folder, told):
    """As by another version: the story stays, the new pictures go into another folder if one is named."""
    copy = folder / "by_another_version"
    shutil.copytree(told[0], copy)
    changed = manifest(copy)
    changed["panels_sha256"][0] = "0"
    (copy / "story.json").write_text(json.dumps(changed))
    before = files(copy)
    done = story(folder, "--checkpoint=run", f"--again={copy}")
    assert done.returncode == 2 and "Error: The pictures differ" in done.stderr and "--out=FOLDER" in done.stderr
    assert files(copy) == before
    done = story(folder, "--checkpoint=run", f"--again={copy}", "--out=new")
    assert done.returncode == 0 and "The pictures differ: other versions or another device." in done.stdout
    assert files(folder / "new")["panel_01.png"] == before["panel_01.png"]


@pytest.mark.slow
def test_without_sharing(folder):
    """Another seed than that of the script, no bank, and no portrait is needed."""
    done = story(
        folder, "--checkpoint=run", "--story=moon.txt", "--sharing=off", "--seed=9", "--out=off", "--width=600"
    )
    assert done.returncode == 0, done.stderr
    assert "seed 9, sharing: off" in done.stdout
    written = manifest(folder / "off")
    assert written["sharing"] is None and written["seed"] == 9
    assert not (folder / "off" / "portrait_01_ada.png").exists()


@pytest.mark.slow
def test_as_the_first_app(folder):
    """Masks, the app's gates, re-weighted skips, a rate per grid: all of it is in the manifest."""
    flags = ["--sampling=mask", "--schedule=app", "--freeu", "--rate=0.7", "--rate=0.3", "--width=600", "--out=app"]
    done = story(folder, "--checkpoint=run", "--story=moon.txt", *flags)
    assert done.returncode == 0, done.stderr
    written = manifest(folder / "app")
    sharing = {"sampling": "mask", "schedule": "app", "rate": [0.7, 0.3], "strategy": "bank"}
    assert sharing.items() <= written["sharing"].items() and written["sampling"]["freeu"] is True


RUN, MOON = "--checkpoint=run", "--story=moon.txt"
REFUSED = {
    "nothing": ([], "--checkpoint is needed"),
    "no script": ([RUN], "Give either --story=SCRIPT or --again=FOLDER"),
    "script and story": ([RUN, MOON, "--again=stories/moon"], "Give either --story=SCRIPT or --again=FOLDER"),
    "redraw of a script": ([RUN, MOON, "--redraw=1"], "--redraw needs --again=FOLDER"),
    "unknown sharing": ([RUN, MOON, "--sharing=all"], "--sharing"),
    "no such script": ([RUN, "--story=none.txt"], "none.txt cannot be read"),
    "mistake in the script": ([RUN, "--story=broken.txt"], "broken.txt, line 8: the panel names [Bop]"),
    "rate": ([RUN, MOON, "--rate=1.5"], "rate is 1.5; shares lie between 0 and 1."),
    "no checkpoint": (["--checkpoint=none", MOON], "There is no checkpoint at"),
    "other checkpoint": (
        ["--checkpoint=other", MOON],
        "other holds a checkpoint of 'pixellm', not of 'storydiffusion'",
    ),
    "seed": ([RUN, MOON, "--seed=-1"], "--seed"),
    "page": ([RUN, MOON, "--width=100"], "A page must be at least 600 pixels wide to be lettered, got 100."),
    "steps": ([RUN, MOON, "--steps=0"], "steps is 0; at least 1 is needed."),
    "settings of a told story": (
        [RUN, "--again=stories/moon", "--steps=3", "--sharing=off"],
        "--again takes its settings from story.json; --sharing, --steps need a new story (--story)",
    ),
    "no story": ([RUN, "--again=run"], "run/story.json cannot be read"),
    "other weights": (
        ["--checkpoint=retrained", "--again=stories/moon"],
        "told by other weights or another sampler (run)",
    ),
    "no such panel": ([RUN, "--again=stories/moon", "--redraw=4", "--seed=1"], "has the panels 1 to 3"),
    "no seed": ([RUN, "--again=stories/moon", "--redraw=1"], "--redraw needs --seed"),
    "changed panel": (
        [RUN, "--again=changed", "--redraw=1", "--seed=1"],
        "changed/panel_02.png is missing or is not the picture that story.json describes.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folder, told, case):
    arguments, sentence = REFUSED[case]
    if case == "changed panel":
        (folder / "changed").mkdir()
        for name, content in files(told[0]).items():
            (folder / "changed" / name).write_bytes(content)
        Image.new("RGB", (SIDE, SIDE)).save(folder / "changed" / "panel_02.png")
    before = files(told[0])
    done = story(folder, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and sentence in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert files(told[0]) == before
