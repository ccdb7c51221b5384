"""Orbax checkpoints one parameter at a time, so that models larger than the memory can be written and read.

FOLDER/params      the parameters, as every checkpoint of a training run has them
FOLDER/config      JSON; texts that begin with `HERE` name files of this folder
FOLDER/tokenizer   what the source had of a tokenizer (absent if nothing)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1 as ocp_v1

from pixelstory_jax.interop.tensors import LazyArray, LazyParams
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.training.checkpoints import find_checkpoint, read_metadata, read_parts
from pixelstory_jax.training.errors import CheckpointError, first_line

GROUP = 256 << 20  # bytes that are handed to Orbax at once; a larger parameter goes alone
Report = Callable[[str, int], None]  # called with the path and bytes of each parameter that is done


def write_params(folder: Path, params: Mapping[str, Any], report: Report | None = None) -> None:
    """Writes FOLDER/params from arrays or LazyArrays by slash path; at most a group of them is in memory."""
    target = folder / "params.parts"
    with ocp_v1.Context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in _groups(params):
            ocp_v1.partial.save(target, unflatten({path: np.asarray(params[path]) for path in group}))
            for path in group:
                if report:
                    report(path, params[path].nbytes)
        ocp_v1.partial.finalize(target)
    (target / "state").rename(folder / "params")
    for rest in target.iterdir():
        rest.unlink()
    target.rmdir()


def _groups(params: Mapping[str, Any]) -> Iterator[list[str]]:
    group: list[str] = []
    filled = 0
    for path, value in params.items():
        if group and filled + value.nbytes > GROUP:
            yield group
            group, filled = [], 0
        group.append(path)
        filled += value.nbytes
    if group:
        yield group


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes FOLDER/config as training does."""
    with contextlib.closing(ocp.Checkpointer(ocp.JsonCheckpointHandler())) as checkpointer:
        checkpointer.save(folder / "config", dict(config))


def open_checkpoint(path: str | Path, averages: bool = True) -> LazyParams:
    """The parameters of a checkpoint by slash path, not read yet.

    Args:
      path: as `load_params`: a WORKDIR or one checkpoint.
      averages: take the averaged parameters (EMA) where the checkpoint has both; the best one of a run has them alone.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    folder = find_checkpoint(path)
    try:
        leaves = {name: ("params", name, leaf) for name, leaf in flatten(read_metadata(folder / "params")).items()}
        if averages and (folder / "train").is_dir():
            stored = read_metadata(folder / "train").get("ema", {})
            leaves |= {name: ("train", f"ema/{name}", leaf) for name, leaf in flatten(stored).items()}
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {folder} is incomplete or damaged ({first_line(error)}); use another one"
        ) from error
    return {name: _leaf(folder / item, stored, leaf) for name, (item, stored, leaf) in leaves.items()}


def _leaf(item: Path, name: str, leaf: Any) -> LazyArray:
    def read() -> np.ndarray:
        try:
            return flatten(read_parts(item, {name: leaf}))[name]
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {item.parent} is damaged: {name} cannot be read ({first_line(error)})"
            ) from error

    return LazyArray.whole(tuple(leaf.shape), leaf.dtype, read)
