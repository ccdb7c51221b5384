"""Stories as calls of the denoising loop: who is an anchor, who sees whom, and that all strategies agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pixelstory_jax.inference.painter import PaintOptions
from pixelstory_jax.inference.sharing import SharingPlan
from pixelstory_jax.inference.story_painter import (
    Anchor,
    Shot,
    StoryPainter,
    anchors_see,
    panels_see,
    plan_anchors,
    sees_anchors,
)
from tests.story_sizes import SIDE, STEPS, story_painter

OPTIONS = PaintOptions(steps=STEPS, guidance=3.0, height=SIDE, width=SIDE)
PORTRAITS = (Shot("a robot standing", (0,), (100,)), Shot("a girl standing", (1,), (101,)))


def shot(number: int, *characters: int) -> Shot:
    return Shot(f"panel {number}", characters, (number,))


# Character 0 has two panels for itself before the last one, character 1 none; panel 3 shows nobody.
SHOTS = (shot(0, 0), shot(1, 0), shot(2, 0, 1), shot(3), shot(4, 0))


def anchors(shots: tuple[Shot, ...], most: int = 2, chosen: dict | None = None) -> list[tuple[int, int | None]]:
    planned = plan_anchors(shots, PORTRAITS, most, chosen)
    for anchor in planned:
        assert anchor.shot is (PORTRAITS[anchor.character] if anchor.panel is None else shots[anchor.panel])
    return [(anchor.character, anchor.panel) for anchor in planned]


def test_the_first_panels_alone_are_anchors():
    """As many as asked for, or as there are; panels that are shared, and those of nobody, are none."""
    shots = (shot(0, 0, 1), shot(1, 1), shot(2, 0), shot(3), shot(4, 0), shot(5, 0))
    assert anchors(shots) == [(0, 2), (0, 4), (1, 1)]
    assert anchors(shots, 1) == [(0, 2), (1, 1)]
    assert anchors(shots, 9) == [(0, 2), (0, 4), (0, 5), (1, 1)]


def test_a_character_that_is_never_alone_has_a_portrait():
    assert anchors((shot(0, 0, 1), shot(1, 0))) == [(0, 1), (1, None)]
    assert anchors((shot(0, 0, 1), shot(1, 0, 1))) == [(0, None), (1, None)]


def test_who_is_in_no_panel_needs_no_anchor():
    assert anchors((shot(0, 0), shot(1))) == [(0, 0)]
    assert anchors((shot(0), shot(1))) == []


def test_chosen_anchors():
    """They replace those of their character only, may be more than asked for, and may show two characters."""
    shots = (shot(0, 0), shot(1, 1), shot(2, 0), shot(3, 0), shot(4, 0, 1))
    assert anchors(shots, 1, {0: (3, 2)}) == [(0, 3), (0, 2), (1, 1)]
    assert anchors(shots, 1, {1: (4,)}) == [(0, 0), (1, 4)]
    assert anchors(shots, 1, {1: ()}) == [(0, 0), (1, 1)]


def test_who_sees_whom():
    planned = plan_anchors(SHOTS, PORTRAITS, 2)
    assert [anchor.panel for anchor in planned] == [0, 1, None]
    np.testing.assert_array_equal(anchors_see(planned), [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(sees_anchors(SHOTS[2:], planned), [[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(
        panels_see(SHOTS),
        [[0, 1, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    )
    assert sees_anchors(SHOTS, ()).shape == (5, 0) and sees_anchors((), planned).shape == (0, 3)


@pytest.fixture(scope="module")
def paint():
    """From a strategy to what paints by it; all share their compiled programs."""
    painter = story_painter()

    def build(strategy: str | None, at_once: int = 2, **changes) -> StoryPainter:
        plan = None if strategy is None else SharingPlan(strategy, anchors=2, window=0, **changes)
        return StoryPainter(painter, plan, OPTIONS, "a hill", seed=3, at_once=at_once)

    return build


@pytest.fixture(scope="module")
def banked(paint):
    return paint("bank").paint(SHOTS, PORTRAITS)


@pytest.fixture(scope="module")
def independent(paint):
    return paint(None).paint(SHOTS, PORTRAITS)


def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Largest difference of each picture, in grey levels."""
    return np.abs(first.astype(int) - second).max((-3, -2, -1))


def test_a_bank_and_a_replay_give_the_same_pictures(paint, banked):
    """Up to the rounding of grey levels; so do other numbers of panels at once."""
    assert banked.pictures.shape == (5, SIDE, SIDE, 3) and banked.pictures.dtype == np.uint8
    replayed = paint("replay").paint(SHOTS, PORTRAITS)
    assert distance(replayed.pictures, banked.pictures).max() <= 1
    assert banked.portraits.keys() == replayed.portraits.keys() == {1}
    assert distance(replayed.portraits[1], banked.portraits[1]) <= 1
    assert distance(paint("bank", at_once=1).paint(SHOTS, PORTRAITS).pictures, banked.pictures).max() <= 1


@pytest.mark.slow
def test_windows_of_joint_generation(paint):
    """One as wide as the story is no window; in a narrower one a panel still sees its neighbours, but no others."""
    painter, shots = paint(None).painter, [Shot("a robot", (0,), (number,)) for number in range(5)]

    def panels(window: int, told: list[Shot] = shots) -> np.ndarray:
        plan = SharingPlan("joint", window=window)
        return StoryPainter(painter, plan, dataclasses.replace(OPTIONS, steps=1), seed=3).paint(told).pictures

    everything, narrow = panels(0), panels(2)
    np.testing.assert_array_equal(panels(5), everything)
    assert (distance(narrow, everything) > 5).all()
    changed = [*shots[:4], dataclasses.replace(shots[4], seed=(9,))]
    by_narrow = distance(narrow, panels(2, changed))  # in one step, by two layers, the last panel reaches two others
    assert by_narrow[:2].max() == 0 and by_narrow[3:].min() > 5
    assert distance(everything, panels(0, changed)).min() > 0


def test_only_who_shares_a_character_is_changed(banked, independent):
    changed = distance(banked.pictures, independent.pictures)
    assert changed[3] <= 1 and (changed[[0, 1, 2, 4]] > 20).all()
    assert independent.portraits == {}
    assert distance(independent.pictures[0], independent.pictures[1]) > 20


def test_joint_generation(paint, banked, independent):
    joint = paint("joint").paint(SHOTS, PORTRAITS)
    changed = distance(joint.pictures, independent.pictures)
    assert joint.portraits == {} and changed[3] <= 1 and (changed[[0, 1, 2, 4]] > 20).all()
    assert (distance(joint.pictures, banked.pictures)[[0, 1, 2, 4]] > 20).all()  # anchors see later panels here


def test_finished_panels_are_reported(paint):
    """Anchors first, a portrait does not count, and neither does what fills up the last call."""
    finished: list[int] = []
    paint("bank").paint(SHOTS, PORTRAITS, finished.append)
    assert finished == [2, 2, 1]
    finished.clear()
    paint(None).paint(SHOTS, PORTRAITS, finished.append)
    assert finished == [2, 2, 1]


def test_a_panel_chosen_for_two_characters_is_reported_once(paint):
    shots = (shot(0, 0, 1), shot(1, 0), shot(2, 1))
    finished: list[int] = []
    painter = paint("bank")
    painter.chosen_anchors = {0: (0,), 1: (0, 2)}
    pictures = painter.paint(shots, PORTRAITS, finished.append).pictures
    assert len(pictures) == 3 and finished == [2, 1]


def test_a_redrawn_reader_from_its_own_seed_is_the_same(paint, banked):
    painter = paint("bank")
    same, other = (painter.redraw(4, seed, SHOTS, PORTRAITS) for seed in (4, 44))
    assert distance(same, banked.pictures[4]) <= 1 < 20 < distance(other, banked.pictures[4])
    np.testing.assert_array_equal(painter.redraw(4, 44, SHOTS, PORTRAITS), other)


@pytest.mark.slow
def test_a_redrawn_anchor_looks_at_the_others(paint):
    """Not at itself: what panel 0 looked like before is of no matter, panel 1 is."""
    painter = paint("replay")
    drawn = painter.redraw(0, 44, SHOTS, PORTRAITS)
    of_other = (Shot("panel 0", (0,), (77,)), *SHOTS[1:])
    np.testing.assert_array_equal(painter.redraw(0, 44, of_other, PORTRAITS), drawn)
    beside_other = (SHOTS[0], Shot("panel 1", (0,), (77,)), *SHOTS[2:])
    assert distance(painter.redraw(0, 44, beside_other, PORTRAITS), drawn) > 20


@pytest.mark.slow
def test_an_only_anchor_is_redrawn_beside_what_it_was(paint):
    """The character has no other picture; a story of one panel of nobody has no anchor at all."""
    painter, alone = paint("replay"), paint(None)
    shots = (SHOTS[0],)
    drawn = painter.redraw(0, 44, shots, PORTRAITS)
    assert distance(drawn, alone.redraw(0, 44, shots, PORTRAITS)) > 20
    nobody = (SHOTS[3],)
    np.testing.assert_array_equal(painter.redraw(0, 44, nobody), alone.redraw(0, 44, nobody))


def test_a_redrawn_panel_of_a_joint_story(paint):
    """It sees what it saw, every other panel with one of its characters: from its own seed it is the same."""
    painter = paint("joint")
    pictures = painter.paint(SHOTS, PORTRAITS).pictures
    for panel in (0, 2):
        same, other = (painter.redraw(panel, seed, SHOTS, PORTRAITS) for seed in (panel, 44))
        assert distance(same, pictures[panel]) <= 1 < 20 < distance(other, pictures[panel])


def test_the_negative_prompt(paint, banked):
    """The story's own counts for every panel, the one of nobody as well."""
    painter = paint("bank")
    painter.negative = None
    assert (distance(painter.paint(SHOTS, PORTRAITS).pictures, banked.pictures) > 5).all()


@pytest.mark.parametrize("strategy", ["bank", "replay"])
def test_every_panel_is_kept_from_its_own_row(paint, strategy):
    """Seven later panels in calls of three: the last call is filled up, so that one compiled program serves all."""
    shots = (shot(0, 0), *(shot(number, 0, 1) for number in range(1, 8)))
    calls = paint(strategy, at_once=3)._calls(shots, PORTRAITS)
    kept = [(call.shots[row], panel) for call in calls for row, panel in enumerate(call.kept) if panel is not None]
    assert sorted(panel for _, panel in kept) == [-2, *range(8)]
    assert all(drawn is (shots[panel] if panel >= 0 else PORTRAITS[-1 - panel]) for drawn, panel in kept)
    reads = calls[1:] if strategy == "bank" else calls
    assert len(reads) == 3 and len({(len(call.shots), call.sharing.sees.shape) for call in reads}) == 1


def test_a_seed_for_the_tokens(paint, banked):
    """The seed of a story decides which tokens are shared, beside the noise of the panels."""
    painter = paint("bank")
    painter.seed = 4
    changed = distance(painter.paint(SHOTS, PORTRAITS).pictures, banked.pictures)
    assert changed[3] <= 1 and (changed[[0, 1, 2, 4]] > 5).all()


@pytest.mark.parametrize("strategy", [None, "bank", "joint"])
def test_memory_grows_with_the_panels(paint, strategy):
    """At least by the pictures that are kept; weights and everything of the largest call are in it."""
    painter = paint(strategy)
    short, long = painter.memory(SHOTS[:3], PORTRAITS), painter.memory(SHOTS, PORTRAITS)
    weights = sum(leaf.nbytes for part in painter.painter.params.values() for leaf in _leaves(part))
    assert long - short >= 2 * SIDE * SIDE * 3 and short > weights
    if strategy == "joint":
        assert long - short > 4 * 2 * SIDE * SIDE * 3


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def test_anchors_are_values():
    assert Anchor(0, SHOTS[0], 0) == Anchor(0, shot(0, 0), 0)
