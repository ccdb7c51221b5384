"""Writing so that nothing half-written is left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A free name beside `path`, for a file or folder that becomes `path` when the block ends.

    If the block fails, what it wrote is removed and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # of a process that was killed
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)  # a folder is not replaced in one go
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
