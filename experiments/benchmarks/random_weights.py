"""Weights that two processes draw alike: every tensor depends on its PyTorch name and shape alone.

Our side takes them through the mapping tables of `pixelstory_jax.interop`, PyTorch's fills its modules. One tensor
exists at a time.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.interop.tensors import FileTensor
from pixelstory_jax.interop.torch_layout import Table, map_tensors, torch_shapes
from pixelstory_jax.models.paths import unflatten

Draw = Callable[[str, tuple[int, ...]], np.ndarray]
PERIOD = 1_048_573  # a prime, so that no two rows of a matrix are equal


@functools.cache
def normal_numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(PERIOD, np.float32)


def draw_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 normal numbers: matrices and kernels with variance 1 / fan-in, norm weights near 1, biases near 0."""
    values = np.resize(np.roll(normal_numbers(), zlib.crc32(name.encode())), math.prod(shape)).reshape(shape)
    if len(shape) > 1:
        return values / math.sqrt(math.prod(shape[1:]))
    return 0.1 * values + ("norm" in name and name.endswith("weight"))


def our_params(
    table: Table,
    shapes: Mapping[str, Any],
    dtype: str = "float32",
    draw: Draw = draw_tensor,
    prefix: str = "",
) -> Any:
    """The tree of parameters of `shapes`, imported by `table`; `prefix` is what its names have in the whole network."""
    tensors = {
        name: FileTensor(shape, np.dtype(np.float32), functools.partial(draw, prefix + name, shape))
        for name, shape in torch_shapes(table, shapes).items()
    }
    lazy = map_tensors(table, tensors, shapes)
    return unflatten({path: jax.block_until_ready(jnp.asarray(np.asarray(v), dtype)) for path, v in lazy.items()})


def fill_module(module: Any, draw: Draw = draw_tensor, prefix: str = "", kept: tuple[str, ...] = ()) -> Any:
    """The PyTorch module with the same weights, ready for inference.

    Args:
      prefix: as in `our_params`. kept: tensors that stay as they are.
    """
    import torch

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name in kept:
                continue
            tensor.copy_(torch.from_numpy(draw(prefix + name, tuple(tensor.shape))))
    return module.eval()


def chained(embedding: str, head: str, successor: np.ndarray) -> Draw:
    """Weights of a language model that answers id t by `successor[t]` (a permutation), whatever stood before.

    The rows of the embedding are long against what the layers add, and each is the row of its successor in the head.
    """

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in (embedding, head):
            return draw_tensor(name, shape)
        rows = 4 * math.sqrt(shape[1]) * draw_tensor(embedding, shape)
        return rows if name == embedding else 0.1 * rows[np.argsort(successor)]

    return draw
