"""Several processes as one run: how they join, and how one of them leaves when something goes wrong.

Each step is one computation of all processes, so none can go on without the others. JAX's coordination service, which
process 0 hosts, finds out that one is gone when its heartbeats stay out, and ends the others. What is missing there is
a sentence that a person can use, and haste: a process that fails must not wait for those that wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives.objective import Params
from pixelstory_jax.training.errors import ConfigError, UserError
from pixelstory_jax.training.sharding import Rules, build_mesh, partition

HEARTBEAT_TIMEOUT = 100  # seconds without a heartbeat after which a process counts as dead; JAX's own default
AGAIN = "run the same command again in all of them: it resumes from the newest checkpoint"


def initialize_distributed(
    coordinator: str = "", process_count: int = 0, process_index: int = -1, heartbeat_timeout: int = HEARTBEAT_TIMEOUT
) -> None:
    """Joins the other processes, before any device is touched.

    With a coordinator ("host:port") the number of processes and the index of this one are needed. Without one,
    PIXELSTORY_DISTRIBUTED=1 lets the cluster environment answer (Cloud TPU, Slurm, ...); otherwise the run stays a
    single process.

    Raises:
      ConfigError: only some of the three are given.
    """
    if not coordinator and (process_count != 0 or process_index != -1):
        # Each host would train on its own, into the same folder.
        raise ConfigError(
            f"The number of processes and this one's index (got {process_count} and {process_index}) need the address "
            "of process 0 too, as --coordinator=host:port"
        )
    if coordinator:
        if process_count < 1 or not 0 <= process_index < process_count:
            raise ConfigError(
                f"With a coordinator ({coordinator}) give the number of processes and this one's index "
                f"(got {process_count} and {process_index})"
            )
        jax.distributed.initialize(
            coordinator, process_count, process_index, heartbeat_timeout_seconds=heartbeat_timeout
        )
    elif os.environ.get("PIXELSTORY_DISTRIBUTED") == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_timeout)
    if jax.distributed.is_initialized():
        _leave_last_words()


def _leave_last_words() -> None:
    """Has a sentence printed if this process is ended from outside or by JAX, neither of which Python can intercept.

    A shell waits for a word through a pipe. Where the pipe closes without one, it speaks.
    """
    words = (
        f"Error: The process {os.getpid()} of this run on {socket.gethostname()} was ended at once: it was killed, as "
        f"where memory runs out, or another process is gone, as the lines above then say; {AGAIN}."
    )
    script = """trap '' INT TERM HUP; read -r word || printf '%s\\n' "$0" >&2"""
    shell = subprocess.Popen(["sh", "-c", script, words], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _listeners.append(shell)
    atexit.register(_dismiss_last_words)


_listeners: list[subprocess.Popen[bytes]] = []


def _dismiss_last_words() -> None:
    for shell in _listeners:
        shell.communicate(b"done\n")
    _listeners.clear()


def meet(place: str) -> None:
    """Waits until all processes have come to this `place`, however long each takes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


def check_shared(folder: Path) -> None:
    """Raises UserError unless all processes see the same folder: its checkpoints are written by all of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    token = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(4), np.int32))
    mark = folder / f".process-0-was-here-{int(token[0]) & 0xFFFFFFFF:08x}"
    if jax.process_index() == 0:
        mark.touch()
    meet("mark")
    seen = multihost_utils.process_allgather(np.array([mark.exists()]))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        blind = ", ".join(str(index) for index in np.flatnonzero(~seen.ravel()))
        raise UserError(
            f"The workdir {folder} of process 0 is not what other processes have under this name (number {blind}); "
            "all of them write the checkpoints, so it has to lie on a disk that they share (docs/slices.md)"
        )


@contextlib.contextmanager
def own_copy(params: Params, rules: Rules) -> Iterator[Params]:
    """All parameters on the devices of this process, and a mesh of those in force; `params` itself where it is alone.

    For what is not one computation of all processes, as an evaluation is not: each of them does the whole of it.
    """
    if jax.process_count() == 1:
        yield params
        return
    from jax.experimental import multihost_utils

    mesh = build_mesh({"fsdp": -1}, jax.local_devices())
    copies = {}
    for path, array in flatten(params).items():
        whole = multihost_utils.process_allgather(array, tiled=True)
        copies[path] = jax.device_put(whole, NamedSharding(mesh, partition(path, whole.shape, rules, mesh)))
    with jax.sharding.set_mesh(mesh):
        yield unflatten(copies)


def is_loss_of_another(error: BaseException) -> bool:
    """True where `error` comes from a computation that another process has left."""
    return jax.distributed.is_initialized() and any(word in str(error) for word in ("Gloo", "oordination service"))


def leave(error: BaseException) -> None:
    """Ends this process at once if it has joined others and `error` is more than the end of the program.

    A regular exit waits for all processes, while the others wait for this one in the next step.
    """
    if not jax.distributed.is_initialized():
        return
    code = error.code if isinstance(error, SystemExit) else 1
    if code in (None, 0):
        return
    if isinstance(error, KeyboardInterrupt):
        print(f"Error: Interrupted; to save first, send SIGTERM to any process; {AGAIN}.", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    _dismiss_last_words()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
