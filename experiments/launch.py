"""Several processes on this machine as one run: what the hosts of a slice would do, tried on the CPU.

  python -m experiments.launch --processes=4 -- train --config=configs/pixellm.py --workdir=runs/four
  python -m experiments.launch --processes=2 --devices=4 -- train --config=configs/pixellm.py --workdir=runs/eight \\
    --config.train.mesh.data=2 --config.train.mesh.fsdp=4

After -- stands a command of experiments that takes --coordinator, --processes and --process, with its own flags. Every
process runs this line, with one CPU device or --devices simulated ones. What process 0 prints is shown as it is, what
the others print with their number before it: [2] ...

Ctrl-C or SIGTERM: all save after the same step and stop; a second one ends them at once. Where one process dies, the
others are ended too, a sentence names it, and its exit code becomes that of this command (128 + the signal that killed
it).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import ConfigError

PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.")
DEVICES = flags.DEFINE_integer("devices", 1, "Simulated devices of each process.")

Process = subprocess.Popen[str]


def main() -> None:
    if PROCESSES.value < 1 or DEVICES.value < 1:
        raise ConfigError("--processes and --devices are at least 1")
    module = _module(LINE)
    processes: list[Process] = []
    stop = _Stop(processes)
    relays = _start(module, LINE[1:], processes)
    failed = _wait(processes)
    _end(processes)
    for relay in relays:
        relay.join(timeout=5)  # what the one that failed had to say
    if failed is not None:
        sys.exit(_explain(failed, processes[failed].returncode, stop.asked))


def _module(line: Sequence[str]) -> str:
    """The module of the command in `line`; a name with a dot is that of a module already."""
    if not line:
        raise ConfigError(
            "Say what to run after --, as in: --processes=2 -- train --config=configs/pixellm.py (see --help)"
        )
    if "." in line[0]:
        return line[0]
    path = command_line.ROOT / "experiments" / f"{line[0]}.py"
    if not path.is_file() or '"coordinator"' not in path.read_text(encoding="utf-8"):
        raise ConfigError(f"experiments.{line[0]} is no command for several processes; train is one")
    return f"experiments.{line[0]}"


def _start(module: str, arguments: Sequence[str], processes: list[Process]) -> list[threading.Thread]:
    """Starts all, fills `processes`, and returns the threads that show what others than process 0 print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    before = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PIXELSTORY_DISTRIBUTED"},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{before} --xla_force_host_platform_device_count={DEVICES.value}".strip(),
    }
    relays = []
    for index in range(PROCESSES.value):
        place = [f"--coordinator=localhost:{port}", f"--processes={PROCESSES.value}", f"--process={index}"]
        others: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, *place],
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is to reach this process only, which passes it on
            **(others if index else {}),
        )
        processes.append(process)
        if index:
            relays.append(threading.Thread(target=_relay, args=(process, index), daemon=True))
            relays[-1].start()
    return relays


def _relay(process: Process, index: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("[Gloo]"):  # which says that it has connected
            print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


class _Stop:
    """Passes the first SIGINT or SIGTERM on as notice to save and stop; the second one ends the processes."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.asked = False
        self._processes = processes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            _end(self._processes)
        self.asked = True
        for process in self._processes:
            process.send_signal(signal.SIGTERM)


def _wait(processes: Sequence[Process]) -> int | None:
    """Waits for all to end, or the first one to fail: its index."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [index for index, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # Of several, rather one that was killed than those that failed or were aborted for lack of it.
            return min(failed, key=lambda index: (codes[index] == -signal.SIGABRT, codes[index]))
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()


def _explain(index: int, code: int, asked: bool) -> int:
    """Says how process `index` has ended, and returns the exit code for it."""
    if asked and code == -signal.SIGTERM:
        print("Stopped by a signal, before training had begun.", file=sys.stderr)
    elif code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        again = "run the same command again: training resumes from the newest checkpoint"
        print(f"Error: Process {index} of {PROCESSES.value} {how}, so the others were ended; {again}.", file=sys.stderr)
    else:
        how = f"has failed with exit code {code}"
        print(f"Error: Process {index} of {PROCESSES.value} {how}, so the others were ended.", file=sys.stderr)
    return code if code > 0 else 128 - code


LINE: list[str] = []  # what stands after --

if __name__ == "__main__":
    if "--" in sys.argv:
        LINE = sys.argv[sys.argv.index("--") + 1 :]
        del sys.argv[sys.argv.index("--") :]
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
