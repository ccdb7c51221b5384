"""Arrays that are read from files one at a time, when they are needed: so a model may be larger than the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
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


def cast(name: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """The same numbers in another precision.

    Raises:
      WeightsError: finite ones that would become infinite.
    """
    kind = np.dtype(dtype)
    if values.dtype == kind:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(kind)
    if not np.isfinite(result).all() and np.isfinite(values).all():
        raise WeightsError(f"{name} has numbers up to {np.abs(values).max():g}, which {kind} cannot hold.")
    return result


def is_floating(dtype: Any) -> bool:
    """Whether numbers of this dtype are floating-point ones, those of ml_dtypes included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def common_dtype(kinds: Iterable[np.dtype]) -> np.dtype:
    """The narrowest precision that holds numbers of all of these."""
    result, *others = dict.fromkeys(kinds)
    for kind in others:
        halves = {result.name, kind.name} == {"float16", "bfloat16"}
        result = np.dtype(np.float32) if halves else np.promote_types(result, kind)
    return result


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

    def astype(self, dtype: Any, name: str = "A parameter") -> LazyArray:
        """The same numbers in another precision; see `cast` for `name`."""
        kind = np.dtype(dtype)
        return LazyArray(self.shape, kind, lambda index: cast(name, self.part(index), kind), self.in_parts)


LazyParams = dict[str, LazyArray]  # by slash path
