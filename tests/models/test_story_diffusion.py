"""StoryDiffusion as a whole: parts that fit together, text of both encoders, latents and pictures."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pixelstory_jax.models.autoencoder import Autoencoder, AutoencoderConfig, signed_pixels
from pixelstory_jax.models.clip_text import ClipText, ClipTextConfig
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from tests.models.small import random_like

TEXT = ClipTextConfig(vocab=20, length=6, width=8, layers=2, heads=2, mlp_width=8)
TEXT_2 = dataclasses.replace(TEXT, width=12, heads=3, activation="gelu", projection=6)
AUTOENCODER = AutoencoderConfig(block_channels=(4, 4), layers_per_block=1, groups=2, scaling_factor=0.5)
UNET = UNetConfig(
    channels=(4, 8), depths=(0, 1), heads=(1, 2), layers_per_block=1, context_width=20, pooled_width=6, groups=2
)
TWO = StoryDiffusionConfig(UNET, AUTOENCODER, TEXT, TEXT_2, text_layer=-2)
ONE = StoryDiffusionConfig(dataclasses.replace(UNET, context_width=8, pooled_width=0), AUTOENCODER, TEXT)
TOKENS = np.random.default_rng(0).integers(3, 20, (3, 6)).astype(np.int32)


def params_of(config: StoryDiffusionConfig):
    return random_like(jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0)))


def test_parts():
    assert set(params_of(ONE)) == {"unet", "autoencoder", "text"}
    two = params_of(TWO)
    assert set(two) == {"unet", "autoencoder", "text", "text_2"}
    assert "projection" in two["text_2"] and "projection" not in two["text"]
    assert "added_embedding" in two["unet"] and "added_embedding" not in params_of(ONE)["unet"]


def test_text_of_one_encoder():
    """The last states, with the final norm, and no pooled vector."""
    params = params_of(ONE)
    context, pooled = StoryDiffusion(ONE).encode_text(params, {"text": TOKENS})
    assert pooled is None
    np.testing.assert_array_equal(context, ClipText(TEXT).apply({"params": params["text"]}, TOKENS).states)


def test_text_of_two_encoders():
    """The last but one states side by side, and the projected vector of the second encoder."""
    params = params_of(TWO)
    tokens = {"text": TOKENS, "text_2": TOKENS[:, ::-1]}
    context, pooled = StoryDiffusion(TWO).encode_text(params, tokens)
    first, second = (
        ClipText(config).apply({"params": params[name]}, tokens[name], layer=-2)
        for name, config in (("text", TEXT), ("text_2", TEXT_2))
    )
    assert context.shape == (3, 6, 20)
    np.testing.assert_array_equal(context[..., :8], first.states)
    np.testing.assert_array_equal(context[..., 8:], second.states)
    np.testing.assert_array_equal(pooled, second.pooled)


def test_pictures_and_latents():
    """Latents are scaled on the way in and back on the way out; a draw differs from the mean by its noise."""
    model, params = StoryDiffusion(ONE), params_of(ONE)
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    noise = np.ones((2, 3, 4, 4), np.float32)
    variables = {"params": params["autoencoder"]}
    mean, logvar = Autoencoder(AUTOENCODER).apply(variables, signed_pixels(images), method=Autoencoder.encode)
    np.testing.assert_allclose(model.encode_images(params, images), 0.5 * mean, rtol=1e-5, atol=1e-6)
    drawn = model.encode_images(params, images, noise)
    np.testing.assert_allclose(drawn, 0.5 * (mean + np.exp(0.5 * logvar)), rtol=1e-5, atol=1e-6)
    decoded = Autoencoder(AUTOENCODER).apply(variables, mean, method=Autoencoder.decode)
    np.testing.assert_allclose(model.decode_latents(params, 0.5 * mean), decoded, rtol=1e-5, atol=1e-5)


def test_size_of_latents():
    assert StoryDiffusionConfig.sdxl().latent_size(768, 1024) == (96, 128)
    assert ONE.latent_size(6, 8) == (3, 4)
    with pytest.raises(ValueError, match=r"^Pictures of 100 x 96 pixels: sides must be multiples of 8\.$"):
        StoryDiffusionConfig.sd15().latent_size(100, 96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_2": None}, "The text states are 8 wide, unet.context_width is 20"),
        ({"text_2": dataclasses.replace(TEXT_2, projection=5)}, "The pooled text is 5 wide, unet.pooled_width is 6"),
        (
            {"autoencoder": dataclasses.replace(AUTOENCODER, latent_channels=3)},
            "autoencoder.latent_channels is 3, unet.in_channels is 4",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TWO, **changes)
