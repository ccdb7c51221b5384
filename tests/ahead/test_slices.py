"""Small models compiled for slices of TPUs that are not here: what lies where, and what is sent between chips."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pixelstory_jax.ahead.programs import LARGE, Program, answer_program, story_program, training_program
from pixelstory_jax.ahead.report import compile_ahead, table, too_large
from pixelstory_jax.models.attention import attend
from pixelstory_jax.models.convolution import Upsample
from pixelstory_jax.models.llama import Llama, LlamaConfig
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives.losses import next_token_loss
from pixelstory_jax.objectives.pixellm import SHARDING_RULES
from pixelstory_jax.objectives.storydiffusion import SHARDING_RULES as STORY_RULES
from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.optimizer import build_optimizer
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.sharding import batch_sharding, build_mesh
from pixelstory_jax.training.state import build_step, make_state, state_shardings
from tests.objectives.smallest import smallest_pixellm
from tests.story_sizes import smallest_story_config

pytest.importorskip("libtpu", reason="the compiler for TPUs is an extra: pip install -e '.[aot]'")
from pixelstory_jax.ahead.slices import Slice

ROOT = Path(__file__).resolve().parents[2]
SIZES = LlamaConfig(
    vocab=512, width=256, layers=4, heads=4, kv_heads=4, mlp_width=512, dtype="bfloat16", remat="full", max_length=256
)
ROWS, LENGTH = 8, 256


class LanguageModel:
    """The least objective with the network that matters most."""

    name, sharding_rules, next_command = "language", SHARDING_RULES, ""
    batch_spec = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32) for name in ("tokens", "labels")}

    def init(self, rng):
        tokens = jnp.zeros((1, LENGTH), jnp.int32)
        return {"llama": Llama(SIZES).init(rng, tokens, tokens == 0, method=Llama.whole)["params"]}

    def loss(self, params, batch, rng):
        tokens = batch["tokens"]
        logits = Llama(SIZES).apply({"params": params["llama"]}, tokens, tokens >= 0, method=Llama.whole)
        return next_token_loss(logits, batch["labels"]), {}

    def trainable(self, path):
        return True


def language_program(mesh, optimizer="adamw"):
    objective, options = LanguageModel(), TrainOptions(batch_size=ROWS, optimizer=optimizer)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    transform = build_optimizer(options, flatten(params))
    shapes = jax.eval_shape(lambda: make_state(objective, transform, 0.0, 0))
    where = state_shardings(shapes, SHARDING_RULES, mesh)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    batch = {name: place(leaf, batch_sharding(mesh, ROWS)) for name, leaf in objective.batch_spec.items()}
    step = jax.jit(build_step(objective, transform, options, 0), donate_argnums=0, out_shardings=(where, None))
    return Program("", step, (jax.tree.map(place, shapes, where), batch), mesh, {}, None, "example", ROWS, ())


@pytest.fixture(scope="module")
def v5e():
    return Slice("v5e:2x2")


@pytest.fixture(scope="module")
def fsdp(v5e):
    return compile_ahead(language_program(build_mesh({"fsdp": 4}, v5e.devices)), v5e)


def test_fully_sharded_training_gathers_parameters_and_nothing_else(fsdp):
    """Parameters are gathered in bfloat16, gradients summed; activations stay with their examples."""
    params = flatten(jax.eval_shape(LanguageModel().init, jax.random.key(0)))
    layers = sum(math.prod(leaf.shape) for path, leaf in params.items() if "layers/" in path)
    total = sum(math.prod(leaf.shape) for leaf in params.values())
    gathered = sum(one.bytes for one in fsdp.collectives if one.operation in ("all-gather", "collective-permute"))
    # Forward, recomputation and backward of the layers; embedding and head twice at most, and in float32.
    assert layers * 2 <= gathered <= 3.2 * layers * 2 + 3 * (total - layers) * 4
    summed = sum(one.bytes for one in fsdp.collectives if one.operation in ("all-reduce", "reduce-scatter"))
    assert summed <= 1.2 * total * 4
    activation = ROWS * LENGTH * SIZES.width
    for one in fsdp.collectives:
        shape = [int(size) for size in one.largest.split("[")[1].rstrip("]").split(",") if size]
        assert not (len(shape) >= 3 and math.prod(shape) == activation and shape[0] == ROWS), one
    assert {one.axes for one in fsdp.collectives} == {"fsdp"}


def test_loops_and_recomputation_are_in_the_count(fsdp):
    """Three passes of the layers (forward, again, and two products backward), where XLA counts one layer."""
    per_token = SIZES.layers * (4 * SIZES.width**2 + 3 * SIZES.width * SIZES.mlp_width)
    per_token_attention = SIZES.layers * 2 * LENGTH * SIZES.width
    head = SIZES.width * SIZES.vocab
    tokens = ROWS * LENGTH / 4
    expected = 2 * tokens * (4 * (per_token + per_token_attention) + 3 * head)
    np.testing.assert_allclose(fsdp.program_flops, expected, rtol=0.1)
    assert fsdp.xla_flops < 0.6 * fsdp.program_flops


def test_kernels_are_in_the_count(v5e):
    """One product of scores is 2 B N T S H operations; two of them forward, and five backward in one kernel."""
    mesh = build_mesh({"data": 4}, v5e.devices)
    query = jax.ShapeDtypeStruct((8, 1024, 4, 128), jnp.bfloat16, sharding=batch_sharding(mesh, 8))
    gradient = jax.jit(jax.grad(lambda query: attend(query, query, query).astype(jnp.float32).sum()))
    report = compile_ahead(Program("", gradient, (query,), mesh, {}, None, "run", 1, ()), v5e)
    assert report.program_flops == 7 * 2 * 2 * 4 * 1024 * 1024 * 128
    assert report.memory["temporaries"] < 2 * 4 * 1024 * 1024 * 4  # no scores in memory


def test_convolutions_gather_kernels_and_send_no_pictures(v5e):
    """Left to itself the compiler sends the enlarged pictures from chip to chip, each convolving its own channels."""
    mesh = build_mesh({"fsdp": 4}, v5e.devices)
    layer, channels = Upsample(512, dtype="bfloat16"), 512
    pictures = jax.ShapeDtypeStruct((4, 64, 64, channels), jnp.bfloat16, sharding=batch_sharding(mesh, 4))
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, channels))))["params"]["conv"]
    rule = next(spec for pattern, spec in STORY_RULES if "conv" in pattern)
    places = {"kernel": NamedSharding(mesh, rule), "bias": NamedSharding(mesh, PartitionSpec())}
    placed = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name]) for name, leaf in params.items()
    }

    def means(params, x):
        return layer.apply({"params": {"conv": params}}, x).astype(jnp.float32).mean((0, 1, 2))

    report = compile_ahead(Program("", jax.jit(means), (placed, pictures), mesh, {}, None, "run", 1, ()), v5e)
    kernel = 9 * channels * channels * 2  # bytes, in bfloat16
    assert sum(one.bytes for one in report.collectives) <= kernel + 4 * channels * 4


def test_tensor_axis_sums_activations(v5e):
    report = compile_ahead(language_program(build_mesh({"fsdp": 2, "tensor": 2}, v5e.devices)), v5e)
    axes = {(one.operation, one.axes) for one in report.collectives}
    assert any(axis == "fsdp" for _, axis in axes) and any(axis == "tensor" for _, axis in axes)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_optimizer_state_lies_like_its_parameters(v5e, optimizer):
    mesh = build_mesh({"fsdp": 2, "tensor": 2}, v5e.devices)
    state = language_program(mesh, optimizer).arguments[0]
    params = {path: leaf for path, leaf in flatten(state.params).items()}
    seen = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        name = next((getattr(key, "key", None) for key in path if getattr(key, "key", None) in params), None)
        if name is not None and leaf.shape == params[name].shape:
            assert leaf.sharding == params[name].sharding
            seen += not leaf.sharding.is_fully_replicated
    assert seen >= (0 if optimizer == "adafactor" else 8)
    large = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size * 4 > LARGE]
    assert not [leaf for leaf in large if leaf.sharding.is_fully_replicated]


def test_programs_with_sparse_cores_are_read():
    """A v6e looks up embeddings on its SparseCores, by instructions that jaxlib refuses to read from an executable."""
    v6e = Slice("v6e:2x2")
    mesh = build_mesh({"fsdp": 4}, v6e.devices)
    whole = NamedSharding(mesh, PartitionSpec())
    table, index = (
        jax.ShapeDtypeStruct(shape, kind, sharding=whole)
        for shape, kind in (((912, 160), "float32"), ((2048,), "int32"))
    )
    look_up = jax.jit(lambda table, index: jnp.take(table, index, axis=0, mode="clip") * 2)
    report = compile_ahead(Program("", look_up, (table, index), mesh, {}, None, "run", 1, ()), v6e)
    assert report.fits and report.hbm_bytes >= 2048 * 160 * 4


def test_bandwidth_follows_the_sides():
    """A row of v5e:4x4 has open ends (one link); of v5e:16x16 closed ones (two); both sides together are twice that."""
    small, large = Slice("v5e:4x4"), Slice("v5e:16x16")
    row = [number for number, device in enumerate(small.devices) if device.coords[1] == 0]
    assert small.bandwidth(row, small.devices) == 4.5e10
    assert small.bandwidth(range(16), small.devices) == 9e10
    assert large.bandwidth(range(256), large.devices) == 18e10


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v5e", "names no slice"),
        ("v9:2x2", "names no slice"),
        ("v5e:2x2x2", "has 2 sides"),
        ("v5e:3x5", "knows no such"),
    ],
)
def test_slices_that_do_not_exist(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Slice(name)


def test_what_does_not_fit_is_told(v5e):
    mesh = build_mesh({"data": 4}, v5e.devices)
    square = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32)
    function = jax.jit(lambda x: jnp.tanh(x @ x))
    program = Program("too large", function, (square,), mesh, {"parameters": 17.2e9}, None, "run", 1, ())
    report = compile_ahead(program, v5e)
    assert not report.fits and report.memory["peak"] > report.limit
    text = table(report)
    assert "does not fit" in text and "What helps" in text and "GB too many" in text


def test_the_compilers_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.\n\n  Largest program allocations in hbm:\n\n  1. Size: 12.00G\n"
        '     Operator: op_name="jit(step)/dot" source_file="x.py"\n     Shape: f32[3,1073741824]{1,0:T(8,128)}\n'
    )
    used, lines = too_large(message)
    assert used == 20.5 * 2**30
    short = "E1000: Ran out of memory on HBM, the total memory required for HLO temporaries (32.00G) exceeds available"
    assert too_large(short) == (32 * 2**30, ())
    assert lines == ("12.00G  f32[3,1073741824]  jit(step)/dot",)


def test_answers(v5e):
    """Prefill and every step of the decoding are counted: what a token costs, times the tokens."""
    config = smallest_pixellm()
    reports = []
    for new_tokens in (8, 16):
        config.eval.max_new_tokens = new_tokens
        reports.append(compile_ahead(answer_program(config, build_mesh({"data": 4}, v5e.devices), 32), v5e))
    sizes = config.model.llama
    per_layer = 4 * sizes.width**2 + 3 * sizes.width * sizes.mlp_width
    token = 2 * (sizes.layers * per_layer + sizes.width * sizes.vocab)
    more = reports[1].program_flops - reports[0].program_flops
    rows = 32 / 4  # of a chip; products of a single row would be written as sums
    assert 8 * rows * token <= more <= 2 * 8 * rows * token  # attention over the cache included
    assert all(report.unit == "answer" and not report.collectives for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_smallest_pixellm(v5e, mesh):
    config = smallest_pixellm()
    config.train.batch_size = 4
    program = training_program(config, build_mesh(mesh, v5e.devices))
    report = compile_ahead(program, v5e)
    assert report.fits and report.mfu is not None and 0 < report.mfu < 1
    json.dumps(report.as_json())


@pytest.mark.slow
def test_traffic_of_a_story_grows_with_its_panels(v5e):
    """Sampled tokens are exchanged, and nothing else that grows: twice the panels, twice the bytes."""
    config = smallest_story_config()
    mesh = build_mesh({"data": 2, "fsdp": 2}, v5e.devices)
    four, eight = (compile_ahead(story_program(config, mesh, panels), v5e) for panels in (4, 8))
    received = [sum(one.traffic for one in report.collectives) for report in (four, eight)]
    assert 1.6 * received[0] < received[1] < 2.4 * received[0]


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "report.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-m", "experiments.compile_ahead", "--config=configs/pixellm.py", "--topology=v5e:2x2"]
    done = subprocess.run(
        [*call, "--batch=4", "--mesh=fsdp=4", f"--out={out}"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "MFU at most" in done.stdout and "Compiled in" in done.stdout
    written = json.loads(out.read_text())
    assert written["fits"] and written["note"] == "compiled, not run" and written["mesh"]["fsdp"] == 4
    wrong = subprocess.run([*call, "--mesh=fsdp"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert wrong.returncode == 2 and wrong.stderr.startswith("Error: --mesh=fsdp is not of the form"), wrong.stderr
