"""Stories from scripts: what is saved makes the same pictures again, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.story_script import StoryError, StoryScript
from pixelstory_jax.inference import story_teller as module
from pixelstory_jax.inference.painter import PaintOptions
from pixelstory_jax.inference.sharing import SharingPlan
from pixelstory_jax.inference.story_painter import Shot
from pixelstory_jax.inference.story_teller import (
    MANIFEST,
    PageOptions,
    Story,
    StoryTeller,
    page_from_manifest,
    picture_hash,
    plan_from_manifest,
    read_manifest,
    read_panels,
    script_from_manifest,
    tree_hash,
)
from pixelstory_jax.training.errors import CheckpointError
from tests.story_sizes import SIDE, STEPS, save_checkpoint, story_painter, story_params

SCRIPT = StoryScript.from_yaml(
    """
title: Der Mond über 東京
style: {name: Mine, positive: "ink, {prompt}", negative: red}
negative: blurry
seed: 7
characters:
  Bob: {description: a robot, anchors: [3, 1]}
  Ada: a girl
shots:
  - {text: "[Bob] standing", bubbles: ["Where?", "There!"], caption: "#1"}
  - {text: a hill, no_character: true}
  - {text: "[Bob] walking", seed: 11}
  - text: "[Bob] and [Ada] waiting"
"""
)
OPTIONS = PaintOptions(steps=STEPS, guidance=3.0, guide_sharing=True, height=SIDE, width=SIDE)
PAGE = PageOptions("strip", 600)


@pytest.fixture(scope="module")
def teller() -> StoryTeller:
    return StoryTeller(story_painter(), OPTIONS, page=PAGE, at_once=2, source="a test")


@pytest.fixture(scope="module")
def story(teller) -> Story:
    return teller.tell(SCRIPT)


@pytest.fixture
def saved(story, tmp_path):
    story.save(tmp_path / "story")
    return tmp_path / "story"


def test_what_the_painter_gets(teller):
    """Prompts in the story's style; a seed for each panel and portrait; the chosen anchors."""
    shots, portraits, painter = teller.plan_story(SCRIPT, 5)
    assert shots == [
        Shot("ink, a robot standing", (0,), (5, 0)),
        Shot("ink, a hill", (), (5, 1)),
        Shot("ink, a robot walking", (0,), (11,)),
        Shot("ink, a robot and a girl waiting", (0, 1), (5, 3)),
    ]
    assert [shot.prompt for shot in portraits] == ["ink, a robot standing", "ink, a girl standing"]
    assert len({shot.seed for shot in (*shots, *portraits)}) == 6
    assert painter.chosen_anchors == {0: (2, 0)} and painter.seed == 5
    assert "red" in painter.negative and "blurry" in painter.negative
    plain = dataclasses.replace(SCRIPT, style=module.Style("none", "{prompt}"), negative="")
    assert teller.plan_story(plain, 5)[2].negative is None


def test_a_told_story(story):
    assert len(story.panels) == 4 and all(picture.shape == (SIDE, SIDE, 3) for picture in story.panels)
    assert story.portraits.keys() == {"Ada"}
    assert story.page is story.pages[0] and story.page.width == 600
    manifest = story.manifest
    assert manifest["panels_sha256"] == [picture_hash(picture) for picture in story.panels]
    assert manifest["weights_sha256"] == tree_hash(story_params())
    assert manifest["seed"] == 7 and manifest["checkpoint"] == "a test"
    assert manifest["sampling"] == {**dataclasses.asdict(OPTIONS), "at_once": 2}
    assert {"pixelstory_jax", "jax", "jaxlib", "device"} <= manifest["versions"].keys()


def test_the_manifest_gives_everything_back(saved, teller):
    """Of a folder or a file, after its way through JSON: tuples are tuples again."""
    for path in (saved, saved / MANIFEST):
        manifest = read_manifest(path)
        assert script_from_manifest(manifest) == SCRIPT
        assert plan_from_manifest(manifest) == SharingPlan("bank") == teller.plan
        assert page_from_manifest(manifest) == PAGE
    plan, page = SharingPlan("joint", rate=(0.3, 0.6)), PageOptions(fonts=("a.ttf",))
    manifest |= {"sharing": dataclasses.asdict(plan), "page": dataclasses.asdict(page)}
    (saved / MANIFEST).write_text(json.dumps(manifest))
    assert plan_from_manifest(read_manifest(saved)) == plan and page_from_manifest(read_manifest(saved)) == page
    (saved / MANIFEST).write_text(json.dumps(manifest | {"sharing": None}))
    assert plan_from_manifest(read_manifest(saved)) is None


def test_the_same_story_again(story, saved):
    """By another teller that knows the manifest only: bit for bit, panels and pages."""
    manifest = read_manifest(saved)
    sampling = dict(manifest["sampling"])
    at_once = sampling.pop("at_once")
    again = StoryTeller(
        story_painter(), PaintOptions(**sampling), plan_from_manifest(manifest), page_from_manifest(manifest), at_once
    ).tell(script_from_manifest(manifest), manifest["seed"])
    assert again.manifest["panels_sha256"] == manifest["panels_sha256"]
    assert [page.tobytes() for page in again.pages] == [page.tobytes() for page in story.pages]


def test_seeds(teller, story):
    """One of the story changes every panel but the one with a seed of its own; that one changes by the others."""
    other = teller.tell(SCRIPT, seed=8).manifest
    assert other["seed"] == 8
    assert all(a != b for a, b in zip(other["panels_sha256"], story.manifest["panels_sha256"], strict=True))
    shots = [teller.plan_story(SCRIPT, seed)[0] for seed in (7, 8)]
    assert [a.seed == b.seed for a, b in zip(*shots, strict=True)] == [False, False, True, False]
    assert teller.tell(dataclasses.replace(SCRIPT, seed=None)).manifest["seed"] == 0


@pytest.mark.slow
def test_one_panel_is_drawn_again(teller, story):
    """As a part of telling or by itself; the others stay bit for bit."""
    picture = teller.redraw(SCRIPT, 7, 3, 99)
    redrawn = teller.tell(SCRIPT, redrawn={3: 99})
    np.testing.assert_array_equal(redrawn.panels[3], picture)
    assert np.abs(picture.astype(int) - story.panels[3]).max() > 20
    assert redrawn.manifest["panels_sha256"][:3] == story.manifest["panels_sha256"][:3]
    assert redrawn.manifest["redrawn"] == {"3": 99} and story.manifest["redrawn"] == {}


def test_memory_is_known_beforehand(teller):
    assert teller.memory(SCRIPT) > sum(leaf.nbytes for leaf in _leaves(story_params()))


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_saved_files(story, saved):
    names = {path.name for path in saved.iterdir()}
    panels = {f"panel_{number:02d}.png" for number in (1, 2, 3, 4)}
    assert names == panels | {"portrait_01_ada.png", "page_1.png", "comic.pdf", MANIFEST}
    assert {path.name for path in story.save(saved)} == names
    for told, read in zip(story.panels, read_panels(saved, read_manifest(saved)), strict=True):
        np.testing.assert_array_equal(told, read)
    np.testing.assert_array_equal(Image.open(saved / "portrait_01_ada.png"), story.portraits["Ada"])


def test_only_changed_panels_are_written(story, saved):
    times = {path.name: path.stat().st_mtime_ns for path in saved.glob("panel_*.png")}
    story.save(saved, changed=[2])
    after = {path.name: path.stat().st_mtime_ns for path in saved.glob("panel_*.png")}
    assert [name for name in times if times[name] != after[name]] == ["panel_03.png"]


def test_panels_that_were_changed_are_refused(story, saved):
    """By a pixel, or gone; the same picture in another file is the same picture."""
    manifest, path = read_manifest(saved), saved / "panel_02.png"
    Image.fromarray(story.panels[1]).save(path, "PNG", compress_level=0)
    assert len(read_panels(saved, manifest)) == 4
    picture = story.panels[1].copy()
    picture[0, 0, 0] ^= 1
    Image.fromarray(picture).save(path)
    sentence = f"^{re.escape(str(path))} is missing or is not the picture that story.json describes.$"
    with pytest.raises(StoryError, match=sentence):
        read_panels(saved, manifest)
    path.unlink()
    with pytest.raises(StoryError, match=sentence):
        read_panels(saved, manifest)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="panel_02.png"):
        read_panels(saved, manifest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest | {"format": 1}, "has the format 1; this version reads 2."),
        (lambda manifest: {}, "is not the manifest of a story."),
        (lambda manifest: [1], "is not the manifest of a story."),
        (lambda manifest: {name: manifest[name] for name in manifest if name != "seed"}, "is not the manifest"),
        (lambda manifest: manifest | {"script": "Bob"}, "is not the manifest of a story."),
        (lambda manifest: manifest | {"script": {**manifest["script"], "panels": ["a"]}}, "is not the manifest"),
        (lambda manifest: manifest | {"sharing": {"strategy": "all"}}, "is not the manifest of a story."),
    ],
)
def test_manifests_that_are_refused(saved, change, words):
    path = saved / MANIFEST
    path.write_text(json.dumps(change(read_manifest(path))))
    with pytest.raises(StoryError, match=f"^{re.escape(str(path))} {re.escape(words)}"):
        read_manifest(saved)


def test_no_manifest(tmp_path):
    with pytest.raises(StoryError, match="story.json cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff{")
    with pytest.raises(StoryError, match="is not the manifest of a story"):
        read_manifest(tmp_path)


def test_from_checkpoint(teller, story, tmp_path):
    """Sampling as in the evaluation of the run, unless told otherwise."""
    workdir = save_checkpoint(tmp_path / "run")
    assert StoryTeller.from_checkpoint(workdir).plan == SharingPlan("bank", rate=0.7)
    read = StoryTeller.from_checkpoint(workdir, page=PAGE, at_once=2, rate=0.5)
    assert read.options == OPTIONS and read.plan == SharingPlan("bank") and read.source == str(workdir)
    assert read.tell(SCRIPT).manifest["panels_sha256"] == story.manifest["panels_sha256"]
    changed = StoryTeller.from_checkpoint(workdir, plan=None, steps=5, guidance=1.0)
    assert changed.options == dataclasses.replace(OPTIONS, steps=5, guidance=1.0) and changed.plan is None
    with pytest.raises(TypeError, match="colour"):
        StoryTeller.from_checkpoint(workdir, colour="red")


def test_checkpoints_that_are_refused(tmp_path):
    other = save_checkpoint(tmp_path / "run", objective="pixellm")
    with pytest.raises(CheckpointError, match=r"run holds a checkpoint of 'pixellm', not of 'storydiffusion'$"):
        StoryTeller.from_checkpoint(other)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        StoryTeller.from_checkpoint(tmp_path / "none")


def test_scripts_from_files(teller, tmp_path, monkeypatch):
    """A path is read; a mistake in it names file and line before anything is painted."""
    path = tmp_path / "story.txt"
    path.write_text("[Bob] a robot\n\n[Bbo] walking\n")
    monkeypatch.setattr(teller, "plan_story", lambda script, seed: pytest.fail("painted"))
    with pytest.raises(StoryError, match=r"story.txt, line 3: .*\[Bob\]"):
        teller.tell(path)
    with pytest.raises(StoryError, match="cannot be read"):
        teller.tell(tmp_path / "none.txt")


def test_another_model_is_refused(teller, saved):
    """Other weights or another sampler would draw other pictures; versions alone may or may not."""
    manifest = read_manifest(saved)
    teller.check_model(manifest | {"versions": {"jax": "0.1"}})
    for changed in ({"weights_sha256": "0"}, {"sampler": {**manifest["sampler"], "kind": "euler"}}):
        with pytest.raises(StoryError, match=r"other weights or another sampler \(a test\) than those of a test"):
            teller.check_model(manifest | changed)


def test_words_that_cannot_be_lettered_name_their_line(teller, monkeypatch):
    """Before anything is painted."""
    monkeypatch.setattr(module.StoryPainter, "paint", lambda *_: pytest.fail("painted"))
    for field, words in (("caption", "a \U0001f600"), ("bubbles", ("a", "\U0001f600"))):
        panels = list(SCRIPT.panels)
        panels[2] = dataclasses.replace(panels[2], **{field: words})
        sentence = rf"^Line {panels[2].line} of the script \(panel 3\): No font here has the character \S+ \(U\+1F600"
        with pytest.raises(StoryError, match=sentence):
            teller.tell(dataclasses.replace(SCRIPT, panels=tuple(panels)))


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (PageOptions(width=100), "must be at least 600 pixels wide"),
        (PageOptions(style="circle"), "circle"),
        (PageOptions(fonts=("none.ttf",)), "none.ttf"),
    ],
)
def test_pages_that_cannot_be_drawn(teller, page, words, monkeypatch):
    """The painter is not called: hours of painting would be lost."""
    monkeypatch.setattr(module.StoryPainter, "paint", lambda *_: pytest.fail("painted"))
    with pytest.raises(ValueError, match=words):
        StoryTeller(teller.painter, OPTIONS, page=page).tell(SCRIPT)
