"""Panels with labels, one by one: fixed by seed and number, and told apart by what they show."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.labelled_panels import HEADS, LabelledPanels, class_names, held_out_panels


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
