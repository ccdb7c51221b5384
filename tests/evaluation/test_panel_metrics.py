"""Metrics of stories: worked out by hand, against SciPy, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from pixelstory_jax.evaluation.panel_metrics import (
    accuracy,
    bootstrap_error,
    character_diversity,
    confusion_counts,
    frechet_distance,
    same_character_share,
)


def test_pairs_with_the_same_character():
    assert same_character_share(np.array([[2, 2, 2, 2]])) == 1
    assert same_character_share(np.array([[0, 1, 2, 3]])) == 0
    assert same_character_share(np.array([[0, 0, 0, 1]])) == 3 / 6
    assert same_character_share(np.array([[0, 0, 1, 1]])) == 2 / 6
    assert same_character_share(np.array([[5, 5], [1, 2], [3, 3], [4, 4]])) == 3 / 4


def test_independent_picks_agree_as_often_as_chance_says():
    picks = np.random.default_rng(0).integers(0, 6, (20_000, 4))
    assert same_character_share(picks) == pytest.approx(1 / 6, abs=0.005)


@pytest.mark.parametrize("bad", [np.zeros((3, 1), int), np.zeros(4, int), np.zeros((0, 4), int)])
def test_pairs_need_stories_of_two_panels(bad):
    with pytest.raises(ValueError, match="at least 2 panels are needed|expected \\[stories, panels\\]"):
        same_character_share(bad)


def test_accuracy():
    assert accuracy([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    with pytest.raises(ValueError, match="expected one shape"):
        accuracy([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not empty"):
        accuracy([], [])


def test_diversity_of_characters():
    assert character_diversity(np.array([[3, 3, 3, 1]] * 5), 6) == 0
    even = np.repeat(np.arange(6), 3)[:, None].repeat(4, axis=1)
    assert character_diversity(even, 6) == pytest.approx(1)
    halves = np.array([[0, 0, 0, 5], [4, 4, 1, 4]])  # majorities 0 and 4
    assert character_diversity(halves, 6) == pytest.approx(np.log(2) / np.log(6))
    assert character_diversity(halves, 8) == pytest.approx(np.log(2) / np.log(8))


def test_a_tie_of_a_story_counts_for_all_that_lead():
    """One story that is half 0 and half 1, one of 2 only: shares 1/4, 1/4, 1/2."""
    shares = np.array([1 / 4, 1 / 4, 1 / 2])
    expected = -(shares * np.log(shares)).sum() / np.log(3)
    assert character_diversity(np.array([[0, 1, 1, 0], [2, 2, 2, 0]]), 3) == pytest.approx(expected)


def test_diversity_refuses_numbers_of_no_character():
    with pytest.raises(ValueError, match=r"must lie in 0..2"):
        character_diversity(np.array([[0, 3]]), 3)
    with pytest.raises(ValueError, match="at least 2 characters"):
        character_diversity(np.array([[0, 0]]), 1)


def test_confusion():
    counts = confusion_counts(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def features(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


@pytest.mark.parametrize("width", [1, 3, 16])
def test_frechet_distance_against_scipy(width):
    rng = np.random.default_rng(width)
    a, b = features(rng, 200, width), features(rng, 150, width)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_one_set_to_itself_and_moved():
    a = features(np.random.default_rng(1), 100, 8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(8 * 9)


def test_frechet_distance_of_singular_covariances():
    """Fewer rows than features, and features that are always zero, as silent units are."""
    rng = np.random.default_rng(2)
    a, b = features(rng, 10, 32), features(rng, 12, 32)
    a[:, 5] = b[:, 5] = 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # The singular values of the product of the centred sets are the root's eigenvalues: no root of a matrix needed.
    left, right = (x - x.mean(0) for x in (a, b))
    shared = np.linalg.svd(left @ right.T, compute_uv=False).sum() / np.sqrt(9 * 11)
    spread = np.square(left).sum() / 9 + np.square(right).sum() / 11
    expected = np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * shared
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_refuses_sets_that_do_not_fit():
    with pytest.raises(ValueError, match="with the same F"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))


def test_standard_error_of_a_mean_is_its_formula():
    values = np.random.default_rng(3).normal(size=400)
    expected = values.std() / np.sqrt(len(values))
    assert bootstrap_error(np.mean, values, draws=4000) == pytest.approx(expected, rel=0.05)


def test_standard_error_draws_stories_and_keeps_arrays_together():
    truth = np.arange(12).reshape(6, 2)
    assert bootstrap_error(accuracy, truth, truth) == 0  # rows drawn apart would not match
    # Panels of a story agree with each other: the error is that of 50 stories, not of 200 panels.
    right = np.repeat(np.arange(50) % 2, 4).reshape(50, 4)
    error = bootstrap_error(accuracy, right, np.ones_like(right), draws=4000)
    assert error == pytest.approx(0.5 / np.sqrt(50), rel=0.05)
    assert error == bootstrap_error(accuracy, right, np.ones_like(right), draws=4000)


def test_standard_error_refuses_arrays_of_other_stories():
    with pytest.raises(ValueError, match="same number of stories"):
        bootstrap_error(accuracy, np.zeros((3, 2)), np.zeros((4, 2)))
