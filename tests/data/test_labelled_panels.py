"""Panels with labels, one by one: fixed by seed and number, and told apart by what they show."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.builtin.stories import plan_panel
from pixelstory_jax.data.labelled_panels import HEADS, LabelledPanels, class_names, held_out_panels, moved


def test_examples_are_fixed_by_seed_and_number():
    panels = LabelledPanels(seed=3, size=32, length=50)
    example = panels[7]
    assert len(panels) == 50 and set(example) == {"image", *HEADS}
    assert example["image"].shape == (32, 32, 3) and example["image"].dtype == np.uint8
    assert all(example[head].shape == () and example[head].dtype == np.int32 for head in HEADS)
    for name, value in LabelledPanels(seed=3, size=32, length=50)[7].items():
        np.testing.assert_array_equal(value, example[name])
    for other in (panels[8], LabelledPanels(seed=4, size=32, length=50)[7]):
        assert not np.array_equal(other["image"], example["image"])
    with pytest.raises(IndexError, match="example 50 of a source of 50"):
        panels[50]
    with pytest.raises(ValueError, match="at least 0, got -1"):
        LabelledPanels(seed=-1, size=32)


def test_all_classes_come_up():
    panels = LabelledPanels(seed=0, size=32)
    examples = [panels[index] for index in range(200)]
    for head, words in class_names(builtin_cast()).items():
        assert {int(example[head]) for example in examples} == set(range(len(words)))


def test_held_out_panels_are_others():
    training = LabelledPanels(seed=0, size=32)
    seen = {training[index]["image"].tobytes() for index in range(40)}
    held_out = held_out_panels(40, 0, 32)
    assert not seen & {image.tobytes() for image in held_out["image"]}
    assert all(held_out[head].shape == (40,) for head in HEADS)


def test_heights_do_not_tell_the_pose():
    """In stories a jump is always higher than a fall; in training a good part of the heights occur with both."""
    rng = np.random.default_rng(0)
    feet = {}
    for pose in ("jumping", "falling"):
        boxes = [plan_panel(rng, builtin_cast(), (0,), pose, "beach", "").boxes[0] for _ in range(300)]
        feet[pose] = np.array([moved(rng, box)[3] for box in boxes])
        assert len({box[3] for box in boxes}) == 1
    common = (feet["jumping"] > feet["falling"].min()).mean()
    assert common > 0.3 and feet["jumping"].mean() < feet["falling"].mean()


def test_moved_figures_stay_in_the_panel_and_keep_their_proportions():
    rng = np.random.default_rng(1)
    for box in [(0.1, 0.25, 0.6, 0.9), (0.0, 0.02, 0.9, 0.99), (0.4, 0.0, 0.6, 0.3)] * 100:
        x0, y0, x1, y1 = moved(rng, box)
        assert min(x0, y0) >= -1e-9 and max(x1, y1) <= 1 + 1e-9
        assert (x1 - x0) / (y1 - y0) == pytest.approx((box[2] - box[0]) / (box[3] - box[1]))
