"""Errors that a user can act on. Each carries one sentence; command lines print it without a traceback."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Something outside the code is wrong: one sentence says what, where, and what to do."""


class ConfigError(UserError):
    """A configuration file or field is missing, misspelt or of the wrong type."""


class CheckpointError(UserError):
    """A checkpoint cannot be written, read, or does not fit what is being trained."""


class TrainingStopped(UserError):
    """Training cannot go on (the loss is not finite, the disk is full, the data are unusable)."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """True where `error`, or what caused it, says that the disk, the quota or the file size limit is exhausted."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_FULL:
            return True
        text = str(seen)
        if any(words in text for words in ("No space left on device", "Disk quota exceeded", "File too large")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, for use inside a sentence."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= limit else line[: limit - 3] + "..."
