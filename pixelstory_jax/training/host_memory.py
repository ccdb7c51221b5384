"""Memory of the host: keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

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
