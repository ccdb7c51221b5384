"""What each remat policy computes a second time, and that none of them changes a gradient."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from pixelstory_jax.models.attention import attention_backend
from pixelstory_jax.models.layers import REMATS
from pixelstory_jax.models.llama import Llama, LlamaConfig
from tests.models.small import random_like

TOKENS = 5


def gradient(remat: str):
    model = Llama(LlamaConfig(vocab=11, width=8, layers=2, heads=2, kv_heads=2, mlp_width=24, remat=remat))
    text = jnp.arange(TOKENS)[None], jnp.ones((1, TOKENS), bool)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), *text, method="whole"))["params"])

    def loss(params):
        return (model.apply({"params": params}, *text, method="whole") ** 2).sum()

    return jax.grad(loss), params


def operations(jaxpr) -> collections.Counter:
    """Equations by primitive, those of inner programs too; a layer's once, as it is scanned."""
    count: collections.Counter = collections.Counter()
    for equation in jaxpr.eqns:
        count[equation.primitive.name] += 1
        if equation.primitive.name != "pallas_call":
            count.update(sum(map(operations, core.jaxprs_in_params(equation.params)), collections.Counter()))
    return count


def test_what_is_computed_twice():
    """A layer has seven products with weights, and one attention, which is a kernel here."""
    products, kernels = {}, {}
    for remat in REMATS:
        with attention_backend("splash"):
            function, params = gradient(remat)
            count = operations(partial_eval.dce_jaxpr(jax.make_jaxpr(function)(params).jaxpr, True)[0])
        products[remat], kernels[remat] = count["dot_general"], count["pallas_call"]
    assert kernels == {"none": 2, "full": 3, "attention": 2, "narrow": 2, "dots": 2}
    least = products["none"]
    again = {remat: count - least for remat, count in products.items()}
    assert again == {"none": 0, "full": 6, "attention": 6, "narrow": 2, "dots": 0}


def test_no_policy_changes_a_gradient():
    results = []
    for remat in REMATS:
        with attention_backend("splash"):
            function, params = gradient(remat)
            results.append(jax.tree.leaves(jax.jit(function)(params)))
    for other in results[1:]:
        for ours, plain in zip(other, results[0], strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
