"""Whether stories keep their character: numbers from what a classifier reads in their panels. docs/story_metrics.md.

Letters: K stories, A panels of a story, N panels, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def same_character_share(character: np.ndarray) -> float:
    """Share of the pairs of panels within a story that show the same character, averaged over stories.

    Args:
      character: [K, A] number of the character in each panel, A at least 2.
    """
    character = _stories(character)
    panels = character.shape[1]
    if panels < 2:
        raise ValueError("Stories of one panel have no pairs; at least 2 panels are needed.")
    first, second = np.triu_indices(panels, k=1)
    return float((character[:, first] == character[:, second]).mean())


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of equal entries of two arrays of the same shape."""
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape or not predicted.size:
        raise ValueError(f"Predictions {predicted.shape} and truth {true.shape}; expected one shape that is not empty.")
    return float((predicted == true).mean())


def character_diversity(character: np.ndarray, characters: int) -> float:
    """How evenly stories choose their characters: 0 where all choose the same, 1 where all are chosen alike often.

    The entropy of the stories' most frequent characters, divided by log(characters). A story in which several
    characters are most frequent counts for each of them in equal parts.

    Args:
      character: [K, A] number of the character in each panel. characters: how many there are, at least 2.
    """
    character = _stories(character)
    if characters < 2 or character.min() < 0 or character.max() >= characters:
        raise ValueError(f"Numbers of characters must lie in 0..{characters - 1}, of at least 2 characters.")
    counts = (character[..., None] == np.arange(characters)).sum(1)  # [K, C]
    leads = counts == counts.max(1, keepdims=True)
    share = (leads / leads.sum(1, keepdims=True)).mean(0)
    chosen = share[share > 0]
    return float(-(chosen * np.log(chosen)).sum() / np.log(characters)) + 0.0  # + 0.0: no minus before a zero


def confusion_counts(predicted: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (rows) was taken for each (columns), [C, C] int64."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.ravel(true), np.ravel(predicted)), 1)
    return counts


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Squared Fréchet distance between normals with the mean and covariance of two sets of features, [N, F] each.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al. 2017 (arXiv 1706.08500, section 3). The trace of the
    root is that of the symmetric (R S2 R)^(1/2) with R the root of S1, whose eigenvalues are real and not negative:
    it stays exact where the covariances are singular.
    """
    features, others = (np.asarray(x, np.float64) for x in (features, others))
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise ValueError(f"Features {features.shape} and {others.shape}; expected [N, F] with the same F.")
    if min(len(features), len(others)) < 2:
        raise ValueError("A covariance needs at least 2 rows of features.")
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (features, others))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    shift = np.square(features.mean(0) - others.mean(0)).sum()
    return float(max(shift + np.trace(first) + np.trace(second) - 2 * shared, 0.0))


def bootstrap_error(statistic: Callable[..., float], *arrays: np.ndarray, draws: int = 1000, seed: int = 0) -> float:
    """Standard error of a statistic of stories: its deviation over random re-draws of the stories.

    Stories, not panels, are drawn (with replacement, as many as there are): the panels of a story are not independent.

    Args:
      statistic: of arrays like `arrays`. arrays: [K, ...] each, first axis stories.
    """
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths or draws < 2:
        raise ValueError("A standard error needs arrays with the same number of stories, and at least 2 draws.")
    count, rng = lengths.pop(), np.random.default_rng(seed)
    chosen = rng.integers(0, count, (draws, count))
    return float(np.std([statistic(*(np.asarray(array)[rows] for array in arrays)) for rows in chosen], ddof=1))


def _stories(character: np.ndarray) -> np.ndarray:
    character = np.asarray(character)
    if character.ndim != 2 or not character.size:
        raise ValueError(f"Characters of shape {character.shape}; expected [stories, panels], neither of them 0.")
    return character
