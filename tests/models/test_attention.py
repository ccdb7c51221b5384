from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.models import chunked_attention
from pixelstory_jax.models.attention import attend, attend_with_normaliser


def random_inputs(queries: int = 7, keys: int = 7, heads: int = 4, key_heads: int = 2) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(2, queries, heads, 8), (2, keys, key_heads, 8), (2, keys, key_heads, 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def naive(query, key, value, mask):
    """Head by head, query by query."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(*query.shape[:3]):
        scores = np.array([query[b, t, n] @ key[b, s, n // group] for s in range(key.shape[1])]) / np.sqrt(8)
        weights = np.where(mask[b, t], np.exp(scores - scores.max()), 0)
        out[b, t, n] = weights @ np.asarray(value[b, :, n // group]) / weights.sum()
    return out


def test_grouped_causal_attention_with_padding_is_right():
    query, key, value = random_inputs(queries=3)
    valid = np.ones((2, 7), bool)
    valid[1, 3] = False
    order = np.arange(7)[None] <= np.arange(3)[:, None] + 4  # the last query sees the last key
    ours = attend(query, key, value, mask=jnp.asarray(valid)[:, None, None], causal=True)
    np.testing.assert_allclose(ours, naive(query, key, value, order[None] & valid[:, None]), atol=1e-5)


MASKS = {"none": None, "padding": (2, 1, 1, 9), "pairs": (1, 1, 7, 9), "heads": (1, 4, 1, 9), "whole": (2, 4, 7, 9)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("scores", [1, 50, 10**6], ids=["by part", "by head", "whole"])
def test_chunked_equals_xla_forward_and_backward(monkeypatch, scores, causal, mask):
    """Results, normalisers and gradients, however many heads and queries go together; some queries see nothing."""
    monkeypatch.setattr(chunked_attention, "SCORES", scores)
    monkeypatch.setattr(chunked_attention, "ROWS", 4)
    rng = np.random.default_rng(1)
    inputs = random_inputs(keys=9)
    drawn = None if MASKS[mask] is None else jnp.asarray(rng.random(MASKS[mask]) > 0.5).at[..., -1, :3].set(False)
    of_out, of_normaliser = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 7, 4, 8), (2, 7, 4))
    )

    def results(backend):
        def loss(*args):
            out, normaliser = attend_with_normaliser(*args, mask=drawn, causal=causal, backend=backend)
            normaliser = jnp.where(normaliser < -1e37, 0, normaliser)  # of a query that sees nothing
            return (out * of_out).sum() + (normaliser * of_normaliser).sum(), (out, normaliser)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)

    plain, chunked = results("xla"), results("chunked")
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_chunked_takes_no_more_queries_than_there_are():
    """Fewer keys than queries in causal order: the first queries see nothing and get the mean."""
    inputs = random_inputs(queries=9, keys=5)
    plain, chunked = (attend(*inputs, causal=True, backend=name) for name in ("xla", "chunked"))
    np.testing.assert_allclose(plain, chunked, atol=1e-6)
    np.testing.assert_allclose(chunked[:, 0, 0], inputs[2][:, :, 0].mean(1), atol=1e-6)


def test_row_without_keys_is_finite():
    query, key, value = random_inputs()
    out = attend(query, key, value, mask=jnp.zeros((2, 1, 1, 7), bool))
    np.testing.assert_allclose(out[0, 0, 0], value[0, :, 0].mean(0), atol=1e-6)


def test_bfloat16_scores_are_float32():
    query, key, value = (x.astype(jnp.bfloat16) for x in random_inputs())
    assert attend(query, key, value).dtype == jnp.bfloat16
    jaxpr = str(jax.make_jaxpr(attend)(query, key, value))
    assert "exp f32" in jaxpr or ":f32[2,2,2,7,7] = exp" in jaxpr


def test_bad_arguments_are_refused():
    query, key, value = random_inputs(heads=3, key_heads=2)
    with pytest.raises(ValueError, match="not a multiple"):
        attend(query, key, value)
    with pytest.raises(ValueError, match="Unknown attention backend"):
        attend(*random_inputs(), backend="magic")
