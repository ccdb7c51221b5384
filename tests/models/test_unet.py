"""The U-Net: live parity with diffusers, both directions of its table, published settings, FreeU, what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import read_torch_tensors, to_torch_tensors, torch_shapes
from pixelstory_jax.interop.unet_table import config_from_diffusers, unet_settings, unet_table
from pixelstory_jax.models.layers import REMATS
from pixelstory_jax.models.unet import FreeU, TransformerStack, UNet, UNetConfig, scale_low_frequencies, sinusoids
from tests.golden_cases.unet import nchw, nhwc, unet_shapes
from tests.models.small import random_like

SMALL_SDXL = UNetConfig(
    channels=(8, 16, 24),
    depths=(0, 1, 2),
    heads=(2, 4, 3),
    layers_per_block=1,
    context_width=12,
    pooled_width=10,
    time_id_width=8,
    groups=4,
)
SMALL_SD15 = UNetConfig.sd15(
    channels=(8, 16, 24), depths=(1, 1, 0), heads=(2, 2, 2), context_width=12, in_channels=3, out_channels=5, groups=4
)
SMALLEST = UNetConfig.sd15(
    channels=(8, 16), depths=(1, 1), heads=(2, 2), layers_per_block=1, context_width=12, groups=4
)  # shares at two resolutions
SHALLOW = dataclasses.replace(SMALL_SDXL, channels=(8, 16), depths=(0, 2), heads=(2, 4))
SIZE = (10, 7)  # not square, and odd at the second resolution already: 10 x 7, 5 x 4, 3 x 2


# Compiles in half the time; the results are the same, only slower.
quickly_compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def unet_inputs(config: UNetConfig, size: tuple[int, int], images: int, seed: int = 0) -> dict[str, Any]:
    """Latents, times, context and added conditions of a call."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Any] = {
        "latents": rng.standard_normal((images, *size, config.in_channels)).astype(np.float32),
        "timesteps": np.linspace(1, 981, images).astype(np.float32),
        "context": rng.standard_normal((images, 5, config.context_width)).astype(np.float32),
        "added": None,
    }
    if config.pooled_width:
        inputs["added"] = {
            "pooled": rng.standard_normal((images, config.pooled_width)).astype(np.float32),
            "time_ids": rng.integers(0, 1024, (images, 6)).astype(np.float32),
        }
    return inputs


@functools.cache
def random_unet(config: UNetConfig) -> Any:
    return random_like(unet_shapes(config))


def their_unet(config: UNetConfig):
    diffusers = pytest.importorskip("diffusers")
    from tests.models.test_torch_parity import randomise

    theirs = diffusers.UNet2DConditionModel.from_config(unet_settings(config)).eval()
    randomise(theirs)
    return theirs


def their_output(theirs, inputs: dict[str, Any]):
    """[B, C, H, W] of diffusers' network."""
    import torch

    tensors = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), inputs)
    added = tensors["added"] and {"text_embeds": tensors["added"]["pooled"], "time_ids": tensors["added"]["time_ids"]}
    latents = tensors["latents"].permute(0, 3, 1, 2)
    return theirs(latents, tensors["timesteps"], tensors["context"], added_cond_kwargs=added).sample


@pytest.mark.parametrize("config", [SMALL_SDXL, SMALL_SD15], ids=["sdxl", "sd15"])
def test_parity_with_diffusers(config):
    """Another time for every image; then the way back to their tensors, bit for bit."""
    pytest.importorskip("torch")
    from tests.models.test_torch_parity import numpy_state

    theirs, inputs = their_unet(config), unet_inputs(config, SIZE, 3)
    expected = their_output(theirs, inputs).detach().numpy()
    state, table = numpy_state(theirs), unet_table(config)
    assert config_from_diffusers(theirs.config) == config
    params = read_torch_tensors(table, state, unet_shapes(config))
    out, bank = quickly_compiled(lambda params: UNet(config).apply({"params": params}, **inputs))(params)
    np.testing.assert_allclose(nchw(out), expected, atol=1e-5 * np.abs(expected).max())
    assert bank == {}

    written = to_torch_tensors(table, params)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_gradients_of_diffusers():
    """Of every parameter, through both added conditions and all kinds of blocks."""
    pytest.importorskip("torch")
    from tests.models.test_torch_parity import assert_same_gradients, numpy_state

    theirs, inputs = their_unet(SHALLOW), unet_inputs(SHALLOW, SIZE, 2)
    their_output(theirs, inputs).pow(2).mean().backward()
    params = read_torch_tensors(unet_table(SHALLOW), numpy_state(theirs), unet_shapes(SHALLOW))
    gradients = quickly_compiled(
        jax.grad(lambda params: (UNet(SHALLOW).apply({"params": params}, **inputs)[0] ** 2).mean())
    )(params)
    assert_same_gradients(theirs, unet_table(SHALLOW), gradients)


def test_freeu_of_a_whole_network():
    """Grids of the re-weighted blocks: 1 x 4 and 2 x 7. One time serves both images."""
    pytest.importorskip("torch")
    from tests.models.test_torch_parity import numpy_state

    theirs, inputs = their_unet(SMALLEST), unet_inputs(SMALLEST, (2, 7), 2)
    inputs["timesteps"] = np.float32(301)
    theirs.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    expected = their_output(theirs, inputs).detach().numpy()
    params = read_torch_tensors(unet_table(SMALLEST), numpy_state(theirs), unet_shapes(SMALLEST))
    out, _ = quickly_compiled(lambda params: UNet(SMALLEST).apply({"params": params}, **inputs, freeu=FreeU()))(params)
    np.testing.assert_allclose(nchw(out), expected, atol=1e-5 * np.abs(expected).max())
    theirs.disable_freeu()
    assert np.abs(their_output(theirs, inputs).detach().numpy() - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2), (2, 3), (4, 6), (5, 7), (6, 3)])
def test_low_frequencies(size):
    """The projection on four modes is the filter by Fourier transforms, on even and odd grids and on single rows."""
    torch = pytest.importorskip("torch")
    fourier_filter = pytest.importorskip("diffusers.utils.torch_utils").fourier_filter
    x = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    theirs = fourier_filter(torch.tensor(x).permute(0, 3, 1, 2), threshold=1, scale=0.3)
    np.testing.assert_allclose(scale_low_frequencies(x, 0.3), nhwc(theirs.numpy()), atol=2e-6)


def test_freeu_leaves_other_blocks_alone():
    x, skip = (np.full((1, 2, 2, 4), value, np.float32) for value in (1, 2))
    for block, (backbone, low) in enumerate([(1.1, 0.6), (1.2, 0.4), (1.0, 1.0)]):
        weighted, filtered = FreeU().apply(block, x, skip)
        np.testing.assert_allclose(weighted[0, 0, 0], [backbone, backbone, 1, 1], rtol=1e-6)
        np.testing.assert_allclose(filtered, low * skip, rtol=1e-6)  # a constant is all frequency 0


def test_sinusoids():
    """Cosines first, then sines, of frequencies 1 and 1 / 100."""
    expected = [np.cos(2), np.cos(0.02), np.sin(2), np.sin(0.02)]
    np.testing.assert_allclose(sinusoids(np.array([2.0]), 4), [expected], rtol=1e-6)


def test_half_precision_is_close():
    inputs = unet_inputs(SMALLEST, (4, 4), 2)

    @quickly_compiled
    def both(params):
        half = dataclasses.replace(SMALLEST, dtype="bfloat16")
        return [UNet(config).apply({"params": params}, **inputs)[0] for config in (SMALLEST, half)]

    exact, half = both(random_unet(SMALLEST))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_recomputing_changes_no_gradient():
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 2, 3, 8), (2, 5, 12)))
    stacks = [TransformerStack(dataclasses.replace(SMALLEST, remat=remat), 8, 2, 2) for remat in REMATS]
    params = random_like(jax.eval_shape(stacks[0].init, jax.random.key(0), x, context)["params"])

    @quickly_compiled
    def gradients(params):
        return [
            jax.grad(lambda p, stack=stack: (stack.apply({"params": p}, x, context)[0] ** 2).mean())(params)
            for stack in stacks
        ]

    plain, *recomputed = gradients(params)
    for other in recomputed:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)


def test_lora_stays_out_of_files():
    """Eight pairs per transformer block; a file neither holds nor needs them."""
    lora = dataclasses.replace(SMALL_SDXL, lora_rank=2)
    shapes, plain, table = unet_shapes(lora), unet_shapes(SMALL_SDXL), unet_table(lora)
    assert torch_shapes(table, shapes) == torch_shapes(table, plain)
    added = jax.tree.structure(shapes).num_leaves - jax.tree.structure(plain).num_leaves
    stacks = 1 + 1 + 1 + 2 + 2  # down 1 and 2, middle, up 0 and 1
    assert added == stacks * 2 * 8
    read = read_torch_tensors(table, to_torch_tensors(table, random_like(shapes)), shapes)
    assert jax.tree.structure(read) == jax.tree.structure(plain)


def test_incomplete_and_foreign_weights_are_named():
    table, shapes = unet_table(SMALLEST), unet_shapes(SMALLEST)
    tensors = to_torch_tensors(table, random_unet(SMALLEST))
    key = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    tensors["time_embedding.cond_proj.weight"] = np.zeros((32, 4), np.float32)
    with pytest.raises(WeightsError) as caught:
        read_torch_tensors(table, {name: value for name, value in tensors.items() if name != key}, shapes)
    assert f"missing: {key} [8, 8]" in str(caught.value)
    assert "unexpected: time_embedding.cond_proj.weight [32, 4]" in str(caught.value)


SDXL_SETTINGS = {  # unet/config.json of SDXL and of Stable Diffusion 1.5
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SD15_SETTINGS = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


def test_published_settings():
    assert config_from_diffusers(SDXL_SETTINGS) == UNetConfig.sdxl()
    assert config_from_diffusers(SD15_SETTINGS) == UNetConfig.sd15()
    assert config_from_diffusers(SDXL_SETTINGS, dtype="bfloat16", lora_rank=4) == UNetConfig.sdxl(
        dtype="bfloat16", lora_rank=4
    )


@pytest.mark.parametrize(
    ("config", "published"), [(UNetConfig.sdxl(), SDXL_SETTINGS), (UNetConfig.sd15(), SD15_SETTINGS)]
)
def test_written_settings_are_the_published_ones(config, published):
    """All that is written stands in the published file with the same value, or is what diffusers takes for none."""
    written = unet_settings(config, published["sample_size"])
    assert {name: written[name] for name in published if name in written} == {
        name: value for name, value in published.items() if name in written
    }
    usual = inspect.signature(pytest.importorskip("diffusers").UNet2DConditionModel.__init__).parameters
    assert all(written[name] == usual[name].default for name in written.keys() - published.keys())
    assert config_from_diffusers(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("depths", [(0, 0), (1, 0), (0, 3), (3, 2, 0), (0, 2, 1), (2, 2, 2), (0,)])
def test_every_arrangement_of_transformers_can_be_written(depths):
    """diffusers builds our tensors from the settings."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    levels = len(depths)
    config = dataclasses.replace(
        SMALL_SDXL, channels=SMALL_SDXL.channels[:levels], depths=depths, heads=SMALL_SDXL.heads[:levels]
    )
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(unet_settings(config)).state_dict()
    shapes = torch_shapes(unet_table(config), unet_shapes(config))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert config_from_diffusers(unet_settings(config)) == config


def test_stable_diffusion_2():
    """Heads per level and linear projections as SDXL, no pooled text; softmax in float32, which ours always is."""
    changes = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "upcast_attention": True}
    config = config_from_diffusers({**SD15_SETTINGS, **changes, "use_linear_projection": True})
    assert config == UNetConfig.sd15(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"act_fn": "gelu"},
        {"addition_embed_type": "text_image"},
        {"attention_type": "gated"},
        {"center_input_sample": True},
        {"class_embed_type": "timestep"},
        {"conv_in_kernel": 5},
        {"conv_out_kernel": 1},
        {"cross_attention_dim": [768, 768, 768, 1024]},
        {"cross_attention_norm": "layer_norm"},
        {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]},
        {"downsample_padding": 0},
        {"dropout": 0.1},
        {"dual_cross_attention": True},
        {"encoder_hid_dim": 1024},
        {"encoder_hid_dim_type": "text_proj"},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"layers_per_block": [1, 2, 2, 2]},
        {"mid_block_only_cross_attention": True},
        {"mid_block_scale_factor": 2},
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"num_class_embeds": 10},
        {"only_cross_attention": [True, True, True, False]},
        {"resnet_out_scale_factor": 2.0},
        {"resnet_skip_time_act": True},
        {"resnet_time_scale_shift": "scale_shift"},
        {"reverse_transformer_layers_per_block": [1, 1, 1, 2]},
        {"time_cond_proj_dim": 256},
        {"time_embedding_act_fn": "silu"},
        {"time_embedding_dim": 512},
        {"time_embedding_type": "fourier"},
        {"timestep_post_act": "silu"},
        {"transformer_layers_per_block": [1, 1, 1, [1, 2]]},
        {"transformer_layers_per_block": [1, 1, 1, 3]},
        {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_options_that_are_refused(changes):
    """One sentence that names the option; none of them is passed over in silence."""
    [name] = changes
    with pytest.raises(ValueError, match=rf"^The U-Net option {name}=.* is not supported; .*\.$"):
        config_from_diffusers({**SD15_SETTINGS, **changes})


def test_missing_options_are_named():
    with pytest.raises(ValueError, match=r"^The settings of the U-Net lack block_out_channels, attention_head_dim\.$"):
        config_from_diffusers(
            {
                key: value
                for key, value in SD15_SETTINGS.items()
                if key not in ("block_out_channels", "attention_head_dim")
            }
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (0, 1)}, "depths has 2 entries, channels has 3"),
        ({"heads": (2,)}, "heads has 1 entries, channels has 3"),
        ({"heads": (2, 3, 3)}, "channels 16 must be a multiple of groups 4 and of heads 3"),
        ({"groups": 3}, "channels 8 must be a multiple of groups 3"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_sizes_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL_SDXL, **changes)


def test_missing_and_unwanted_conditions_are_refused():
    added = unet_inputs(SMALL_SDXL, (4, 4), 1)["added"]
    for config, given, message in ((SMALL_SDXL, None, "needs"), (SMALLEST, added, "takes no")):
        inputs = {**unet_inputs(config, (4, 4), 1), "added": given}
        with pytest.raises(ValueError, match=f"{message} pooled text vectors and time ids"):
            UNet(config).apply({"params": {}}, **inputs)
