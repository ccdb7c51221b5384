"""The shipped panel classifier: its file, and how well it reads panels that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.labelled_panels import HEADS, class_names, held_out_panels
from pixelstory_jax.evaluation.panel_classifier import (
    PANEL_CLASSIFIER,
    PanelClassifier,
    accuracy_table,
    confusion_table,
    head_accuracies,
    read_panel_classifier,
    write_panel_classifier,
)
from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.models.paths import flatten

WANTED = {"character": 0.99, "pose": 0.95, "place": 0.99}


@pytest.fixture(scope="module")
def classifier():
    return read_panel_classifier()


@pytest.fixture(scope="module")
def panels():
    return held_out_panels(400, seed=7, size=96)


@pytest.fixture(scope="module")
def read(classifier, panels):
    return classifier(panels["image"])


def test_the_file_is_small_and_says_its_classes(classifier):
    assert PANEL_CLASSIFIER.stat().st_size <= 600_000
    assert classifier.classes == class_names(builtin_cast())
    assert all(array.dtype == np.float16 for array in read_safetensors(PANEL_CLASSIFIER)[0].values())


def test_held_out_panels_are_read_right(read, panels):
    found = head_accuracies(read, panels)
    assert all(found[head] >= WANTED[head] for head in HEADS), found


def test_what_is_returned(read, classifier):
    assert read["features"].shape == (400, classifier.config.features)
    for head in HEADS:
        probability = read[f"{head}_probability"]
        assert read[head].shape == (400,) and read[head].dtype == np.int32
        assert probability.shape == (400, len(classifier.classes[head]))
        np.testing.assert_allclose(probability.sum(-1), 1, rtol=1e-5)
        np.testing.assert_array_equal(probability.argmax(-1), read[head])


def test_mirrored_panels_are_read_alike(classifier, panels, read):
    mirrored = classifier(panels["image"][:200, :, ::-1])
    for head in HEADS:
        assert (mirrored[head] == read[head][:200]).mean() >= WANTED[head] - 0.01, head


def test_any_number_of_panels(classifier, panels, read):
    for count in (0, 1, 65):
        part = classifier(panels["image"][:count])
        for name, values in part.items():
            assert values.shape == (count, *read[name].shape[1:])
            np.testing.assert_allclose(values, read[name][:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.zeros((2, 96, 96, 3)), np.zeros((96, 96, 3), np.uint8)])
def test_only_uint8_panels_are_read(classifier, bad):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, S, S, 3\]"):
        classifier(bad)


def test_written_and_read_again(classifier, tmp_path):
    path = tmp_path / "copy.safetensors"
    write_panel_classifier(path, classifier)
    again = read_panel_classifier(path)
    assert (again.config, again.classes) == (classifier.config, classifier.classes)
    for name, array in flatten(classifier.params).items():
        np.testing.assert_array_equal(flatten(again.params)[name], array)


def test_files_that_hold_no_classifier(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read_panel_classifier(tmp_path / "none.safetensors")
    arrays, metadata = read_safetensors(PANEL_CLASSIFIER)
    other = tmp_path / "other.safetensors"
    write_safetensors(other, arrays)
    with pytest.raises(WeightsError, match="not a panel classifier"):
        read_panel_classifier(other)
    name = sorted(arrays)[0]
    write_safetensors(other, {key: value for key, value in arrays.items() if key != name}, metadata)
    with pytest.raises(WeightsError, match="its arrays are not those of its sizes"):
        read_panel_classifier(other)


def test_words_must_fit_the_heads(classifier):
    with pytest.raises(ValueError, match="as many words for each"):
        PanelClassifier(classifier.config, classifier.params, {**classifier.classes, "pose": ("standing",)})


def test_tables():
    values = {"character": 1.0, "pose": 0.5, "place": 0.25}
    header, row = accuracy_table({"real": values}).splitlines()
    assert header.split() == ["panels", "character", "pose", "place"]
    assert row.split() == ["real", "1.0000", "0.5000", "0.2500"]
    rows = confusion_table(np.array([0, 1, 1]), np.array([0, 0, 1]), ("cat", "dog")).splitlines()
    assert [line.split() for line in rows] == [["cat", "dog"], ["cat", "1", "1"], ["dog", "0", "1"]]
