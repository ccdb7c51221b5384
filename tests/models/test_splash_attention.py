"""The TPU kernel: interpreted on the CPU against the other backends, and compiled (not run) for a TPU slice."""

from __future__ import annotations

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixelstory_jax.models import attention
from pixelstory_jax.models.attention import attend, attend_with_normaliser, attention_backend
from pixelstory_jax.models.consistent_attention import Sample, SelfAttention, Sharing, see_each_other
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.splash_attention import block

CASES = {  # queries, keys, query heads, key heads, head width, causal, padded keys
    "text": (77, 77, 2, 2, 40, True, False),
    "padded image tokens": (1025, 1025, 2, 2, 64, False, True),
    "grouped queries, padded prompt": (300, 300, 4, 2, 128, True, True),
    "fewer queries than keys": (100, 257, 2, 1, 80, True, False),
    "gathered keys": (128, 333, 2, 2, 64, False, True),
    "odd length, all keys": (200, 200, 1, 1, 256, False, False),
}


def normal(seed: int, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def close(got, expected, dtype: str = "float32") -> None:
    """To rounding: of float32, or of the bfloat16 that results are stored in."""
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "case, dtype",
    [
        *((case, "float32") for case in CASES),
        *(
            pytest.param(case, "bfloat16", marks=pytest.mark.slow)
            for case in ("text", "grouped queries, padded prompt")
        ),
    ],
)
def test_all_backends_are_equal_forward_and_backward(case, dtype):
    queries, keys, heads, key_heads, width, causal, padded = CASES[case]
    arrays = [
        normal(seed, 2, length, count, width, dtype=dtype)
        for seed, (length, count) in enumerate(((queries, heads), (keys, key_heads), (keys, key_heads)))
    ]
    mask = None
    if padded:
        mask = jnp.asarray(np.random.default_rng(3).random((2, 1, 1, keys)) < 0.7).at[..., 0].set(True)
    weights = normal(4, 2, queries, heads, width)

    def results(backend):
        def loss(*arrays):
            out = attend(*arrays, mask=mask, causal=causal, backend=backend)
            return (out.astype(jnp.float32) * weights).mean(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return out, jax.tree.map(lambda x: x * weights.size, gradients)

    plain = results("xla")
    assert plain[0].dtype == dtype
    for backend in ("chunked", "splash"):
        close(results(backend), plain, dtype)


@pytest.mark.slow
def test_normalisers_are_equal_and_rows_without_keys_are_finite():
    arrays = normal(0, 2, 130, 2, 16), normal(1, 2, 200, 2, 16), normal(2, 2, 200, 2, 16)
    mask = jnp.arange(200)[None, None, None] < jnp.array([150, 0])[:, None, None, None]
    (out, normaliser), expected = (attend_with_normaliser(*arrays, mask=mask, backend=b) for b in ("splash", "xla"))
    close((out[0], normaliser[0]), (expected[0][0], expected[1][0]))
    assert np.isfinite(out[1]).all() and (normaliser[1] < -1e37).all()


def test_what_the_kernel_cannot_serve_goes_to_xla():
    arrays = normal(0, 1, 9, 2, 8), normal(1, 1, 7, 2, 8), normal(2, 1, 7, 2, 8)
    mask = jnp.asarray(np.random.default_rng(3).random((1, 1, 9, 7)) < 0.7).at[..., 0].set(True)
    for given in ({"mask": mask}, {"causal": True}):
        with pytest.raises(ValueError, match="The splash kernel serves"):
            attend(*arrays, **given, backend="splash")
        with attention_backend("splash"):
            np.testing.assert_array_equal(attend(*arrays, **given), attend(*arrays, **given, backend="xla"))


def test_choice_by_device_and_length(monkeypatch):
    """A TPU takes the kernel for long sequences; text, single tokens and other devices do not."""
    sizes = {"image": (4096, 4096), "text": (4096, 77), "token": (1, 2048)}
    for device, expected in (("tpu", ["splash", "xla", "xla"]), ("gpu", ["xla"] * 3)):
        monkeypatch.setattr(attention, "target_device", lambda device=device: device)
        assert [attention.choose_backend(1 << 30, *lengths) for lengths in sizes.values()] == expected
    with attention_backend("chunked"):
        assert attention.choose_backend(1, 1, 1) == "chunked"
    with pytest.raises(ValueError, match="Unknown attention backend"), attention_backend("fast"):
        pass


@pytest.mark.parametrize("length, largest, expected", [(77, 512, 128), (1025, 512, 384), (4096, 1024, 1024)])
def test_blocks_pad_little(length, largest, expected):
    assert block(length, largest) == expected


GROUPS, PANELS, TOKENS, WIDTH = 2, 3, 140, 16
LAYER = SelfAttention(WIDTH, 2)
CHOSEN = np.random.default_rng(0).random((PANELS, TOKENS)).argsort()[:, :50]
SAMPLE = Sample(np.arange(50) < np.array([[50], [50], [20]]), CHOSEN.astype(np.int32))


def test_consistent_attention_is_equal_with_and_without_gradients():
    x = normal(0, GROUPS * PANELS, TOKENS, WIDTH)
    params = LAYER.init(jax.random.key(0), x)["params"]
    sees = np.asarray(see_each_other(PANELS)).copy()
    sees[:, 2] = False
    weights = normal(1, *x.shape)

    def out(params, x, gate):
        return LAYER.apply({"params": params}, x, Sharing(sees, {TOKENS: SAMPLE}), gate)[0]

    @jax.jit
    def results(params, x, gate):
        gradients = jax.grad(lambda *arguments: (out(*arguments, gate) * weights).sum(), (0, 1))(params, x)
        return out(params, x, gate), gradients

    by_backend = []
    for backend in ("splash", "xla"):
        jax.clear_caches()  # a function that is traced keeps its backend
        with attention_backend(backend):
            by_backend.append([results(params, x, np.bool_(gate)) for gate in (True, False)])
    close(*by_backend)


def test_banks_and_windows_are_equal():
    x, bank = normal(0, GROUPS * PANELS, TOKENS, WIDTH), normal(1, GROUPS, PANELS, 50, WIDTH)
    params = LAYER.init(jax.random.key(0), x)
    for sharing in (Sharing(see_each_other(PANELS), {TOKENS: SAMPLE}, window=window) for window in (0, 2)):
        given = None if sharing.window else bank
        results = []
        for backend in ("splash", "xla"):
            with attention_backend(backend):
                results.append(jax.jit(LAYER.apply)(params, x, sharing, np.bool_(True), given)[0])
        close(*results)


@pytest.fixture
def mesh(monkeypatch):
    """Four chips that are not there: two shards of parameters and batch, two of heads."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("Compiling for a TPU needs libtpu.")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh((1, 2, 2), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


def compile_gradient(mesh, function, *arguments, backend=None):
    """The compiled value and gradient of a sum; the first axis of the last argument is cut over `fsdp`."""
    *whole, cut = arguments

    def abstract(tree, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def loss(*arguments):
        return function(*arguments).astype(jnp.float32).sum()

    with attention_backend(backend), jax.sharding.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss, tuple(range(len(arguments)))))
        return gradient.lower(*abstract(whole), abstract(cut, "fsdp")).compile()


def pairs(text: str, tokens: int) -> int:
    """How many arrays of a compiled program have two axes of so many tokens: scores, or masks of pairs."""
    shapes = [[int(size) for size in found.split(",")] for found in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)]
    return sum(sum(size >= tokens for size in shape) >= 2 for shape in shapes)


def has_no_scores(compiled, tokens: int, scores: int) -> bool:
    """Whether a program runs the kernel, and a chip's float32 scores never are in its HBM."""
    text = compiled.as_text()
    assert all([name in text for name in ("splash_mha_fwd", "splash_mha_dkv")])
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * scores
    return pairs(text, tokens) == 0


def test_a_language_model_compiles_for_a_slice_without_scores(mesh):
    sizes = {"width": 512, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 256, "vocab": 32}
    model, tokens = Llama(LlamaConfig(**sizes, dtype="bfloat16", remat="full")), 600

    def hidden(params, embeddings):
        valid = jnp.arange(tokens)[None] < jnp.arange(500, 504)[:, None]
        return model.apply({"params": params}, embeddings, valid)[0]

    text = jax.ShapeDtypeStruct((1, 1), int), jax.ShapeDtypeStruct((1, 1), bool)
    init = partial(model.init, method="whole")
    params = jax.eval_shape(init, jax.random.key(0), *text)["params"]
    compiled = compile_gradient(mesh, hidden, params, jax.ShapeDtypeStruct((4, tokens, 512), jnp.bfloat16))
    assert has_no_scores(compiled, tokens, scores=(4 // 2) * (4 // 2) * tokens**2)


def test_consistent_attention_compiles_for_a_slice_without_scores(mesh):
    layer, tokens, panels = SelfAttention(640, 10, "bfloat16"), 1024, 4
    index = np.sort(np.random.default_rng(0).random((panels, tokens)).argsort()[:, :512])
    sharing = Sharing(see_each_other(panels), {tokens: Sample(np.ones(index.shape, bool), index.astype(np.int32))})

    def out(params, x):
        return layer.apply({"params": params}, x, sharing, np.bool_(True))[0]

    x = jax.ShapeDtypeStruct((2 * panels, tokens, 640), jnp.bfloat16)
    compiled = compile_gradient(mesh, out, jax.eval_shape(layer.init, jax.random.key(0), x)["params"], x)
    assert has_no_scores(compiled, tokens, scores=panels * (10 // 2) * tokens * (tokens + panels * 512))


@pytest.mark.parametrize("width, dtype", [(40, "bfloat16"), (64, "bfloat16"), (80, "bfloat16"), (512, "float32")])
def test_every_head_width_of_ours_compiles(mesh, width, dtype):
    """SD 1.5, SDXL and CLIP, SD 1.5 again, and the autoencoder's single head; 128 is in the language model."""
    x = jax.ShapeDtypeStruct((2, 4096, 2, width), dtype)
    compiled = compile_gradient(mesh, lambda query: attend(query, query, query), x)
    assert has_no_scores(compiled, 4096, scores=4096**2)


def test_without_the_kernel_there_are_scores(mesh):
    x = jax.ShapeDtypeStruct((2, 4096, 2, 64), jnp.bfloat16)
    compiled = compile_gradient(mesh, lambda query: attend(query, query, query), x, backend="xla")
    assert pairs(compiled.as_text(), 4096) and compiled.memory_analysis().temp_size_in_bytes >= 4 * 4096**2
