"""Stories whose panels lie over eight simulated devices: pictures as on one device, and only sampled tokens travel."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixelstory_jax.evaluation.stories import paint_stories
from pixelstory_jax.inference.painter import Painter, PaintOptions, story_mesh
from pixelstory_jax.inference.schedulers import SamplerConfig
from pixelstory_jax.inference.sharing import SharingPlan
from pixelstory_jax.inference.story_painter import Shot, StoryPainter
from pixelstory_jax.models.consistent_attention import Sample, SelfAttention, Sharing, see_each_other
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion
from pixelstory_jax.objectives.storydiffusion import SHARDING_RULES
from pixelstory_jax.training.sharding import build_mesh, partition
from tests.inference.test_painter import CONFIG, TOKENIZER, UNET
from tests.models.small import random_like

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTH, SAMPLED, GROUPS = 64, 32, 16, 2
PLANS = {
    "joint": SharingPlan("joint", window=0),
    "windows": SharingPlan("joint", window=3),
    "bank": SharingPlan("bank", anchors=2),
    "alone": None,
}


def small_painter(mesh: Mesh | None = None) -> Painter:
    config = dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, channels=(8, 16), groups=4))
    model = StoryDiffusion(config)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0)))
    return Painter(model, params, {"text": TOKENIZER, "text_2": TOKENIZER}, SamplerConfig(), True, mesh)


def painted(panels: int, *plans: str) -> dict[str, tuple[float, float]]:
    """The largest difference between pictures of eight devices and of one, and their spread, of 0..255."""
    painters = [small_painter(mesh) for mesh in (None, story_mesh())]
    shots = [Shot("a fox", (0,), (number,)) for number in range(panels)]
    results = {}
    for name in plans:
        stories = [StoryPainter(painter, PLANS[name], PaintOptions(2, height=32, width=32)) for painter in painters]
        one, eight = (story.paint(shots, [Shot("a fox", (0,), (9, 0))]).pictures.astype(float) for story in stories)
        results[name] = float(np.abs(one - eight).max()), float(one.std())
    return results


def evaluated(stories: int) -> dict[str, tuple[float, float]]:
    """The same in the evaluation of a training run, on its mesh and with its sharded parameters."""
    painter = small_painter()
    given = PaintOptions(2, height=32, width=32), PLANS["joint"], [["a fox", "a cat"]] * stories, [(1,), (2,)], 0
    one = paint_stories(painter, *given).astype(float)
    mesh = build_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    painter = small_painter()
    painter.params = unflatten(
        {
            path: jax.device_put(leaf, NamedSharding(mesh, partition(path, leaf.shape, SHARDING_RULES, mesh)))
            for path, leaf in flatten(painter.params).items()
        }
    )
    with jax.sharding.set_mesh(mesh):
        eight = paint_stories(painter, *given).astype(float)
    return {"joint": (float(np.abs(one - eight).max()), float(one.std()))}


def traffic(panels: int, window: str) -> dict[str, float]:
    """Bytes that a device receives in one shared layer, by kind of collective, and how far from one device it is."""
    mesh, layer = story_mesh(), SelfAttention(WIDTH, 2)
    assert mesh is not None
    index = np.random.default_rng(0).random((panels, TOKENS)).argsort()[:, :SAMPLED].astype(np.int32)
    sample = Sample(np.ones(index.shape, bool), index)
    sharing = Sharing(np.asarray(see_each_other(panels)), {TOKENS: sample}, window=int(window))

    def out(params, x):
        return layer.apply({"params": params}, x, sharing, np.bool_(True))[0]

    x = np.random.default_rng(1).standard_normal((GROUPS * panels, TOKENS, WIDTH)).astype(np.float32)
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    one = jax.jit(out)(params, x)
    by_panel, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ()))
    placed = jax.device_put(params, whole), jax.device_put(x, by_panel)
    with jax.sharding.set_mesh(mesh):
        compiled = jax.jit(out, out_shardings=by_panel).lower(*placed).compile()
    apart = np.abs(np.asarray(compiled(*placed)) - one).max() / np.abs(one).max()
    return {"apart": float(apart), **received(compiled.as_text(), mesh.shape["fsdp"])}


def received(text: str, group: int) -> dict[str, int]:
    """Of a compiled program whose collectives are among so many devices; float32 results, one or a tuple of them."""
    total: dict[str, int] = {}
    found = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shapes, kind in re.findall(found, text):
        sizes = [np.prod([int(size) for size in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", shapes)]
        total[kind] = total.get(kind, 0) + int(4 * sum(sizes)) * (group - 1) // group
    return total


def run(what: str, panels: int, *more: str) -> dict:
    """In a process with eight devices."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.inference.test_sharded_stories", what, str(panels), *more]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize(
    "panels, plans",
    [(8, ["joint"]), *(pytest.param(panels, list(PLANS), marks=pytest.mark.slow) for panels in (8, 6))],
)
def test_eight_devices_paint_what_one_does(panels, plans):
    """Also a number of panels that the devices do not divide. Bytes may round differently, by one."""
    for name, (apart, spread) in run("painted", panels, *plans).items():
        assert apart <= 1 and spread > 20, name


@pytest.mark.slow
def test_a_sharded_training_run_paints_what_one_device_does():
    ((apart, spread),) = run("evaluated", 2).values()
    assert apart <= 1 and spread > 20


@pytest.mark.parametrize("panels, window", [(8, 0), (16, 0), (32, 0), (16, 3)])
def test_only_sampled_tokens_travel(panels, window):
    """Keys and values of the other devices' panels: linear in the panels, and the rate of what all tokens would be."""
    others = panels * 3 // 4  # of four devices with the panels of one half of guidance
    measured = run("traffic", panels, str(window))
    assert measured.pop("apart") < 1e-5
    assert measured == {"all-gather": 2 * others * SAMPLED * WIDTH * 4}


if __name__ == "__main__":
    measure = {"painted": painted, "evaluated": evaluated, "traffic": traffic}[sys.argv[1]]
    print("RESULT", json.dumps(measure(int(sys.argv[2]), *sys.argv[3:])))
