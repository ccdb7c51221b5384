from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pixellm import get_config
from pixelstory_jax.models.llama import LoraConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig, normalise_pixels
from pixelstory_jax.models.sizes import sizes_from_config
from tests.models.small import random_like, small_batch, small_config, small_model


@pytest.fixture(scope="module")
def paper():
    model, params = small_model()
    return model, params, compiled(model)


def compiled(model: PixelLM):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def test_output_shapes(paper):
    model, params, run = paper
    batch = small_batch(model.config)
    out = run(params, batch)
    assert out.logits.shape == (*batch["tokens"].shape, 50) and out.logits.dtype == jnp.float32
    assert out.mask_logits.shape == (2, 3, 16, 16)
    assert [x.shape for x in out.scale_masks] == [(2, 3, 8, 8), (2, 3, 16, 16)]


def test_image_padding_changes_nothing(paper):
    """What stands in the padding of the canvas, and which image tokens are padded, must not reach text or masks."""
    model, params, run = paper
    batch = small_batch(model.config)
    other = {**batch, "image": batch["image"].copy()}
    other["image"][1, 16:] = 255
    for a, b in zip(jax.tree.leaves(run(params, batch)), jax.tree.leaves(run(params, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masked_image_tokens_do_not_reach_the_text(paper):
    model, params, _ = paper
    batch = small_batch(model.config)
    pixels = normalise_pixels(batch["image"], batch["image_size"])
    features = model.apply({"params": params}, pixels, batch["image_size"], method=PixelLM.encode_image)
    np.testing.assert_array_equal(features.llm_valid, [[1, 1, 1, 1], [1, 1, 0, 0]])
    noisy = features._replace(llm_tokens=features.llm_tokens + 9.0 * ~features.llm_valid[..., None])
    text = slice(2 + model.config.image_tokens, None)

    def states(features):
        return model.apply({"params": params}, batch["tokens"], batch["token_valid"], features, method=PixelLM.states)

    np.testing.assert_array_equal(states(features)[:, :, text], states(noisy)[:, :, text])


def test_targets_are_independent_of_the_other_slots(paper):
    model, params, run = paper
    batch = small_batch(model.config)
    other = {**batch, "target_positions": batch["target_positions"].copy()}
    other["target_positions"][:, 2] = 20
    first, second = run(params, batch).mask_logits, run(params, other).mask_logits
    np.testing.assert_allclose(first[:, :2], second[:, :2], atol=1e-5)
    assert not np.allclose(first[:, 2], second[:, 2])


def test_no_targets_at_all(paper):
    model, params, run = paper
    batch = small_batch(model.config)
    out = run(params, {**batch, "target_positions": batch["target_positions"][:, :0]})
    assert out.mask_logits.shape == (2, 0, 16, 16)
    np.testing.assert_allclose(out.logits, run(params, batch).logits, atol=1e-6)


def test_states_are_read_one_position_before_the_token(paper):
    model, params, _ = paper
    hidden = jnp.arange(2 * 2 * 5, dtype=jnp.float32).reshape(2, 2, 5, 1)
    positions = jnp.array([[[1, 2, 7, 8]], [[3, 4, 5, 6]]])
    got = model.apply({"params": params}, hidden, positions, method=PixelLM.target_states)
    np.testing.assert_array_equal(got[..., 0], [[[0, 1, 6, 7]], [[12, 13, 14, 15]]])


def test_paper_starts_at_the_constants_of_faithful_mode():
    """The same weights give the same masks in both modes until the fusion weights are trained."""
    model, params = small_model()
    params["token_weights"] = jnp.full((2, 2), 1 / 4)
    params["scale_weights"] = jnp.full((2,), 1 / 2)
    faithful = PixelLM(small_config(mode="faithful"))
    batch = small_batch(model.config)
    rest = {name: value for name, value in params.items() if not name.endswith("_weights")}
    ours, theirs = compiled(model)(params, batch), compiled(faithful)(rest, batch)
    for a, b in zip(ours.scale_masks, theirs.scale_masks, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert theirs.mask_logits.shape[-1] == 128
    names = ("token_weights", "scale_weights")
    start = jax.jit(lambda: [model.init(jax.random.key(0), batch)["params"][name] for name in names])()
    np.testing.assert_array_equal(start[0], np.full((2, 2), np.float32(1 / 4)))
    np.testing.assert_array_equal(start[1], [0.5, 0.5])


@pytest.mark.parametrize(("mode", "expected"), [("faithful", "bfloat16"), ("paper", "float32")])
def test_the_mode_chooses_the_dtype_of_position_codes(mode, expected):
    """Also where the mode is overridden in a config; a dtype that is named wins."""
    config = get_config("7b")
    config.model.mode = mode
    sizes = sizes_from_config(PixelLMConfig, config.model)
    assert sizes.resolved_decoder.position_dtype == expected
    assert PixelLMConfig.pixellm_7b(mode=mode).resolved_decoder == sizes.resolved_decoder
    config.model.decoder.position_dtype = "float16"
    assert sizes_from_config(PixelLMConfig, config.model).resolved_decoder.position_dtype == "float16"


def test_faithful_position_codes_reach_the_masks():
    """At bfloat16 the modules compute other codes in faithful than in paper mode."""
    decoder = replace(small_config().decoder, dtype="bfloat16")
    codes = {}
    for mode in ("faithful", "paper"):
        model = PixelLM(small_config(mode=mode, decoder=decoder))
        params = small_model(mode=mode)[1]
        codes[mode] = model.apply({"params": params}, 4, method=lambda model, grid: model.prompt_encoder(grid)[1])
        assert model.bind({"params": params}).mask_decoder.config == model.config.resolved_decoder
    assert codes["faithful"].dtype == jnp.bfloat16 and codes["paper"].dtype == jnp.float32


def test_every_trained_parameter_gets_a_gradient(paper):
    model, params, _ = paper
    batch = small_batch(model.config)

    @jax.jit
    def loss(params):
        out = model.apply({"params": params}, batch)
        return (out.logits**2).mean() + (out.mask_logits**2).mean()

    gradients, _ = jax.tree_util.tree_flatten_with_path(jax.grad(loss)(params))
    without = {jax.tree_util.keystr(path, simple=True, separator="/") for path, g in gradients if not np.any(g)}
    allowed = ("mask_decoder/iou_head", "mask_decoder/position_matrix", "prompt_encoder/")
    assert {path for path in without if not path.startswith(allowed)} == set()
    assert "prompt_encoder/no_mask" not in without and "prompt_encoder/position_matrix" in without


@pytest.mark.parametrize("layers", [(3,), (3, 2, 1)])
def test_other_numbers_of_scales(layers):
    config = small_config(
        feature_layers=layers, decoder=replace(small_config().decoder, scales=len(layers)), codebook_tokens=1
    )
    model, batch = PixelLM(config), small_batch(config)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    masks = compiled(model)(params, batch).scale_masks
    assert [mask.shape[-1] for mask in masks] == [8 * 2**n for n in range(len(layers))]


@pytest.mark.slow
def test_remat_and_dtype_change_cost_not_results():
    config = small_config()
    batch = small_batch(config)
    model, params = small_model()
    remat = replace(config, vision=replace(config.vision, remat="full"), llama=replace(config.llama, remat="dots"))
    plain = compiled(model)(params, batch).logits
    np.testing.assert_allclose(compiled(PixelLM(remat))(params, batch).logits, plain, atol=1e-5)
    short = replace(config, vision=replace(config.vision, dtype="bfloat16"))
    short = replace(short, llama=replace(config.llama, dtype="bfloat16"))
    short = replace(short, decoder=replace(config.decoder, dtype="bfloat16"))
    low = compiled(PixelLM(short))(params, batch)
    assert low.logits.dtype == low.mask_logits.dtype == jnp.float32 and low.hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.logits, plain, atol=0.1 * float(jnp.abs(plain).max()))


@pytest.mark.slow
def test_lora_starts_as_nothing_and_its_dropout_needs_a_key():
    config = small_config()
    lora = replace(config, llama=replace(config.llama, lora=LoraConfig(rank=2, dropout=0.5)))
    model, batch = PixelLM(lora), small_batch(lora)
    start = jax.jit(lambda: model.init(jax.random.key(0), batch)["params"]["llama"]["layers"]["attention"]["query"])()
    assert np.any(start["lora_a"]) and not np.any(start["lora_b"])
    noisy = random_like(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    run = compiled(model)
    first = run(noisy, batch).logits
    np.testing.assert_array_equal(first, run(noisy, batch).logits)
    assert not np.allclose(first, run(noisy, batch, jax.random.key(1)).logits)


def test_lora_equals_merged_weights():
    config = small_config()
    lora = replace(config, llama=replace(config.llama, lora=LoraConfig(rank=2, alpha=6.0)))
    model, batch = PixelLM(lora), small_batch(lora)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), batch)["params"])
    merged = jax.tree.map(lambda x: x, params)
    for name in ("query", "value"):
        part = dict(merged["llama"]["layers"]["attention"][name])
        part["kernel"] = part["kernel"] + 3.0 * jnp.einsum("ldr,lro->ldo", part.pop("lora_a"), part.pop("lora_b"))
        merged["llama"]["layers"]["attention"][name] = part
    ours = compiled(model)(params, batch).logits
    np.testing.assert_allclose(ours, compiled(PixelLM(config))(merged, batch).logits, atol=1e-4)


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="mode is"):
        small_config(mode="both")
    with pytest.raises(ValueError, match="must be among 0..3"):
        small_config(feature_layers=(5, 1))
    with pytest.raises(ValueError, match="decoder scales"):
        small_config(feature_layers=(3,))
    with pytest.raises(ValueError, match="Unknown LoRA targets"):
        LoraConfig(rank=2, targets=("q_proj",))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("llama.kv_heads", 0, "llama: kv_heads is 0; at least 1 is needed"),
        ("llama.dtype", "float23", "llama: dtype is 'float23'; known are float32, bfloat16, float16"),
        ("llama.remat", "ful", "llama: remat is 'ful'; known are none, full, attention, narrow, dots"),
        ("llama.lora.rank", -1, "llama: lora: rank is -1"),
        ("vision.layers", 0, "vision: layers is 0"),
        ("vision.patch_size", 0, "vision: patch_size is 0"),
        ("vision.dtype", "int8", "vision: dtype is 'int8'"),
        ("vision.remat", "some", "vision: remat is 'some'"),
        ("vision.activation", "relu", "vision: activation is 'relu'; known are quick_gelu, gelu"),
        ("decoder.heads", 0, "decoder: heads is 0"),
        ("decoder.cross_downsample", 0, "decoder: cross_downsample is 0"),
        ("decoder.fused_size", 0, "decoder: fused_size is 0"),
        ("decoder.dtype", "half", "decoder: dtype is 'half'"),
        ("decoder.position_dtype", "half", "decoder: position_dtype is 'half'"),
        ("image_tokens_side", 0, "image_tokens_side is 0"),
        ("codebook_tokens", 0, "codebook_tokens is 0"),
    ],
)
def test_sizes_that_no_network_can_have_are_refused_by_their_field(field, value, message):
    config = get_config()
    config.model.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f"^{message}"):
        sizes_from_config(PixelLMConfig, config.model)


def test_tiny_is_tiny():
    config = PixelLMConfig.tiny()
    assert (config.group, config.mask_side) == (6, 4 * config.vision.grid)
    shapes = jax.eval_shape(PixelLM(config).init, jax.random.key(0), small_batch(config))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 6e6
