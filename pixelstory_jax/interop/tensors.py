"""Arrays that are read from files one at a time, when they are needed: so a model may be larger than the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


class WeightsError(ValueError):
    """Weights that do not fit; the message names every missing, unexpected and mis-shaped tensor."""


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file, known by its header alone.

    Attributes:
      dtype: that of the file, as NumPy (bfloat16: of ml_dtypes) has it.
      read: reads it; shape and dtype are those above. The result may be a read-only view of a mapped file.
      file: where it is, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file: str = ""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


TensorMap = Mapping[str, "FileTensor | np.ndarray"]


@dataclass(frozen=True)
class LazyArray:
    """A parameter that is made when it is asked for, whole (`np.asarray`) or in part (`lazy[index]`).

    Attributes:
      part: from an index, one slice per axis, to that part. Stacked parameters read only the layers asked for.
      in_parts: whether a part costs less than the whole; else it is better read once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    part: Callable[[tuple[slice, ...]], np.ndarray]
    in_parts: bool = True

    @classmethod
    def whole(cls, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]) -> LazyArray:
        """A parameter that can only be made as a whole."""
        return cls(tuple(shape), np.dtype(dtype), lambda index: np.asarray(read())[index], in_parts=False)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        return self.part(index + (slice(None),) * (len(self.shape) - len(index)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)

    def astype(self, dtype: Any) -> LazyArray:
        """The same numbers in another precision."""
        kind = np.dtype(dtype)
        return LazyArray(self.shape, kind, lambda index: self.part(index).astype(kind, copy=False), self.in_parts)


LazyParams = dict[str, LazyArray]  # by slash path
