"""The autoencoder: published sizes, parity with diffusers, both directions of its table, what it refuses."""

from __future__ import annotations

import json
from math import prod

import jax
import numpy as np
import pytest

from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_AUTOENCODER, read_tiny_autoencoder
from pixelstory_jax.interop.autoencoder_table import (
    autoencoder_config,
    autoencoder_settings,
    autoencoder_shapes,
    autoencoder_table,
    current_names,
    read_autoencoder,
    read_autoencoder_file,
    write_autoencoder_file,
)
from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tensors import FileTensor, WeightsError
from pixelstory_jax.interop.torch_layout import to_torch_tensors, torch_shapes
from pixelstory_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    byte_pixels,
    posterior_sample,
    scale_latents,
    signed_pixels,
    unscale_latents,
)

SMALL = AutoencoderConfig(block_channels=(8, 16, 16), layers_per_block=1, latent_channels=3, groups=4)


def drawn_params(config: AutoencoderConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, autoencoder_shapes(config))


@pytest.mark.parametrize("config", [AutoencoderConfig.sd15(), AutoencoderConfig.sdxl()], ids=["sd15", "sdxl"])
def test_published_sizes(config):
    shapes = torch_shapes(autoencoder_table(config), autoencoder_shapes(config))
    assert len(shapes) == 248
    assert sum(map(prod, shapes.values())) == 83_653_863
    assert shapes["encoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.bias"] == (4,)


def test_published_scales():
    assert AutoencoderConfig.sd15().scaling_factor == 0.18215
    assert AutoencoderConfig.sdxl().scaling_factor == 0.13025


def test_scaling_and_pixels():
    latents = np.array([2.0], np.float32)
    scaled = scale_latents(latents, AutoencoderConfig.sdxl())
    np.testing.assert_allclose(scaled, [0.2605], rtol=1e-6)
    np.testing.assert_allclose(unscale_latents(scaled, AutoencoderConfig.sdxl()), latents, rtol=1e-6)
    pixels = np.arange(256, dtype=np.uint8)
    assert signed_pixels(pixels).min() == -1 and signed_pixels(pixels).max() == 1
    np.testing.assert_array_equal(byte_pixels(signed_pixels(pixels)), pixels)
    np.testing.assert_array_equal(byte_pixels(np.array([-1.5, 1.5], np.float32)), [0, 255])


def test_posterior_sample():
    mean, logvar = np.array([1.0, 1.0], np.float32), np.log(np.array([4.0, 0.25], np.float32))
    np.testing.assert_allclose(posterior_sample(mean, logvar, np.array([1.0, -2.0])), [3, 0], atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_parity_with_diffusers(layers):
    """Distribution, decoded picture and gradients of pictures that are not square."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from tests.models.test_torch_parity import assert_same_gradients, numpy_state, randomise

    config = AutoencoderConfig(block_channels=(8, 16, 16), layers_per_block=layers, latent_channels=3, groups=4)
    settings = {name: value for name, value in autoencoder_settings(config).items() if name != "_class_name"}
    theirs = diffusers.AutoencoderKL(**settings)
    randomise(theirs)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    noise = rng.standard_normal((2, 4, 6, 3)).astype(np.float32)

    def first(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x).permute(0, 3, 1, 2)

    posterior = theirs.encode(first(images)).latent_dist
    decoded = theirs.decode(posterior.mean + posterior.std * first(noise)).sample
    (decoded.pow(2).mean() + posterior.mean.pow(2).mean() + posterior.logvar.mean()).backward()

    model, params = Autoencoder(config), read_autoencoder(config, numpy_state(theirs))

    @jax.jit
    def loss(params):
        ours = model.apply({"params": params}, images, noise)
        return (ours[0] ** 2).mean() + (ours[1] ** 2).mean() + ours[2].mean(), ours

    (_, ours), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    for value, expected in zip(ours, (decoded, posterior.mean, posterior.logvar), strict=True):
        expected = expected.detach().permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())
    assert_same_gradients(theirs, autoencoder_table(config), gradients)


def test_the_log_variance_is_clipped():
    params = drawn_params(SMALL)
    for bias, limit in ((1e3, 20), (-1e3, -30)):
        params["moments"]["bias"] = np.full(6, bias, np.float32)
        _, logvar = Autoencoder(SMALL).apply({"params": params}, np.zeros((1, 4, 4, 3)), method=Autoencoder.encode)
        assert np.all(logvar == limit)


@pytest.mark.slow
def test_half_precision_is_close():
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    noise = np.zeros((1, 4, 4, 3), np.float32)
    params = drawn_params(SMALL)
    exact = Autoencoder(SMALL).apply({"params": params}, images, noise)
    half = Autoencoder(AutoencoderConfig(**{**vars(SMALL), "dtype": "bfloat16"}))
    for value, expected in zip(half.apply({"params": params}, images, noise), exact, strict=True):
        assert value.dtype == np.float32
        assert 0 < np.abs(value - expected).max() < 0.1 * np.abs(expected).max()


def test_both_directions_of_the_table():
    params = drawn_params(SMALL)
    tensors = to_torch_tensors(autoencoder_table(SMALL), params)
    jax.tree.map(np.testing.assert_array_equal, read_autoencoder(SMALL, tensors), params)
    incomplete = {key: value for key, value in tensors.items() if key != "quant_conv.bias"}
    with pytest.raises(WeightsError, match=r"missing: quant_conv.bias \[6\]"):
        read_autoencoder(SMALL, incomplete)


def test_older_names_of_the_attention():
    """As in files of 2022: query, key, value and proj_attn, as matrices or as 1 x 1 kernels."""
    params = drawn_params(SMALL)
    tensors = to_torch_tensors(autoencoder_table(SMALL), params)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in tensors.items():
        for ours, theirs in names.items():
            key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        old[key] = value[:, :, None, None] if key.endswith(("key.weight", "proj_attn.weight")) else value
    assert old.keys() - tensors.keys() and set(current_names(old)) == set(tensors)
    unread = {key: FileTensor(value.shape, value.dtype, pytest.fail) for key, value in old.items()}
    renamed = current_names(unread)  # reads nothing
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in tensors.items()}
    of_a_file = {key: FileTensor(value.shape, value.dtype, lambda value=value: value) for key, value in old.items()}
    jax.tree.map(np.testing.assert_array_equal, read_autoencoder(SMALL, of_a_file), params)
    jax.tree.map(np.testing.assert_array_equal, read_autoencoder(SMALL, old), params)


def test_settings_there_and_back():
    settings = json.loads(json.dumps(autoencoder_settings(SMALL)))
    assert autoencoder_config(settings) == SMALL
    assert autoencoder_config(settings, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match="setting shift_factor is 0.1; only None is known"):
        autoencoder_config({**settings, "shift_factor": 0.1})
    with pytest.raises(ValueError, match="down_block_types has AttnDownEncoderBlock2D; only DownEncoderBlock2D"):
        autoencoder_config({**settings, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]})


def test_file(tmp_path):
    path, params = tmp_path / "autoencoder.safetensors", drawn_params(SMALL)
    write_autoencoder_file(path, SMALL, params, "a run")
    config, read = read_autoencoder_file(path)
    assert config == SMALL
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), read, params)
    tensors, metadata = read_safetensors(path)
    assert metadata["trained_by"] == "a run" and {value.dtype for value in tensors.values()} == {np.dtype(np.float16)}
    write_safetensors(path, tensors)
    with pytest.raises(WeightsError, match="its metadata hold no settings of an autoencoder"):
        read_autoencoder_file(path)


def test_shipped_file():
    """Small, in unit scale, and loadable by diffusers' own class (its keys are those of the table)."""
    assert TINY_AUTOENCODER.stat().st_size <= 4_000_000
    config, params = read_tiny_autoencoder()
    assert config == AutoencoderConfig.tiny(scaling_factor=config.scaling_factor)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_channels": ()}, "at least one level"),
        ({"block_channels": (8, 10)}, r"\[10\] are not multiples of groups 4"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{**vars(SMALL), **changes})


def test_shapes_that_are_refused():
    model, params = Autoencoder(SMALL), drawn_params(SMALL)
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 3\] with sides in multiples of 4"):
        model.apply({"params": params}, np.zeros((1, 16, 18, 3)), method=Autoencoder.encode)
    with pytest.raises(ValueError, match=r"expected \[B, h, w, 3\]"):
        model.apply({"params": params}, np.zeros((1, 4, 4, 4)), method=Autoencoder.decode)
