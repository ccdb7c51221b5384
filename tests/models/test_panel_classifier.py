"""The network that reads panels: sizes, shapes, and what it must not depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.models.panel_classifier import PanelClassifier, PanelClassifierConfig
from pixelstory_jax.models.paths import flatten

SMALL = PanelClassifierConfig(characters=6, poses=5, places=12, channels=(8, 16), features=10, groups=4)


@pytest.fixture(scope="module")
def small():
    model = PanelClassifier(SMALL)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.jit(lambda images: model.apply(params, images))


def test_size_and_shapes_of_the_default():
    model = PanelClassifier(PanelClassifierConfig(characters=6, poses=5, places=12))
    images = jax.ShapeDtypeStruct((2, 96, 96, 3), jnp.float32)
    reading, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert [x.shape for x in reading] == [(2, 6), (2, 5), (2, 12), (2, 64)]
    assert all(x.dtype == jnp.float32 for x in reading)
    count = sum(np.prod(leaf.shape) for leaf in flatten(variables["params"]).values())
    assert 100_000 < count < 300_000


def test_panels_do_not_influence_each_other(small):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    together = small(images)
    for number in range(3):
        alone = small(np.broadcast_to(images[number], images.shape))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[number], rtol=1e-4, atol=1e-5)


def test_a_figure_is_read_alike_wherever_it_stands(small):
    """Apart from the edges, and by steps of the last map: positions are pooled away."""
    figure = np.random.default_rng(1).uniform(-1, 1, (8, 8, 3))
    size, step = 96, SMALL.reduction
    images = np.zeros((2, size, size, 3), np.float32)
    for image, column in zip(images, (40, 40 + 2 * step), strict=True):
        image[40:48, column : column + 8] = figure
    reading = small(images)
    empty = small(np.zeros((1, size, size, 3), np.float32))
    np.testing.assert_allclose(reading.features[0], reading.features[1], atol=1e-5)
    assert np.abs(reading.features[0] - empty.features[0]).max() > 1e-3


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="channels \\[12\\] are not multiples of groups 8"):
        PanelClassifierConfig(6, 5, 12, channels=(16, 12))
    with pytest.raises(ValueError, match="poses is 0; at least 1 is needed"):
        PanelClassifierConfig(6, 0, 12)
    with pytest.raises(ValueError, match="channels is \\(\\); at least one level"):
        PanelClassifierConfig(6, 5, 12, channels=())


@pytest.mark.parametrize("shape", [(1, 30, 32, 3), (1, 32, 32, 4), (32, 32, 3)])
def test_pictures_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="sides in multiples of 4"):
        jax.eval_shape(PanelClassifier(SMALL).init, jax.random.key(0), jnp.zeros(shape))
