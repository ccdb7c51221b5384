"""TensorBoard's event files, written by the caller's own thread.

The writer of tensorboardX has a thread with a bounded queue. Where a write fails that thread ends, nobody is told, and
once the queue is full the run waits for it for ever; so only the messages of tensorboardX are used.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


class EventFile:
    """A new event file in `folder`. What was added is in the file when the call returns; OSError if it cannot be.

    first_step: TensorBoard forgets what earlier files of the folder hold of later steps.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}").open("xb")
        self._write(Event(file_version="brain.Event:2"))
        if first_step:
            self._write(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Tag -> number."""
        event = Event(step=step)
        for tag, value in values.items():
            event.summary.MergeFrom(summary.scalar(tag, value))
        self._write(event)

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """A picture uint8 [H, W, 3]."""
        self._write(Event(step=step, summary=summary.image(tag, picture, dataformats="HWC")))

    def _write(self, event: Any) -> None:
        """Appends one TFRecord: length, its checksum, content, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        self._file.write(length + _checksum(length) + content + _checksum(content))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
