"""Pickles of plain values: lists, dicts, text and numbers, as REFER's lists of expressions are.

The pickle module imports and calls what a file asks for. Here every such name is refused; without names a pickle can
only build values.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixelstory_jax.data.readers.reader import LayoutError, need


def read_plain_pickle(path: Path, layout: Sequence[str], kind: type) -> Any:
    """The content of a pickle, a `kind` of plain values; text of Python 2 is read as Latin-1.

    Raises:
      LayoutError: it is missing, damaged, asks for anything but plain values, or holds something else.
    """
    try:
        content = _Plain(io.BytesIO(need(path, layout).read_bytes()), encoding="latin-1").load()
    except LayoutError:
        raise
    except _Refused as error:
        raise LayoutError(f"{path} asks for {error}, but only lists, dicts, text and numbers are read.") from None
    except Exception as error:  # damaged pickles raise almost anything
        raise LayoutError(f"{path} is damaged and cannot be read as a pickle ({error}).") from None
    if not isinstance(content, kind):
        raise LayoutError(f"{path} holds a {type(content).__name__}, but a {kind.__name__} is expected.")
    return content


class _Refused(Exception):
    pass


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"{module}.{name}")
