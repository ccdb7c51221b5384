"""Memory of the host: keep what a step frees for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MOST = 2**31 - 1
_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks instead of returning them to the kernel; True where that was possible.

    XLA on a CPU allocates the buffers of a step anew each time. Large ones are mapped and unmapped by default, so that
    every step pays for hundreds of megabytes of page faults: a third of the time of the tiny models' steps. Only the
    main arena keeps large blocks; a thread that already has an arena of its own stays with it, so this has to be called
    before jax is first used.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all(
        mallopt(option, value)
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MOST), (_M_TOP_PAD, _PAD))
    )


class PeakMemory:
    """The most memory that this process holds between entering and leaving, beyond what it had before.

    Pages of mapped files are not counted: the kernel takes them back when it needs them. `bytes` is None where the
    system does not tell (anything but Linux).
    """

    def __init__(self, interval: float = 0.02) -> None:
        self.bytes: int | None = None
        self._interval, self._end = interval, threading.Event()

    def __enter__(self) -> PeakMemory:
        self._before = self._highest = _anonymous_memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(self._interval):
            self._highest = max(self._highest, _anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._before:
            self.bytes = self._highest - self._before


def _anonymous_memory() -> int:
    """Bytes of memory that is no page of a file; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0
