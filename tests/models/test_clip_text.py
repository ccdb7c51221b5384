"""CLIP's text encoder: published sizes, live parity with transformers, both end rules, and the way there and back."""

from __future__ import annotations

import dataclasses
from math import prod

import jax
import numpy as np
import pytest

from pixelstory_jax.data.clip_tokenizer import small_clip_tokenizer
from pixelstory_jax.interop.clip_text_table import (
    CLIP_TEXT,
    clip_text_config,
    clip_text_settings,
    clip_text_shapes,
    read_clip_text,
    released_names,
)
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.interop.torch_layout import to_torch_tensors, torch_shapes
from pixelstory_jax.models.clip_text import LARGEST_ID, ClipText, ClipTextConfig, TextFeatures
from pixelstory_jax.models.paths import flatten
from tests.models.test_published_sizes import listed

CHECKPOINT = """
text_model.embeddings.token_embedding.weight [49408,D]
text_model.embeddings.position_embedding.weight [77,D]
text_model.final_layer_norm.{weight,bias} [D]
text_model.encoder.layers.{LAYERS}.{layer_norm1,layer_norm2}.{weight,bias} [D]
text_model.encoder.layers.{LAYERS}.self_attn.{q,k,v,out}_proj.weight [D,D]
text_model.encoder.layers.{LAYERS}.self_attn.{q,k,v,out}_proj.bias [D]
text_model.encoder.layers.{LAYERS}.mlp.fc1.weight [4D,D]
text_model.encoder.layers.{LAYERS}.mlp.fc1.bias [4D]
text_model.encoder.layers.{LAYERS}.mlp.fc2.weight [D,4D]
text_model.encoder.layers.{LAYERS}.mlp.fc2.bias [D]
"""
SMALL = ClipTextConfig(vocab=60, length=12, width=32, layers=3, heads=4, mlp_width=48)
EOS = 57  # of the small encoders; 58 and 59 are added tokens


@pytest.mark.parametrize(
    ("config", "total", "tensors"),
    [(ClipTextConfig.clip_large(), 123_060_480, 196), (ClipTextConfig.open_clip_bigg(), 694_659_840, 517)],
    ids=["large", "bigg"],
)
def test_published_sizes(config, total, tensors):
    expected = listed(CHECKPOINT, config.layers, D=config.width, **{"4D": config.mlp_width})
    if config.projection:
        expected["text_projection.weight"] = (1280, 1280)
    assert torch_shapes(CLIP_TEXT, clip_text_shapes(config)) == expected
    assert len(expected) == tensors
    assert sum(map(prod, expected.values())) == total


def test_tiny_fits_the_small_vocabulary():
    config, tokenizer = ClipTextConfig.tiny(), small_clip_tokenizer()
    assert (config.vocab, config.eos_id, config.length) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.length)
    assert (config.width, config.layers, config.heads) == (64, 2, 4)


def small(**changes) -> ClipTextConfig:
    return dataclasses.replace(SMALL, **changes)


def run(config: ClipTextConfig, params, tokens, layer: int = -1, feature_layers: tuple[int, ...] = ()) -> TextFeatures:
    return jax.jit(lambda params: ClipText(config).apply({"params": params}, tokens, layer, feature_layers))(params)


def random_params(config: ClipTextConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), clip_text_shapes(config))


def padded_texts() -> np.ndarray:
    """Four texts: padded with the end token, with 0, with added tokens above it, and one without any padding."""
    tokens = np.random.default_rng(1).integers(3, EOS, (4, 12)).astype(np.int32)
    tokens[0, 5:] = EOS
    tokens[1, 4], tokens[1, 5:] = EOS, 0
    tokens[2, [2, 6]], tokens[2, 8:] = (58, 59), EOS
    tokens[3, -1] = EOS
    return tokens


@pytest.mark.parametrize("eos_id", [LARGEST_ID, EOS], ids=["largest id", "end token"])
@pytest.mark.parametrize(
    ("changes", "kind"),
    [({}, "CLIPTextModel"), ({"activation": "gelu", "projection": 20}, "CLIPTextModelWithProjection")],
    ids=["plain", "projected"],
)
def test_parity_with_transformers(changes, kind, eos_id):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.test_torch_parity import numpy_state, randomise

    config = small(eos_id=eos_id, **changes)
    settings = clip_text_settings(config)
    theirs = getattr(transformers, kind)(transformers.CLIPTextConfig(**settings, attn_implementation="eager"))
    randomise(theirs)
    tokens = padded_texts()
    with torch.no_grad():
        result = theirs(input_ids=torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)

    assert clip_text_config(settings) == config
    params = read_clip_text(config, numpy_state(theirs))
    every = tuple(range(config.layers + 1))
    last, penultimate = (run(config, params, tokens, layer, every) for layer in (-1, -2))
    pooled = result.text_embeds if config.projection else result.pooler_output
    np.testing.assert_allclose(last.captured, torch.stack(result.hidden_states).numpy(), atol=1e-5)
    np.testing.assert_allclose(last.states, result.last_hidden_state.numpy(), atol=1e-5)
    np.testing.assert_allclose(penultimate.states, result.hidden_states[-2].numpy(), atol=1e-5)
    np.testing.assert_allclose(last.pooled, pooled.numpy(), atol=1e-5)
    np.testing.assert_array_equal(last.pooled, penultimate.pooled)

    written = to_torch_tensors(CLIP_TEXT, params)
    assert set(written) == set(released_names(numpy_state(theirs)))
    for name, tensor in released_names(numpy_state(theirs)).items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_where_a_text_is_pooled():
    tokens = padded_texts()
    largest = ClipText(SMALL).end_positions(tokens)
    first_end = ClipText(small(eos_id=EOS)).end_positions(tokens)
    assert largest.tolist() == [5, 4, 6, 11]  # in the third text an added token is larger than the end token
    assert first_end.tolist() == [5, 4, 8, 11]


def test_later_tokens_do_not_reach_back():
    tokens = padded_texts()
    changed = tokens.copy()
    changed[:, 8:] = 7
    params = random_params(SMALL)
    before, after = (run(SMALL, params, x).states for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 0.1


def test_shorter_texts_get_the_first_positions():
    params = random_params(SMALL)
    whole, short = (run(SMALL, params, x, -2).states for x in (padded_texts(), padded_texts()[:, :6]))
    np.testing.assert_allclose(whole[:, :6], short, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    params, tokens = random_params(SMALL), padded_texts()

    def gradient(config):
        return flatten(jax.jit(jax.grad(lambda params: (run(config, params, tokens).states ** 3).sum()))(params))

    plain, recomputed = gradient(SMALL), gradient(small(remat=remat))
    largest = max(np.abs(value).max() for value in plain.values())
    for path, value in plain.items():  # gradients of key biases are zero but for rounding
        atol = max(1e-4 * np.abs(value).max(), 1e-6 * largest)
        np.testing.assert_allclose(recomputed[path], value, rtol=0, atol=atol, err_msg=path)


def test_low_precision_keeps_float32_parameters():
    config = small(dtype="bfloat16", projection=8)
    params = clip_text_shapes(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    found = jax.eval_shape(lambda params: run(config, params, padded_texts(), -2, (1,)), params)
    assert [x.dtype for x in found] == ["bfloat16"] * 3
    assert [x.shape for x in found] == [(4, 12, 32), (4, 8), (1, 4, 12, 32)]


def test_both_ways_that_keys_are_written():
    config = small(projection=8)
    tensors = to_torch_tensors(CLIP_TEXT, random_params(config))
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    assert "text_projection.weight" in bare and "final_layer_norm.bias" in bare
    positions = {"embeddings.position_ids": np.arange(12)[None]}
    assert set(released_names(tensors)) == set(released_names(bare)) == set(tensors)
    first = read_clip_text(config, tensors | {"text_model." + name: value for name, value in positions.items()})
    second = read_clip_text(config, bare | positions)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_weights_that_do_not_fit():
    tensors = to_torch_tensors(CLIP_TEXT, random_params(SMALL))
    del tensors["text_model.final_layer_norm.bias"]
    with pytest.raises(WeightsError, match="missing: text_model.final_layer_norm.bias") as caught:
        read_clip_text(SMALL, tensors | {"text_projection.weight": np.zeros((8, 32))})
    assert "unexpected: text_projection.weight" in str(caught.value)


def test_settings_of_released_files():
    """Both classes name a projection_dim; only one has the projection."""
    released = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "projection_dim": 768,
    }
    assert clip_text_config(released) == ClipTextConfig.clip_large()
    second = {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    }
    assert clip_text_config(released | second, dtype="bfloat16") == ClipTextConfig.open_clip_bigg(dtype="bfloat16")
    del released["hidden_size"], released["hidden_act"]
    with pytest.raises(ValueError, match="lack hidden_size, hidden_act"):
        clip_text_config(released)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"heads": 5}, "width 32 is not a multiple of heads 5"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"projection": -1}, "projection is -1"),
        ({"eos_id": 60}, "eos_id is 60"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_sizes_that_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        small(**changes)


def test_calls_that_are_refused():
    params, tokens = random_params(SMALL), np.zeros((1, 12), np.int32)
    with pytest.raises(ValueError, match=r"T up to 12"):
        run(SMALL, params, np.zeros((1, 13), np.int32))
    with pytest.raises(ValueError, match=r"Layer -5 is not among -4..-1"):
        run(SMALL, params, tokens, -5)
    with pytest.raises(ValueError, match=r"Feature layers \[4\] are not among 0..3"):
        run(SMALL, params, tokens, -1, (4,))
