"""Freed memory stays with the process: a step must not pay for the page faults of its buffers again."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A thread of its own, as XLA computes in threads.
PROGRAM = """
import resource, threading
from pixelstory_jax.training.host_memory import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp
# Its parts cannot be fused into one loop, so it needs buffers of 32 MB.
step = jax.jit(lambda x: jnp.sort(jnp.sort(jnp.broadcast_to(x, (16, 1 << 18)), axis=0)[:, ::-1], axis=0).sum())
faults = []
def run():
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step(jnp.arange(1 << 18, dtype=jnp.float32)).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(kept, min(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is asked")
def test_buffers_are_used_again():
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, faults = output.split()
    assert kept == "False" or int(faults) < 1000  # 32 MB are 8192 pages
