"""What this machine can do at best: products, convolutions and memory, measured with both libraries."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from experiments.benchmarks.library import load_library
from experiments.benchmarks.row import Stage

KINDS = ("float32", "convolution", "bfloat16")
SIDE, IMAGES, GRID, CHANNELS = 2048, 2, 64, 320
NUMBERS = 1 << 26

Peaks = dict[str, float]  # operations per second by kind, and bytes per second as "memory"


def best_time(run: Callable[[], Any], patience: float) -> float:
    """Seconds of the fastest of all passes within `patience` seconds, after one that does not count."""
    run()
    begin, best = time.perf_counter(), float("inf")
    while time.perf_counter() - begin < patience or best == float("inf"):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def rates(times: Mapping[str, float]) -> Peaks:
    """From seconds to operations (or bytes) per second."""
    product = 2 * SIDE**3
    work = {
        "float32": product,
        "bfloat16": product,
        "convolution": 2 * IMAGES * GRID**2 * 9 * CHANNELS**2,
        "memory": 3 * 4 * NUMBERS,  # two arrays are read, one is written
    }
    return {name: work[name] / seconds for name, seconds in times.items()}


def measure_machine(threads: int, patience: float) -> tuple[Peaks, Peaks]:
    """What JAX and PyTorch reach, each in a process of its own, one after the other; `patience` is for each number."""
    rates = []
    for side in ("ours", "torch"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rates.append(process.submit(_measure_side, side, threads, patience).result())
    return rates[0], rates[1]


def _measure_side(side: str, threads: int, patience: float) -> Peaks:
    load_library(side, threads)
    return our_rates(patience) if side == "ours" else torch_rates(patience)


def our_rates(patience: float) -> Peaks:
    import jax
    import jax.numpy as jnp

    def timed(function: Callable[..., Any], *arrays: Any) -> float:
        compiled = jax.jit(function)
        return best_time(lambda: compiled(*arrays).block_until_ready(), patience)

    def convolve(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    square, row = jnp.ones((SIDE, SIDE)), jnp.ones(NUMBERS)
    half = square.astype(jnp.bfloat16)
    image, kernel = jnp.ones((IMAGES, GRID, GRID, CHANNELS)), jnp.ones((3, 3, CHANNELS, CHANNELS))
    return rates(
        {
            "float32": timed(jnp.matmul, square, square),
            "bfloat16": timed(jnp.matmul, half, half),
            "convolution": timed(convolve, image, kernel),
            "memory": timed(jnp.add, row, row + 1),
        }
    )


def torch_rates(patience: float) -> Peaks:
    import torch

    square, row, other, total = torch.ones(SIDE, SIDE), *(torch.ones(NUMBERS) for _ in range(3))
    half = square.bfloat16()
    image, kernel = torch.ones(IMAGES, CHANNELS, GRID, GRID), torch.ones(CHANNELS, CHANNELS, 3, 3)
    with torch.inference_mode():
        return rates(
            {
                "float32": best_time(lambda: square @ square, patience),
                "bfloat16": best_time(lambda: half @ half, patience),
                "convolution": best_time(lambda: torch.nn.functional.conv2d(image, kernel, padding=1), patience),
                "memory": best_time(lambda: torch.add(row, other, out=total), patience),
            }
        )


def roofline_seconds(stages: Sequence[Stage], peaks: Peaks) -> float:
    """The least time of the stages: of each, that of its operations or that of its bytes, whichever is longer."""
    return sum(
        stage.times
        * max(sum(flops / peaks[kind] for kind, flops in stage.flops.items()), stage.bytes / peaks["memory"])
        for stage in stages
    )
