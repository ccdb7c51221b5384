"""Cached continuation against the whole text anew at every step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.inference.continuation import continue_tokens
from pixelstory_jax.models import llama
from pixelstory_jax.models.llama import Llama, LlamaConfig
from tests.models.small import random_like

CONFIG = LlamaConfig(vocab=50, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32, rope_theta=1e5, norm_eps=1e-5)
LENGTHS = np.array([5, 9, 1])
NEW = 7


@pytest.fixture(scope="module")
def setup():
    """Parameters, texts of three lengths, and noise in their padding."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (3, LENGTHS.max())).astype(np.int32)
    valid = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    shapes = jax.eval_shape(lambda: Llama(CONFIG).init(jax.random.key(0), tokens, valid, method=Llama.whole))["params"]
    return random_like(shapes, scale=0.4), tokens, valid


@jax.jit
def likeliest(params, tokens):
    """After each token of one text [T]; what follows a token does not matter to it."""
    valid = jnp.ones_like(tokens[None], bool)
    return Llama(CONFIG).apply({"params": params}, tokens[None], valid, method=Llama.whole)[0].argmax(-1)


def uncached(params, text) -> list[int]:
    text = [int(token) for token in text]
    for _ in range(NEW):
        padded = jnp.array(text + [0] * (LENGTHS.max() + NEW - len(text)))
        text.append(int(likeliest(params, padded)[len(text) - 1]))
    return text[-NEW:]


def test_cached_continuation_equals_uncached(setup):
    params, tokens, valid = setup
    out = continue_tokens(CONFIG, params, tokens, valid, NEW, ())
    for row, length in enumerate(LENGTHS):
        assert out.tokens[row].tolist() == uncached(params, tokens[row, :length])
    assert out.length.tolist() == [NEW] * 3
    assert len(set(np.asarray(out.tokens).ravel().tolist())) > 3  # a constant would prove nothing


def test_layers_apart_and_stacked_decode_alike(setup, monkeypatch):
    """On a CPU each layer has its own weights and cache, elsewhere layers are scanned over."""
    apart = continue_tokens(CONFIG, *setup, NEW, ())
    monkeypatch.setattr(llama, "target_device", lambda: "tpu")
    jax.clear_caches()
    stacked = continue_tokens(CONFIG, *setup, NEW, ())
    jax.clear_caches()
    np.testing.assert_array_equal(apart.tokens, stacked.tokens)


def test_padding_is_not_read(setup):
    params, tokens, valid = setup
    other = np.where(valid, tokens, 7)
    first, second = (continue_tokens(CONFIG, params, text, valid, NEW, ()).tokens for text in (tokens, other))
    np.testing.assert_array_equal(first, second)


def test_rows_stop_by_themselves(setup):
    params, tokens, valid = setup
    free = np.asarray(continue_tokens(CONFIG, params, tokens, valid, NEW, ()).tokens)
    stops = (int(free[0, 2]), int(free[1, 4]))
    out = continue_tokens(CONFIG, params, tokens, valid, NEW, stops)
    for row in range(3):
        found = np.flatnonzero(np.isin(free[row], stops))
        length = found[0] + 1 if len(found) else NEW
        assert out.length[row] == length
        np.testing.assert_array_equal(out.tokens[row], np.where(np.arange(NEW) < length, free[row], 0))
    assert out.length[0] < NEW


def test_an_empty_text_is_not_continued(setup):
    params, tokens, valid = setup
    out = continue_tokens(CONFIG, params, tokens, valid & (np.arange(3) != 1)[:, None], NEW, ())
    assert out.length.tolist() == [NEW, 0, NEW]
    assert not np.any(out.tokens[1])


def test_sampling(setup):
    params, tokens, valid = setup

    def run(seed, **options):
        options = {"temperature": 1.5, "rng": jax.random.key(seed), **options}
        return np.asarray(continue_tokens(CONFIG, params, tokens, valid, NEW, (), **options).tokens)

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))
    np.testing.assert_array_equal(run(1, top_p=1e-6), run(1, temperature=0.0))


def test_bad_requests_are_refused(setup):
    params, tokens, valid = setup
    for options, message in [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2, "temperature": 1.0}, "needs a random key"),
        ({"max_new_tokens": 2, "top_p": 0.0}, "must be in"),
        ({"max_new_tokens": 2, "token_valid": valid[:, ::-1]}, "padded on the right"),
    ]:
        with pytest.raises(ValueError, match=message):
            continue_tokens(CONFIG, params, tokens, **{"token_valid": valid, "stop_ids": (), **options})
