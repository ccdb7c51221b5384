"""schedulers.npz: noise tables, timesteps, and trajectories of a fake network."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.inference import schedulers
from pixelstory_jax.inference.noise_schedule import add_noise
from pixelstory_jax.inference.schedulers import Plan, Row, SamplerConfig
from tests.golden_cases.fixture import Fixture


def _fake_network(rule: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`rule` in words: "eps = FACTOR * scale_model_input(x, t) + sin(t / PERIOD), ..."."""
    numbers = re.match(r"eps = (\S+) \* scale_model_input\(x, t\) \+ sin\(t / (\S+)\)", rule)
    assert numbers, f"the fake model is {rule!r}, which this case cannot compute"
    factor, period = map(float, numbers.groups())
    return lambda x, t: factor * x + jnp.sin(t / period)


def _trajectory(plan: Plan, noise: np.ndarray, network: Callable) -> tuple[np.ndarray, np.ndarray]:
    """x at the start and after every step [S + 1, ...], and the network's inputs [S, ...]."""

    @jax.jit
    def run(rows: Row, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(carry: tuple, row: Row) -> tuple:
            x, state = carry
            seen = schedulers.scale_input(row, x)
            x, state = schedulers.step(row, state, x, network(seen, row.timestep))
            return (x, state), (x, seen)

        return jax.lax.scan(one, (x, schedulers.init(x)), rows)[1]

    start = noise * np.float32(plan.init_sigma)
    later, inputs = run(plan.rows, start)
    return np.concatenate([start[None], later]), np.asarray(inputs)


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    configs = {
        name: SamplerConfig.from_diffusers({**options, "_class_name": options["class_name"]})
        for name, options in fixture.meta["configs"].items()
    }
    network = _fake_network(fixture.meta["fake_model"])
    noise = fixture.inputs["noise"]
    ours: dict[str, np.ndarray] = {}
    for name, config in configs.items():
        ours[f"{name}/alphas_cumprod"] = config.schedule.alphas_cumprod()
        lengths = {path.split("/")[1] for path in fixture.expected if path.startswith(f"{name}/")}
        for steps in sorted(int(length) for length in lengths if length.isdecimal()):
            plan = schedulers.plan(config, steps)
            found = {"timesteps": plan.rows.timestep, "init_noise_sigma": np.float32(plan.init_sigma)}
            found["trajectory"], found["model_input"] = _trajectory(plan, noise, network)
            if config.kind != "ddim":
                found["sigmas"] = schedulers.sigma_grid(config, steps)[1]
            ours |= {f"{name}/{steps}/{key}": value for key, value in found.items()}
    for path in fixture.expected:
        kind, _, name = path.partition("/")
        if kind == "add_noise":
            table = configs[name].schedule.alphas_cumprod()
            x0, timesteps = fixture.inputs["add_noise/x0"], fixture.inputs["add_noise/timesteps"]
            ours[path] = np.asarray(add_noise(table, x0, noise, timesteps))
    return {path: ours[path] for path in fixture.expected if path in ours}  # not every file has all of them
