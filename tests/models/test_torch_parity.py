"""Live parity with transformers on tiny random weights, forward and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.interop.tables import CLIP_VISION, LLAMA
from pixelstory_jax.interop.torch_layout import read_torch_tensors, to_torch_tensors
from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.pixel_decoder import DoublingConvolution, Neck, PixelDecoderConfig
from pixelstory_jax.models.resize import resize_bilinear

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def randomise(module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)


def numpy_state(module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def assert_same_gradients(module, table, gradients, prefix="") -> None:
    """To 1e-4 of a tensor's largest value; what is zero but for rounding (key biases) to 1e-6 of the largest of all."""
    ours = to_torch_tensors(table, gradients)
    named = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in module.named_parameters()}
    largest = max(np.abs(gradient).max() for gradient in named.values())
    for name, theirs in named.items():
        tolerance = max(1e-4 * np.abs(theirs).max(), 1e-6 * largest)
        np.testing.assert_allclose(ours[prefix + name], theirs, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["multi-head", "grouped-query"])
def test_llama(key_heads):
    config = LlamaConfig(vocab=60, width=32, layers=3, heads=4, kv_heads=key_heads, mlp_width=48)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=key_heads,
            rms_norm_eps=config.norm_eps,
            attn_implementation="eager",
        )
    )
    randomise(theirs)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 60, (2, 9))
    valid = np.ones((2, 9), bool)
    valid[1, 6:] = False  # text padding
    valid[0, 2:4] = False  # padded image tokens, which keep their positions
    weights = rng.standard_normal((2, 9, 60)).astype(np.float32) * valid[..., None]

    logits = theirs(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(valid, dtype=torch.long),
        position_ids=torch.arange(9)[None].expand(2, 9),
    ).logits
    (logits * torch.tensor(weights)).sum().backward()

    model = Llama(config)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, valid, method="whole"))["params"]
    params = read_torch_tensors(LLAMA, numpy_state(theirs), expected)

    @jax.jit
    def loss(params):
        ours = model.apply({"params": params}, tokens, valid, method="whole")
        return (ours * weights).sum(), ours

    (_, ours), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(ours[valid], logits.detach().numpy()[valid], atol=2e-5)
    assert_same_gradients(theirs, LLAMA, gradients)


def test_clip_vision():
    config = ClipVisionConfig(canvas=24, patch_size=8, width=32, layers=3, heads=4, mlp_width=48, has_final_norm=True)
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.canvas,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            attn_implementation="eager",
        )
    )
    randomise(theirs)
    prefix = "" if any(name.startswith("vision_model.") for name in numpy_state(theirs)) else "vision_model."
    pixels = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)
    result = theirs(pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    states = torch.stack(result.hidden_states)
    (states.pow(2).sum() + result.pooler_output.pow(2).sum()).backward()

    model, every = ClipVision(config), (0, 1, 2, 3)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, None, every))["params"]
    tensors = {prefix + name: value for name, value in numpy_state(theirs).items()}
    params = read_torch_tensors(CLIP_VISION, tensors, expected)

    @jax.jit
    def loss(params):
        ours = model.apply({"params": params}, pixels, None, every)
        pooled = model.apply({"params": params}, ours[-1], method=ClipVision.pool)
        return (ours**2).sum() + (pooled**2).sum(), (ours, pooled)

    (_, (ours, pooled)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(ours, states.detach().numpy(), atol=5e-5)
    np.testing.assert_allclose(pooled, result.pooler_output.detach().numpy(), atol=5e-5)
    assert_same_gradients(theirs, CLIP_VISION, gradients, prefix)


def test_clip_padding_mask_hides_padded_patches():
    config = ClipVisionConfig(canvas=24, patch_size=8, width=16, layers=2, heads=2, mlp_width=16)
    model, valid = ClipVision(config), np.ones((1, 9), bool)
    valid[0, 6:] = False
    pixels = np.random.default_rng(0).standard_normal((1, 24, 24, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), pixels, valid, (2,))
    changed = pixels.copy()
    changed[:, 16:] += 3
    before, after = (model.apply(params, x, valid, (2,))[0, 0, :7] for x in (pixels, changed))
    np.testing.assert_array_equal(before, after)
    assert not np.allclose(before, model.apply(params, changed, None, (2,))[0, 0, :7])


@pytest.mark.parametrize(("source", "target"), [((5, 9), (12, 4)), ((8, 8), (128, 128)), ((1, 1), (3, 2))])
def test_resize_bilinear(source, target):
    x = np.random.default_rng(0).standard_normal((2, *source)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.tensor(x)[None], target, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(resize_bilinear(jnp.asarray(x), *target), theirs[0].numpy(), atol=1e-5)


def test_transposed_convolution_and_neck():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 4, 6)).astype(np.float32)  # [B, h, w, C]
    layer = torch.nn.ConvTranspose2d(6, 5, 2, stride=2)
    params = {"kernel": layer.weight.detach().numpy().transpose(0, 2, 3, 1), "bias": layer.bias.detach().numpy()}
    ours = DoublingConvolution(5, "float32").apply({"params": params}, x)
    theirs = layer(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    necked = Neck(PixelDecoderConfig(width=16, heads=2)).init_with_output(jax.random.key(0), x)[0]
    assert necked.shape == (1, 3, 4, 16)
