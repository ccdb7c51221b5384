"""A step of PixelLM and of StoryDiffusion on eight simulated devices, sharded every way, equals the step on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixelstory_jax.data import build_source
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.objectives import build_objective
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.sharding import build_mesh, global_batch
from pixelstory_jax.training.state import TrainState, build_step, split_trained, state_shardings
from tests.objectives.smallest import drawn_params, smallest_pixellm
from tests.story_sizes import smallest_story_config

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4
CONFIGS = {"pixellm": smallest_pixellm, "storydiffusion": smallest_story_config}


def compare(name: str) -> None:
    """In a process with eight devices: prints the largest differences, and how many arrays are really cut."""
    config = CONFIGS[name]()
    config.train.batch_size = BATCH
    objective, source = build_objective(config), build_source(config, "train")
    batch = stack_examples([source[index] for index in range(BATCH)], range(BATCH))
    params = drawn_params(objective)
    optimizer = optax.sgd(0.1)  # steps in proportion to gradients, where Adam would blow up their rounding errors
    options = TrainOptions(batch_size=BATCH)
    losses, updated = [], []
    for sizes, devices in (({}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 8)):
        mesh = build_mesh(sizes, jax.devices()[:devices])
        with jax.sharding.set_mesh(mesh):
            opt_state = optimizer.init(split_trained(params, objective.trainable)[0])
            state = TrainState(jnp.zeros((), jnp.int32), params, opt_state, None)
            shardings = state_shardings(jax.eval_shape(lambda state=state: state), objective.sharding_rules, mesh)
            step = jax.jit(build_step(objective, optimizer, options, 0), out_shardings=(shardings, None))
            after, scalars = step(jax.device_put(state, shardings), global_batch(batch, mesh, BATCH))
        losses.append(float(scalars["loss"]))
        updated.append({path: np.asarray(value) for path, value in flatten(after.params).items()})
        cut = sum(not value.sharding.is_fully_replicated for value in flatten(after.params).values())
    start, (one, eight) = flatten(params), updated
    moved = max(np.abs(one[path] - start[path]).max() for path in one)
    apart = max(np.abs(one[path] - eight[path]).max() for path in one)
    print(f"RESULT {losses[0]} {losses[1]} {moved} {apart} {cut}")


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_equal_one(name):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.objectives.test_devices", name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, eight, moved, apart, cut = map(float, done.stdout.split("RESULT")[1].split())
    assert abs(one - eight) < 1e-5 * abs(one)
    assert moved > 1e-3 and apart < 1e-5
    assert cut >= 5  # a good part of the parameters is spread over the devices


if __name__ == "__main__":
    compare(sys.argv[1])
