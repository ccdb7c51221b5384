"""Stories: the same for the same seed, what the panels say is what they show, and what the captions tell."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.builtin import story_wording
from pixelstory_jax.data.builtin.characters import Cast, builtin_cast
from pixelstory_jax.data.builtin.places import PLACES, draw_place
from pixelstory_jax.data.builtin.stories import StorySource, compose_panel, labelled_panels, plan_panel
from pixelstory_jax.data.builtin.story_wording import ACTIONS, MAX_WORDS, PLACE_WORDS

CAST = builtin_cast()


def encode(caption: str) -> np.ndarray:
    """One id a letter, padded to 100."""
    ids = np.zeros(100, np.int64)
    ids[: len(caption)] = [ord(letter) for letter in caption]
    return ids


def source(**changes) -> StorySource:
    return StorySource(CAST, encode, **{"seed": 5, "split": "train", **changes})


def text(tokens: np.ndarray) -> str:
    return "".join(chr(token) for token in tokens if token)


STORIES = [source().panels(index) for index in range(400)]
PANELS = [panel for story in STORIES for panel in story]


def test_examples_have_the_promised_arrays():
    stories = source(size=64, panels=3, length=10)
    example = stories[0]
    assert len(stories) == 10 and set(example) == {"images", "tokens"}
    assert example["images"].shape == (3, 64, 64, 3) and example["images"].dtype == np.uint8
    assert example["tokens"].shape == (3, 100) and example["tokens"].dtype == np.int32
    assert [text(row) for row in example["tokens"]] == [panel.caption for panel in stories.panels(0)]
    with pytest.raises(IndexError, match="story 10 does not exist"):
        stories[10]


def test_same_story_twice_and_another_for_other_arguments():
    first, again = source()[3], source()[3]
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for other in (source()[4], source(seed=6)[3], source(split="test")[3]):
        assert not np.array_equal(other["images"], first["images"])
        assert not np.array_equal(other["tokens"], first["tokens"])


def test_one_character_in_different_poses_and_places():
    for story in STORIES:
        shown = [panel for panel in story if panel.characters]
        assert len({panel.characters[0] for panel in shown}) <= 1
        assert len({panel.pose for panel in shown}) == len(shown)
        assert len({panel.place for panel in story}) == 4
    lengthy = source(panels=20, empty=0.0).panels(0)
    counts = [sum(panel.pose == pose for panel in lengthy) for pose in CAST.pose_words]
    assert counts == [4] * 5  # no pose comes again before all have come
    assert {panel.characters[0] for panel in PANELS if panel.characters} == set(range(6))
    assert {panel.place for panel in PANELS} == set(PLACES)
    assert {frame for panel in PANELS for frame in panel.frames} == set(CAST.sprites[0])


def test_shares_of_named_stories_and_of_panels_with_none_or_two():
    assert 0.04 < np.mean([len(panel.characters) == 0 for panel in PANELS]) < 0.08
    assert 0.07 < np.mean([len(panel.characters) == 2 for panel in PANELS]) < 0.13
    named = [any(names(panel, panel.characters[0]) for panel in story if panel.characters) for story in STORIES]
    assert 0.42 < np.mean(named) < 0.58
    every, none = source(named=1.0, empty=0, pairs=0), source(named=0.0, empty=0, pairs=0)
    for index in range(60):
        assert all(names(panel, panel.characters[0]) for panel in every.panels(index))
        assert not any(names(panel, number) for panel in none.panels(index) for number in range(6))


def names(panel, character: int) -> bool:
    """Whether the caption has the character's name, after whichever article."""
    return CAST.names[character].split(" ", 1)[1] in panel.caption


def test_captions_tell_what_is_shown():
    for panel in PANELS:
        caption = panel.caption
        assert caption == caption.lower() and len(caption.split()) <= MAX_WORDS
        assert caption.isascii() and not set(caption) - set("abcdefghijklmnopqrstuvwxyz ,-")
        words = PLACE_WORDS[panel.place]
        assert any(where in caption for where in (*words.where, words.empty))
        if panel.pose:
            assert any(form in caption for forms in ACTIONS[panel.pose] for form in forms)
        if len(panel.characters) == 2:
            assert names(panel, panel.characters[1]) and " and " in caption
            assert panel.characters[0] != panel.characters[1]
        told = {number for number in range(6) if names(panel, number)}
        assert told <= set(panel.characters)
    assert len({panel.caption for panel in PANELS}) > 1200


def test_no_phrase_of_one_pose_or_place_belongs_to_another():
    wheres = [where for words in PLACE_WORDS.values() for where in words.where]
    doings = [form for forms in ACTIONS.values() for pair in forms for form in pair]
    assert len(set(wheres)) == len(wheres) and len(set(doings)) == len(doings)


def test_plain_captions():
    assert story_wording.plain_caption(None, "walking", "beach") == "a character walking on a beach"
    assert story_wording.plain_caption("a robot", "climbing", "cave") == "a robot climbing in a cave"
    assert story_wording.definite("a girl in green") == "the girl in green"
    rng = np.random.default_rng(0)
    lengthy = "a very old and quite extraordinarily talkative wizard of the far away north"
    assert story_wording.caption(rng, lengthy, "walking", "beach") == f"{lengthy} walking on a beach"
    with pytest.raises(ValueError, match="unknown pose 'sleeping'"):
        story_wording.caption(rng, None, "sleeping", "beach")
    with pytest.raises(ValueError, match="unknown place 'school'"):
        story_wording.empty_caption(rng, "school")


def test_characters_are_where_the_panel_says():
    """Drawn over the empty place with the same random numbers, only the boxes and the shadows change."""
    for number, panel in enumerate(PANELS[:200]):
        empty = draw_place(panel.place, np.random.default_rng(number), 96)
        picture = compose_panel(CAST, panel, np.random.default_rng(number), 96)
        changed = (picture != empty).any(-1)
        inside = np.zeros_like(changed)
        for x0, y0, x1, y1 in panel.boxes:
            assert 0 < x0 < x1 < 1 and 0 < y0 < y1 < 1
            top, bottom, left, right = (round(edge * 96) for edge in (y0, y1, x0, x1))
            assert changed[top:bottom, left:right].mean() > 0.4
            inside[top : bottom + 4, left - 1 : right + 1] = True
        assert not (changed & ~inside).any()
        assert changed.any() == bool(panel.characters)


def test_heights_and_ground():
    for panel in PANELS:
        for x0, y0, x1, y1 in panel.boxes:
            assert 0.46 < y1 - y0 < 0.9
            if len(panel.boxes) == 1:
                assert y1 - y0 > 0.53 and x1 - x0 > 0.3
            if panel.pose in ("standing", "walking"):
                assert 0.88 < y1 < 0.95
    feet = {pose: np.mean([p.boxes[0][3] for p in PANELS if p.pose == pose]) for pose in CAST.pose_words}
    assert feet["jumping"] < feet["walking"] - 0.04 and feet["climbing"] < feet["standing"] - 0.02
    heights = [p.boxes[0][3] - p.boxes[0][1] for p in PANELS if p.pose == "standing" and len(p.boxes) == 1]
    assert 0.62 < np.median(heights) < 0.8
    centres = [(p.boxes[0][0] + p.boxes[0][2]) / 2 for p in PANELS if len(p.boxes) == 1]
    np.testing.assert_allclose(centres, 0.5, atol=1e-9)
    assert 0.4 < np.mean([flip for panel in PANELS for flip in panel.flips]) < 0.6


def test_colours_do_not_bleed_at_the_edge():
    """Against each premultiplied channel resampled by itself; what lies under transparent pixels never shows."""
    y, x = np.mgrid[:64, :64] + 0.5
    alpha = np.clip((29.5 - np.hypot(y - 32, x - 32)) * 85, 0, 255).astype(np.uint8)
    disc = np.stack([np.full_like(alpha, 200), 120 + x.astype(np.uint8), np.full_like(alpha, 40), alpha], -1)
    disc[alpha == 0] = (0, 255, 0, 0)
    cast = Cast(("a disc",), ({"still": disc},), ({"jumping": ("still",)},), 60)
    panel = plan_panel(np.random.default_rng(0), cast, (0,), "jumping", "moon", "")
    expected = draw_place("moon", np.random.default_rng(1), 96).astype(np.float32)
    x0, y0, x1, y1 = (round(edge * 96) for edge in panel.boxes[0])
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    part = disc[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    part[..., :3] *= part[..., 3:] / 255
    channels = [Image.fromarray(part[..., c]).resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS) for c in range(4)]
    scaled = np.clip(np.stack([np.asarray(channel) for channel in channels], -1), 0, 255)
    if panel.flips[0]:
        scaled = scaled[:, ::-1]
    window = expected[y0:y1, x0:x1]
    window[:] = np.minimum(scaled[..., :3], scaled[..., 3:]) + window * (1 - scaled[..., 3:] / 255)
    picture = compose_panel(cast, panel, np.random.default_rng(1), 96)
    # Pillow rounds and clips to whole numbers between its two passes; a fringe is off by more than ten.
    assert np.abs(picture - expected).max() < 5


def test_labelled_panels():
    images, characters, poses, places = labelled_panels(CAST, 300, 1, "train", 48)
    assert images.shape == (300, 48, 48, 3) and images.dtype == np.uint8
    for labels, classes in ((characters, 6), (poses, 5), (places, 12)):
        assert labels.shape == (300,) and labels.dtype == np.int32 and set(labels) == set(range(classes))
        assert np.bincount(labels).max() < 2.2 * 300 / classes
    again = labelled_panels(CAST, 20, 1, "train", 48)
    np.testing.assert_array_equal(again[0], images[:20])
    np.testing.assert_array_equal(again[2], poses[:20])
    other = labelled_panels(CAST, 20, 1, "test", 48)
    assert not {image.tobytes() for image in other[0]} & {image.tobytes() for image in images}
    with pytest.raises(ValueError, match="at least one panel"):
        labelled_panels(CAST, 0, 1, "train", 48)
    with pytest.raises(ValueError, match="unknown split 'unseen'"):
        labelled_panels(CAST, 2, 1, "unseen", 48)


def test_labels_are_those_of_the_pictures():
    """The classes can be learned from pictures: nearest mean of thumbnails finds places far above chance."""
    images, characters, _, places = labelled_panels(CAST, 500, 2, "train", 48)
    held_out, held_characters, _, held_places = labelled_panels(CAST, 200, 2, "test", 48)

    def right(labels, held_labels, features):
        means = np.stack([features(images)[labels == label].mean(0) for label in range(labels.max() + 1)])
        guess = np.abs(features(held_out)[:, None] - means).mean(-1).argmin(-1)
        return (guess == held_labels).mean()

    thumbnail = lambda pictures: pictures.reshape(-1, 8, 6, 8, 6, 3).mean((2, 4)).reshape(len(pictures), -1)  # noqa: E731

    # Colours of the middle of the picture, as a coarse histogram: enough to tell clothes and skins apart.
    def colours(pictures):
        middle = pictures[:, 8:44, 10:38].reshape(len(pictures), -1, 3) // 32
        cells = middle[..., 0] * 64 + middle[..., 1].astype(int) * 8 + middle[..., 2]
        return np.sqrt(np.stack([np.bincount(row, minlength=512) for row in cells]).astype(np.float32))

    assert right(places, held_places, thumbnail) > 0.9
    assert right(characters, held_characters, colours) > 0.5


def test_characters_with_other_poses_and_sizes():
    sprite = np.full((72, 40, 4), 255, np.uint8)
    cast = Cast(
        ("an ogre", "a bat"),
        ({"a": np.full((300, 20, 4), 255, np.uint8)}, {"fly": sprite, "bite": sprite[:20]}),
        ({"attacking": ("a",)}, {"flying": ("fly",), "attacking": ("bite",)}),
        50,
    )
    stories = StorySource(cast, encode, seed=0, split="train", size=48, pairs=0.5)
    for index in range(20):
        assert stories[index]["images"].shape == (4, 48, 48, 3)
        for panel in stories.panels(index):
            assert all(panel.pose in cast.poses[number] for number in panel.characters)
            assert all(0 < x0 < x1 < 1 and 0 < y0 < y1 < 1 for x0, y0, x1, y1 in panel.boxes)
    with pytest.raises(ValueError, match="'an ogre' has no frame of the pose 'flying'"):
        plan_panel(np.random.default_rng(0), cast, (0,), "flying", "moon", "")
    with pytest.raises(ValueError, match="one or two characters, got 3"):
        plan_panel(np.random.default_rng(0), cast, (0, 1, 0), "attacking", "moon", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "unseen"}, "unknown split 'unseen', expected one of train, test"),
        ({"seed": -1}, "seed -1"),
        ({"panels": 0}, "panels 0"),
        ({"length": 0}, "length 0"),
        ({"named": 1.5}, "named 1.5"),
        ({"empty": 0.7, "pairs": 0.5}, "empty 0.7, pairs 0.5"),
        ({"pairs": -0.1}, "pairs -0.1"),
    ],
)
def test_odd_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        source(**change)


def test_panels_are_made_fast():
    stories = source()
    stories[0]
    started = time.process_time()
    for index in range(1, 31):
        stories[index]
    # 1.4 ms a panel on a desktop core; the limit leaves room for slow and busy machines.
    assert (time.process_time() - started) / 120 < 0.01
