"""A toy objective in plain JAX: fit a small network to a fixed function. Also run as a program by the tests."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pixelstory_jax.objectives.objective import Evaluation

WIDTH = 16


@dataclass
class ToyObjective:
    """x [B, 8] -> y [B, 4]; `frozen` is part of the function but not trained. Dropout makes the loss depend on rng."""

    batch_size: int = 16
    name: str = "toy"
    next_command: str = "python -m experiments.nothing --checkpoint={workdir}"
    nan_at: int = -1
    best_at: int = -1  # the step with the highest score; -1: the last one
    sharding_rules: tuple[tuple[str, PartitionSpec], ...] = (
        ("first/kernel$", PartitionSpec("fsdp", "tensor")),
        ("second/kernel$", PartitionSpec("tensor", "fsdp")),
    )

    @property
    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        b = self.batch_size
        return {
            "x": jax.ShapeDtypeStruct((b, 8), jnp.float32),
            "y": jax.ShapeDtypeStruct((b, 4), jnp.float32),
            "index": jax.ShapeDtypeStruct((b,), jnp.int32),
        }

    @property
    def contents(self) -> dict[str, int]:
        return {"words": 8}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        a, b, c = jax.random.split(rng, 3)
        return {
            "frozen": {"kernel": jax.random.normal(c, (8, 8)) / 8**0.5},
            "first": {"kernel": jax.random.normal(a, (8, WIDTH)) / 8**0.5, "bias": jnp.zeros(WIDTH)},
            "second": {"kernel": jax.random.normal(b, (WIDTH, 4)) / WIDTH**0.5},
        }

    def starting_weights(self) -> dict[str, Any]:
        return {}

    def trainable(self, path: str) -> bool:
        return not path.startswith("frozen/")

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"] @ params["frozen"]["kernel"]
        hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
        keep = jax.random.bernoulli(rng, 0.9, hidden.shape)
        error = jnp.square((hidden * keep) @ params["second"]["kernel"] - batch["y"]).mean()
        if self.nan_at >= 0:
            error = jnp.where(jnp.any(batch["index"] == self.nan_at), jnp.nan, error)
        return error, {"error": error, "index_sum": batch["index"].sum().astype(jnp.float32)}

    def evaluate(self, params: Any, step: int) -> Evaluation:
        size = float(jnp.square(params["second"]["kernel"]).sum())
        if os.environ.get("TOY_SLOW_EVALUATION"):
            print("evaluating", flush=True)
            time.sleep(float(os.environ["TOY_SLOW_EVALUATION"]))
        return Evaluation(
            metrics={"size": size},
            score=float(step if self.best_at < 0 else -abs(step - self.best_at)),
            table=f"size {size:.3f}",
            images={"sheet": np.full((8, 8, 3), step % 255, np.uint8)},
            records=[{"step": step}],
        )

    def describe(self) -> str:
        return "a toy, from random numbers"


class ToySource:
    """Example i is a function of i."""

    def __init__(self, length: int = 100, broken: int = -1, delay: float = 0.0, nan: int = -1) -> None:
        self._length, self._broken, self._delay, self._nan = length, broken, delay, nan
        self.reads: list[int] = []  # the examples that were asked for

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.reads.append(index)
        if index == self._broken:
            raise OSError("picture is truncated")
        time.sleep(self._delay)
        x = np.random.default_rng(index).normal(size=8).astype(np.float32)
        y = np.sin(x[:4] * 2 + x[4:])
        return {"x": x * np.nan if index == self._nan else x, "y": y, "index": np.int32(index)}


def toy_config(**train: Any) -> dict[str, Any]:
    defaults = {"steps": 12, "batch_size": 16, "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 4, "ema": 0.9}
    return {
        "name": "toy",
        "seed": 3,
        "objective": "toy",
        "model": {"width": WIDTH},
        "train": {**defaults, "weight_decay": 0.01, **train},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per example")
    parser.add_argument("--data", type=int, default=-1)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--process", type=int, default=-1)
    parser.add_argument("--heartbeat", type=int, default=100, help="seconds after which a silent process is dead")
    parser.add_argument("--kill-at", type=int, default=-1, help="SIGKILL to itself once this step has begun")
    parser.add_argument("--kill-after-evaluation", action="store_true", help="SIGKILL to itself when one is written")
    parser.add_argument("--kill-within", default="", help="SIGKILL to itself at an operation on files of this folder")
    parser.add_argument("--kill-operation", type=int, default=1, help="which operation of --kill-within")
    parser.add_argument("--broken", type=int, default=-1, help="an example that cannot be read")
    parser.add_argument("--nan", type=int, default=-1, help="an example whose field x is not a number")
    parser.add_argument("--profile", default="", help="steps to trace, as profile.steps")
    parser.add_argument("--report-shardings", action="store_true", help="print the partition of each leaf as JSON")
    parser.add_argument("--report-reads", action="store_true", help="print which examples were asked for, as JSON")
    arguments = parser.parse_args()

    from pixelstory_jax.training import processes
    from pixelstory_jax.training.errors import UserError
    from pixelstory_jax.training.loop import train

    mesh = {"data": arguments.data, "fsdp": arguments.fsdp, "tensor": arguments.tensor}
    config = {**toy_config(mesh=mesh, steps=arguments.steps), "profile": {"steps": arguments.profile}}
    source = ToySource(broken=arguments.broken, delay=arguments.delay, nan=arguments.nan)
    if arguments.kill_at >= 0:
        kill_at_step(arguments.kill_at)
    if arguments.kill_after_evaluation:
        kill_after_evaluation()
    if arguments.kill_within:
        kill_at_file_operation(arguments.kill_within, arguments.kill_operation)
    if arguments.report_shardings:
        report_shardings()
    try:
        processes.initialize_distributed(
            arguments.coordinator, arguments.processes, arguments.process, arguments.heartbeat
        )
        train(config, ToyObjective(), source, arguments.workdir)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        processes.leave(SystemExit(2))
        sys.exit(2)
    except Exception as error:
        processes.leave(error)
        raise
    if arguments.report_reads:
        print("\n" + json.dumps({"process": arguments.process, "reads": source.reads}), flush=True)


def kill_at_step(step: int) -> None:
    from pixelstory_jax.data import pipeline

    original, calls = pipeline.BatchIterator.__next__, [0]

    def killing(self: Any) -> Any:
        calls[0] += 1
        if calls[0] > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    pipeline.BatchIterator.__next__ = killing  # type: ignore[method-assign]


def kill_after_evaluation() -> None:
    from pixelstory_jax.training import loop

    write = loop.write_evaluation

    def write_and_die(*values: Any) -> None:
        write(*values)
        os.kill(os.getpid(), signal.SIGKILL)

    loop.write_evaluation = write_and_die


def kill_at_file_operation(folder: str, operation: int) -> None:
    """Python tells of each operation (opening, making, renaming, removing, listing) before it is done."""
    count = 0

    def hear(event: str, values: Any) -> None:
        nonlocal count
        if event.startswith(("open", "os.", "shutil.")) and any(folder in str(value) for value in values[:2]):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def report_shardings() -> None:
    from pixelstory_jax.training import loop

    save = loop._Run._save

    def reporting(self: Any) -> None:
        save(self)
        leaves = jax.tree_util.tree_flatten_with_path(self.state)[0]
        if self.step == 12:
            print(json.dumps({jax.tree_util.keystr(path): list(leaf.sharding.spec) for path, leaf in leaves}))

    loop._Run._save = reporting  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
