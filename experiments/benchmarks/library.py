"""How a process that measures loads the library of its side."""

from __future__ import annotations

import os

from pixelstory_jax.training.compilation_cache import set_compilation_cache
from pixelstory_jax.training.host_memory import keep_freed_memory


def load_library(side: str, threads: int) -> None:
    """Imports "ours" or "torch" and sets it up as its users do; both are held on the same cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if side == "ours":
        keep_freed_memory()  # as the commands of this package do, and the next line too
        set_compilation_cache()
        import jax.numpy as jnp

        jnp.zeros(8).block_until_ready()
    else:
        import torch

        torch.set_num_threads(threads)
        torch.zeros(8).add_(1)
