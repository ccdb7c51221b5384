from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.inference.decoding import choose
from pixelstory_jax.inference.generate import fill_slots, generate
from pixelstory_jax.models.pixellm import PixelLM, normalise_pixels
from tests.models.small import STOP, small_batch, small_model

LENGTHS = np.array([[9, 13], [7, 10]])
NEW = 6


@pytest.fixture(scope="module")
def setup():
    """A model, features of two pictures (the second with padded image tokens), and prompts of four lengths."""
    model, params = small_model()
    batch = small_batch(model.config)
    pixels = normalise_pixels(batch["image"], batch["image_size"])
    encode = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, method=PixelLM.encode_image))
    tokens = batch["tokens"][:, :, : LENGTHS.max()]
    return model, params, encode(pixels, batch["image_size"]), tokens, np.arange(LENGTHS.max()) < LENGTHS[..., None]


def uncached(model, params, features, prompt, image, steps):
    """One row at a time, the whole sequence anew at every step: (tokens, states)."""
    features = jax.tree.map(lambda x: x[image : image + 1], features)

    @jax.jit
    def last(tokens, length):
        valid = (jnp.arange(tokens.shape[0]) < length)[None, None]
        hidden = model.apply({"params": params}, tokens[None, None], valid, features, method=PixelLM.states)
        state = hidden[0, 0, length - 1]
        return state, model.apply({"params": params}, state, method=PixelLM.logits)

    tokens, states = list(prompt), []
    for _ in range(steps):
        padded = np.zeros(len(prompt) + steps, np.int32)
        padded[: len(tokens)] = tokens
        state, logits = last(padded, len(tokens))
        tokens.append(int(np.argmax(logits)))
        states.append(np.asarray(state))
    return np.array(tokens[len(prompt) :]), np.stack(states)


def test_cached_generation_equals_uncached(setup):
    model, params, features, tokens, valid = setup
    out = generate(model, params, features, tokens, valid, max_new_tokens=NEW, stop_ids=())
    for row, (image, question) in enumerate(np.ndindex(2, 2)):
        prompt = tokens[image, question, : LENGTHS[image, question]]
        expected, states = uncached(model, params, features, prompt, image, NEW)
        np.testing.assert_array_equal(out.tokens[row], expected)
        np.testing.assert_allclose(out.states[row], states, atol=1e-4)
    np.testing.assert_array_equal(out.length, [NEW] * 4)


def test_padded_image_tokens_stay_masked(setup):
    model, params, features, tokens, valid = setup
    noisy = features._replace(llm_tokens=features.llm_tokens + 9.0 * ~features.llm_valid[..., None])
    first, second = (
        generate(model, params, f, tokens, valid, max_new_tokens=NEW, stop_ids=()) for f in (features, noisy)
    )
    np.testing.assert_array_equal(first.states, second.states)


def test_rows_stop_by_themselves(setup):
    model, params, features, tokens, valid = setup
    free = np.asarray(generate(model, params, features, tokens, valid, max_new_tokens=NEW, stop_ids=()).tokens)
    stop = int(free[0, 2])
    out = generate(model, params, features, tokens, valid, max_new_tokens=NEW, stop_ids=(stop,))
    for row in range(4):
        found = np.flatnonzero(free[row] == stop)
        length = found[0] + 1 if len(found) else NEW
        assert out.length[row] == length
        np.testing.assert_array_equal(out.tokens[row], np.where(np.arange(NEW) < length, free[row], 0))
        assert not np.any(out.states[row, length:])


def test_sampling(setup):
    model, params, features, tokens, valid = setup
    options = {"max_new_tokens": NEW, "stop_ids": (STOP,), "temperature": 1.5}

    def run(seed, **more):
        key = jax.random.key(seed)
        return np.asarray(generate(model, params, features, tokens, valid, rng=key, **{**options, **more}).tokens)

    np.testing.assert_array_equal(run(1), run(1))
    assert not np.array_equal(run(1), run(2))
    greedy = generate(model, params, features, tokens, valid, max_new_tokens=NEW, stop_ids=(STOP,))
    np.testing.assert_array_equal(run(1, top_p=1e-6), greedy.tokens)


def test_top_p_keeps_the_likeliest():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: choose(logits, key, jnp.float32(1), jnp.float32(0.7), True)[0]))
    counts = np.bincount(np.asarray(draw(keys)), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.03)


def test_bad_requests_are_refused(setup):
    model, params, features, tokens, valid = setup
    for options, message in [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2, "temperature": 1.0}, "needs a random key"),
        ({"max_new_tokens": 2, "top_p": 0.0}, "must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(model, params, features, tokens, valid, stop_ids=(), **options)


def test_slots_hold_the_states_of_each_target():
    states = np.arange(4 * 10, dtype=np.float32).reshape(4, 10, 1)
    none = np.zeros((0, 4), int)
    groups = [np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[2, 3, 4, 5]]), none, none]
    slots = fill_slots(states, groups, images=2)
    assert slots.states.shape == (2, 4, 4, 1)
    np.testing.assert_array_equal(slots.valid, [[1, 1, 1, 0], [0] * 4])
    np.testing.assert_array_equal(slots.question[0], [0, 0, 1, 0])
    np.testing.assert_array_equal(slots.states[0, 2, :, 0], [12, 13, 14, 15])
    with pytest.raises(ValueError, match="3 targets, but there are 2 slots"):
        fill_slots(states, groups, images=2, slots=2)


def test_masks_of_generated_targets_equal_those_of_a_teacher_forced_pass(setup):
    """Force the answer to be a prompt: the states kept by the cache give the masks of the uncached pass."""
    model, params, features, tokens, valid = setup
    out = generate(model, params, features, tokens, valid, max_new_tokens=4, stop_ids=())
    whole = np.zeros((2, 2, LENGTHS.max() + 4), np.int32)
    for row, (image, question) in enumerate(np.ndindex(2, 2)):
        length = LENGTHS[image, question]
        whole[image, question, :length] = tokens[image, question, :length]
        whole[image, question, length : length + 4] = out.tokens[row]
    slots = fill_slots(np.asarray(out.states), [np.arange(4)[None]] * 4, images=2)
    decode = jax.jit(lambda states: model.apply({"params": params}, features, states, method=PixelLM.decode_masks))
    cached = decode(slots.states).logits[:, :2]
    hidden = model.apply(
        {"params": params}, whole, np.arange(whole.shape[2]) < LENGTHS[..., None] + 4, features, method=PixelLM.states
    )
    positions = np.arange(2)[None, :, None] * whole.shape[2] + LENGTHS[..., None] + np.arange(4)
    forced = model.apply({"params": params}, hidden, positions, method=PixelLM.target_states)
    np.testing.assert_allclose(
        cached, decode(np.pad(forced, ((0, 0), (0, 2), (0, 0), (0, 0)))).logits[:, :2], atol=1e-3
    )
