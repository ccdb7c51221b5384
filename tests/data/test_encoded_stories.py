"""Stories whose pictures become latents once: the autoencoder's moments, fresh draws, and no second drawing."""

from __future__ import annotations

import numpy as np
import pytest

from pixelstory_jax.data import build_source
from pixelstory_jax.data.encoded_stories import EncodedStories
from pixelstory_jax.models.autoencoder import Autoencoder, scale_latents, signed_pixels
from tests.story_sizes import SIZES, smallest_story_config, story_params


class Counted:
    """A source that counts what it is asked for."""

    def __init__(self) -> None:
        self.source, self.asked = build_source(smallest_story_config(), "train"), []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.asked.append(index)
        return self.source[index]


@pytest.fixture(scope="module")
def source() -> Counted:
    return Counted()


@pytest.fixture(scope="module")
def encoded(source) -> EncodedStories:
    return EncodedStories(source, SIZES.autoencoder, story_params()["autoencoder"], count=3, seed=5)


def test_examples_are_draws_of_what_the_autoencoder_says(source, encoded):
    """Index i is another draw of story i % count; the same one whenever it is asked for."""
    first, again, later = encoded[1], encoded[1], encoded[1 + 3]
    original = source.source[1]
    assert first.keys() == {"latents", "tokens"} and first["latents"].dtype == np.float16
    for example in (first, again, later):
        np.testing.assert_array_equal(example["tokens"], original["tokens"])
    np.testing.assert_array_equal(first["latents"], again["latents"])
    mean, logvar = Autoencoder(SIZES.autoencoder).apply(
        {"params": story_params()["autoencoder"]}, signed_pixels(original["images"]), method=Autoencoder.encode
    )
    mean, std = scale_latents(mean, SIZES.autoencoder), scale_latents(np.exp(0.5 * logvar), SIZES.autoencoder)
    normal = [(example["latents"] - mean) / std for example in (first, later)]
    assert all(abs(np.mean(noise)) < 0.1 and abs(np.std(noise) - 1) < 0.1 for noise in normal)
    assert np.abs(normal[0] - normal[1]).max() > 0.5
    other = EncodedStories(source, SIZES.autoencoder, story_params()["autoencoder"], count=3, seed=6)
    assert np.abs(other[1]["latents"] - first["latents"]).max() > 1e-3


def test_a_story_is_drawn_once(source, encoded):
    fresh = EncodedStories(source, SIZES.autoencoder, story_params()["autoencoder"], count=3, seed=5)
    source.asked.clear()
    for index in (0, 2, 3, 5, 999):
        fresh[index]
    assert source.asked == [0, 2] and len(fresh) == len(source)


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1001, 0), (1, -1)])
def test_numbers_that_are_refused(source, count, seed):
    with pytest.raises(ValueError, match="cannot be encoded with seed"):
        EncodedStories(source, SIZES.autoencoder, {}, count, seed)


def test_an_index_that_does_not_exist(encoded):
    with pytest.raises(IndexError, match="story 1000 does not exist, there are 1000"):
        encoded[1000]


def test_only_for_the_shipped_autoencoder():
    config = smallest_story_config()
    config.data.encoded = 4
    config.init_from = "a folder"
    with pytest.raises(ValueError, match="data.encoded is for config.init_from=tiny_autoencoder; set it to 0."):
        build_source(config, "train")
