"""Time and memory of one consistent self-attention layer, ours against the PyTorch form of the released app.

  python -m experiments.benchmarks.consistent_attention
  python -m experiments.benchmarks.consistent_attention --panels=4,16,64 --tokens=576 --width=640

A story of n panels passes the layer once. The first four panels are anchors, both halves of guidance are there, half of
the anchors' tokens is seen. Ways:
  torch mask   the released app: one boolean mask over all tokens of all anchors; later panels one by one
  mask         ours, all anchor tokens computed, unseen ones masked; later panels in one call
  gathered     ours, only the seen tokens of the anchors; later panels in one call
  replay       ours, no bank: anchors beside every four later panels
  joint        ours, windows of four panels slide over the whole story (the paper's algorithm)
Each way and length runs in a process of its own: its peak memory is that process's, less what it had before the arrays
were made. Ratios are to "torch mask" at the same length: above 1 is faster, or smaller.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

PANELS = flags.DEFINE_list("panels", ["4", "8", "16", "32", "64"], "Lengths of stories.")
TOKENS = flags.DEFINE_integer("tokens", 576, "Tokens of a panel at the layer (SDXL at 768 pixels: 576 and 2304).")
WIDTH = flags.DEFINE_integer("width", 640, "Width of the layer; heads are 64 wide.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed passes; the median counts.")
OUT = flags.DEFINE_string("out", "", "JSON file for the numbers; none if not given.")
WORKER = flags.DEFINE_string("worker", "", "For this program's own use: the way to measure.")

WAYS = ("torch mask", "mask", "gathered", "replay", "joint")
ANCHORS, RATE, WINDOW, AT_ONCE = 4, 0.5, 4, 4


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def torch_pass(panels: int, tokens: int, width: int) -> Callable[[], Any]:
    """The released app's layer: a write call under a mask, then a read call per later panel."""
    import torch

    torch.manual_seed(0)
    heads = width // 64
    maps = [torch.nn.Linear(width, width, bias=False) for _ in range(3)]
    out = torch.nn.Linear(width, width)
    x = torch.randn(2, panels, tokens, width)
    anchors = min(ANCHORS, panels)
    total = anchors + 1
    seen = torch.rand(total * tokens) < RATE
    seen[anchors * tokens :] = False
    mask = seen.expand(total * tokens, -1).clone()
    for number in range(total):
        own = slice(number * tokens, (number + 1) * tokens)
        mask[own, own] = True

    def attend(queries: Any, keys: Any, allowed: Any) -> Any:
        q, k, v = (
            layer(y).unflatten(-1, (heads, 64)).transpose(1, 2)
            for layer, y in zip(maps, (queries, keys, keys), strict=True)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return out(attended.transpose(1, 2).flatten(-2))

    @torch.inference_mode()
    def run() -> Any:
        bank = x[:, :anchors].flatten(1, 2)
        edge = anchors * tokens
        done = [attend(bank, bank, mask[:edge, :edge])]
        done += [attend(x[:, n], torch.cat([bank, x[:, n]], 1), mask[edge:, :]) for n in range(anchors, panels)]
        return torch.cat(done, 1)

    return run


def jax_pass(way: str, panels: int, tokens: int, width: int) -> Callable[[], Any]:
    """Our layer: a write and a read call (mask, gathered), or one of the ways without a bank."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pixelstory_jax.inference.sharing import sample_tokens
    from pixelstory_jax.models.consistent_attention import SelfAttention, Sharing, see_each_other

    layer = SelfAttention(width, width // 64)
    x = jax.random.normal(jax.random.key(0), (2, panels, tokens, width))
    params = layer.init(jax.random.key(1), x[:, 0])
    anchors = panels if way == "joint" else min(ANCHORS, panels)
    draws = np.random.default_rng(0).random((anchors, tokens), np.float32)
    sample = jax.tree.map(jnp.asarray, sample_tokens(draws, RATE, "mask" if way == "mask" else "gathered"))
    later, on = panels - anchors, jnp.bool_(True)

    @jax.jit
    def call(tokens_of_panels: Any, sharing: Any, bank: Any = None) -> Any:
        groups, many = tokens_of_panels.shape[:2]
        flat = tokens_of_panels.reshape(groups * many, tokens, width)
        out, kept = layer.apply(params, flat, sharing, on, bank)  # type: ignore[misc]
        return out.reshape(tokens_of_panels.shape), kept

    each_other, samples = see_each_other(anchors), {tokens: sample}
    readers = jnp.ones((1, later, anchors), bool)

    def banked() -> Any:
        first, bank = call(x[:, :anchors], Sharing(each_other, samples, store=True))
        return [first, call(x[:, anchors:], Sharing(readers, samples), bank)[0]] if later else [first]

    def replayed() -> Any:
        if not later:
            return [call(x, Sharing(each_other, samples))[0]]
        sees = jnp.concatenate([each_other, jnp.ones((1, AT_ONCE, anchors), bool)], axis=1)
        done = []
        for start in range(anchors, panels, AT_ONCE):
            together = jnp.concatenate([x[:, :anchors], x[:, start : start + AT_ONCE]], axis=1)
            done.append(call(together, Sharing(sees, samples))[0])
        return done

    def joint() -> Any:
        return [call(x, Sharing(each_other, samples, window=WINDOW if panels > WINDOW else 0))[0]]

    run = {"mask": banked, "gathered": banked, "replay": replayed, "joint": joint}[way]
    return lambda: jax.block_until_ready(run())


def measure(way: str, panels: int) -> dict[str, float]:
    """Seconds of a pass and bytes at its peak, in this process."""
    make = torch_pass if way == "torch mask" else lambda *sizes: jax_pass(way, *sizes)
    if way == "torch mask":
        import torch

        torch.zeros(8).add_(1)
    else:
        import jax.numpy as jnp

        jnp.zeros(8).block_until_ready()
    before = peak_bytes()
    run = make(panels, TOKENS.value, WIDTH.value)
    run()
    times = []
    for _ in range(REPEATS.value):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "bytes": float(peak_bytes() - before)}


def in_own_process(way: str, panels: int) -> dict[str, float]:
    arguments = [f"--worker={way}", f"--panels={panels}", f"--repeats={REPEATS.value}"]
    arguments += [f"--tokens={TOKENS.value}", f"--width={WIDTH.value}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.consistent_attention", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))},
    )
    if done.returncode:
        raise UserError(f"Measuring {way!r} with {panels} panels failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if WORKER.value:
        print(json.dumps(measure(WORKER.value, int(PANELS.value[0]))))
        return
    head = f"{'panels':>6}  {'way':<11}{'seconds':>9}{'faster':>9}{'MB':>9}{'smaller':>9}"
    print(f"{TOKENS.value} tokens a panel, width {WIDTH.value}, {ANCHORS} anchors, rate {RATE}, float32\n{head}")
    numbers = []
    for panels in map(int, PANELS.value):
        reference: dict[str, float] = {}
        for way in WAYS:
            row = in_own_process(way, panels)
            reference = reference or row
            numbers.append({"panels": panels, "way": way, **row})
            print(
                f"{panels:>6}  {way:<11}{row['seconds']:>9.3f}{reference['seconds'] / row['seconds']:>9.2f}"
                f"{row['bytes'] / 1e6:>9.0f}{reference['bytes'] / max(row['bytes'], 1):>9.2f}",
                flush=True,
            )
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        print(f"Written to {OUT.value}")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
