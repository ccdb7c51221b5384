"""The count of operations against hand counts, against XLA's own count, and against published figures."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pixelstory_jax.models.attention import attend, attention_backend
from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.objectives.flops import count_flops, flops_by_kind, flops_by_scope, flops_of_step, training_flops
from pixelstory_jax.training.optimizer import build_optimizer
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.state import build_step, make_state, split_trained
from tests.training.toy import WIDTH, ToyObjective, toy_config


def flops(function, *shapes):
    return count_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_products_by_hand():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(functools.partial(jnp.einsum, "btnh,bsnh->bnts"), (2, 3, 4, 5), (2, 6, 4, 5)) == 2 * 2 * 4 * 3 * 6 * 5
    assert flops(lambda a: a + jnp.exp(a), (3, 5)) == 0


@pytest.mark.parametrize(
    "window",
    [
        {"padding": "VALID"},
        {"padding": "SAME", "window_strides": (2, 2)},
        {"padding": "SAME", "rhs_dilation": (2, 3)},
        {"padding": ((0, 1), (0, 1)), "window_strides": (2, 2)},
        {"padding": "SAME", "feature_group_count": 2},
        {"padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 2)},
    ],
    ids=str,
)
def test_convolutions_and_their_gradients_as_xla_counts_them(window):
    groups = window.get("feature_group_count", 1)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 9, 8, 4), (3, 3, 4 // groups, 6))]

    def convolve(images, kernel):
        options = {"window_strides": (1, 1), **window, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return jax.lax.conv_general_dilated(images, kernel, **options)

    def pull_back(images, kernel):
        out, back = jax.vjp(convolve, images, kernel)
        return back(jnp.zeros_like(out))

    forward = count_flops(jax.make_jaxpr(convolve)(*shapes))
    assert forward == jax.jit(convolve).lower(*shapes).cost_analysis()["flops"]
    # Convolutions with a group for each part of the batch, among the gradients, are those of the same triples.
    assert count_flops(jax.make_jaxpr(pull_back)(*shapes)) == 3 * forward


def test_loops_branches_and_calls():
    def step(a, b):
        return jax.nn.relu(jax.jit(jnp.dot)(a, b))  # relu is a custom_jvp

    once = 2 * 4**3
    assert flops(step, (4, 4), (4, 4)) == once
    assert flops(lambda a, b: jax.lax.scan(lambda c, _: (step(c, b), None), a, length=5)[0], (4, 4), (4, 4)) == 5 * once
    assert (
        flops(lambda a, b: jax.lax.fori_loop(0, jnp.int32(a[0, 0]), lambda _, c: step(c, b), a), (4, 4), (4, 4)) == once
    )
    cheap_or_not = [lambda a, b: a, lambda a, b: step(step(a, b), b), step]
    assert flops(lambda a, b: jax.lax.switch(jnp.int32(a[0, 0]), cheap_or_not, a, b), (4, 4), (4, 4)) == 2 * once
    # Recomputation is work too: whoever does not want it counted traces without (below).
    assert flops(jax.grad(lambda a, b: step(step(a, b), b).sum()), (4, 4), (4, 4)) == 4 * once
    assert flops(jax.grad(lambda a, b: jax.checkpoint(step)(step(a, b), b).sum()), (4, 4), (4, 4)) == 5 * once


def test_each_shard_counts():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh, rows = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"), auto), PartitionSpec("data")
    product = jax.shard_map(jnp.dot, mesh=mesh, axis_names={"data"}, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(product, (8, 3), (3, 5)) == 2 * 8 * 3 * 5


def test_a_frozen_part_costs_its_forward_pass_only():
    # The first layer needs no gradient of its input, which comes out of the frozen part.
    assert training_flops(ToyObjective()) == 2 * 8 * 8 + 4 * 8 * WIDTH + 6 * WIDTH * 4


@pytest.mark.parametrize("changes", [{}, {"accumulate": 4}, {"optimizer": "muon", "ema": 0.9}], ids=str)
def test_the_traced_step_gives_the_same_count(changes):
    objective, options = ToyObjective(), TrainOptions.from_config(toy_config(**changes)["train"])
    assert flops_of_step(traced_step(objective, options), objective) == 16 * training_flops(objective)


def traced_step(objective, options):
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = build_optimizer(options, split_trained(shapes, objective.trainable)[0])
    state = jax.eval_shape(lambda: make_state(objective, optimizer, options.ema, 0))
    return jax.make_jaxpr(build_step(objective, optimizer, options, 0))(state, objective.batch_spec)


class Words(ToyObjective):
    """The sum of the logits of a language model of two layers, whose head alone is frozen."""

    def __init__(self, remat):
        super().__init__(batch_size=4)
        self.model = Llama(LlamaConfig(vocab=64, width=16, layers=2, heads=2, kv_heads=1, mlp_width=32, remat=remat))

    @property
    def batch_spec(self):
        return {"tokens": jax.ShapeDtypeStruct((4, 8), jnp.int32), "valid": jax.ShapeDtypeStruct((4, 8), jnp.bool)}

    def init(self, rng):
        tokens = jnp.zeros((4, 8), jnp.int32)
        return self.model.init(rng, tokens, tokens > 0, method=Llama.whole)["params"]

    def trainable(self, path):
        return path != "head"

    def loss(self, params, batch, rng):
        return self.model.apply({"params": params}, batch["tokens"], batch["valid"], method=Llama.whole).sum(), {}


def test_how_a_model_is_computed_does_not_change_what_it_needs():
    options = TrainOptions.from_config(toy_config(batch_size=4)["train"])
    plain, frugal = Words("none"), Words("full")
    needed = 4 * training_flops(plain)
    head, scores = 2 * 4 * 8 * 16 * 64, 4 * 4 * 8**2 * 16
    layer = 2 * 4 * 8 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    assert needed == 2 * head + 3 * 2 * (layer + scores)
    assert needed == flops_of_step(traced_step(plain, options), plain)

    step = traced_step(frugal, options)
    second_pass = 2 * (layer + scores - 2 * 4 * 8 * 16 * 32)  # without its last product, which no gradient needs
    assert sum(flops_by_scope(step).values()) == needed + second_pass
    assert needed == flops_of_step(step, frugal) == 4 * training_flops(frugal)

    with attention_backend("chunked"):
        step = traced_step(plain, options)
    assert sum(flops_by_scope(step).values()) > needed
    assert needed == flops_of_step(step, plain)

    with attention_backend("splash"):
        step = traced_step(plain, options)
    with pytest.raises(ValueError, match="Pallas kernel"):
        flops_by_scope(step)
    assert needed == flops_of_step(step, plain)


def test_attention_counts_all_pairs():
    shape = jax.ShapeDtypeStruct((2, 16, 4, 8), jnp.float32)
    assert (
        count_flops(jax.make_jaxpr(functools.partial(attend, causal=True))(shape, shape, shape)) == 4 * 2 * 16**2 * 32
    )


def test_a_kernel_is_refused():
    from jax.experimental import pallas

    def copy(source, target):
        target[...] = source[...]

    kernel = pallas.pallas_call(copy, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    with pytest.raises(ValueError, match="attention backend xla"):
        flops(kernel, (8, 128))


def test_the_vision_tower_needs_the_published_number_of_operations():
    """timm lists 191.1 * 10^9 multiply-adds for vit_large_patch14_clip_336."""
    model = ClipVision(ClipVisionConfig.clip_large_336(dtype="float32"))
    pixels = jax.ShapeDtypeStruct((1, 336, 336, 3), jnp.float32)
    forward = functools.partial(model.apply, patch_valid=None, feature_layers=(24,))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(pixels.shape), None, (24,)))
    counted = count_flops(jax.make_jaxpr(forward)(params, pixels))
    assert counted / 2 == 24 * (577 * 12 * 1024**2 + 2 * 577**2 * 1024) + 576 * 3 * 14**2 * 1024
    assert counted / 2e9 == pytest.approx(191.1, rel=0.001)


def test_a_language_model_needs_six_operations_a_parameter_and_token_and_attention():
    config, tokens = LlamaConfig.llama_7b(remat="none"), 2048
    model = Llama(config)
    batch = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1, tokens), jnp.bool)
    params = jax.eval_shape(functools.partial(model.init, method=Llama.whole), jax.random.key(0), *batch)

    def loss(params, tokens, valid):
        return model.apply(params, tokens, valid, method=Llama.whole).sum()

    with attention_backend("xla"):
        counted = count_flops(jax.make_jaxpr(jax.grad(loss))(params, *batch))
    leaves = jax.tree.leaves(params)
    matrices = sum(np.prod(leaf.shape) for leaf in leaves) - config.vocab * config.width  # the embedding is a look-up
    attention = 3 * config.layers * 4 * tokens**2 * config.width
    assert counted == pytest.approx(6 * matrices * tokens + attention, rel=1e-4)  # norms are no products
    norms = (2 * config.layers + 1) * config.width
    assert counted == 6 * (matrices - norms) * tokens + attention


def test_the_7b_model_needs_the_known_number_of_operations():
    """CLIP without its last layer 347, projectors 97, neck 3.4, LLaMA at 320 tokens 2,141, decoder 2.2 (10^9 each)."""
    config = PixelLMConfig.pixellm_7b()
    model, canvas = PixelLM(config), config.vision.canvas
    batch = {
        "image": jax.ShapeDtypeStruct((1, canvas, canvas, 3), "uint8"),
        "image_size": jax.ShapeDtypeStruct((1, 2), "int32"),
        "tokens": jax.ShapeDtypeStruct((1, 1, 320), "int32"),
        "token_valid": jax.ShapeDtypeStruct((1, 1, 320), "bool"),
        "target_positions": jax.ShapeDtypeStruct((1, 1, config.group), "int32"),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    jaxpr = jax.make_jaxpr(model.apply)(params, batch)
    part = {
        name: sum(flops for scope, flops in flops_by_scope(jaxpr).items() if f"/{name}" in scope) / 2e9
        for name in ("vision", "out_mm_projector", "mm_projector", "neck", "llama", "mask_decoder")
    }
    assert part["vision"] == pytest.approx(347, rel=0.01)
    assert part["out_mm_projector"] == pytest.approx(85.9, rel=0.01)
    assert part["mm_projector"] == pytest.approx(10.7, rel=0.01)
    assert part["neck"] == pytest.approx(3.4, rel=0.03)  # that figure multiplies with padding
    assert part["llama"] == pytest.approx(2141, rel=0.01)
    assert part["mask_decoder"] == pytest.approx(2.19, rel=0.03)
    assert count_flops(jaxpr) / 2e9 == pytest.approx(2610, rel=0.02)


def test_kinds_of_operations_add_up_to_all():
    def function(x, image, kernel):
        image = jax.lax.conv_general_dilated(image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)
        return image, x, x.astype("bfloat16") @ x.astype("bfloat16")

    jaxpr = jax.make_jaxpr(function)(jnp.ones((4, 4)), jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 7)))
    kinds = flops_by_kind(jaxpr)
    assert kinds == {
        "conv_general_dilated float32": 2 * 9 * 2 * 7 * 9,
        "dot_general float32": 3 * 2 * 4**3,
        "dot_general bfloat16": 2 * 4**3,
    }
    assert sum(kinds.values()) == count_flops(jaxpr)
