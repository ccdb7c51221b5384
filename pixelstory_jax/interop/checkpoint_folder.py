"""Orbax checkpoints one parameter at a time, so that models larger than the memory can be written and read.

FOLDER/params      the parameters, as every checkpoint of a training run has them
FOLDER/config      JSON; texts that begin with `HERE` name files of this folder
FOLDER/tokenizer   what the source had of a tokenizer (absent if nothing)
"""

from __future__ import annotations

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1 as ocp_v1

from pixelstory_jax.interop.tensors import LazyArray, LazyParams
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.training.checkpoints import find_checkpoint, read_metadata, read_parts, silence_abandoned_work
from pixelstory_jax.training.errors import CheckpointError, first_line

GROUP = 256 << 20  # bytes that are handed to Orbax at once; a larger parameter goes alone
READ_AHEAD = 64 << 20  # bytes that are read at once; likewise
Report = Callable[[str, int], None]  # called with the path and bytes of each parameter that is done


def write_params(folder: Path, params: Mapping[str, Any], report: Report | None = None) -> None:
    """Writes FOLDER/params from arrays or LazyArrays by slash path; at most a group of them is in memory."""
    target = folder / "params.parts"
    silence_abandoned_work()
    try:
        with ocp_v1.Context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for group in _groups(params):
                ocp_v1.partial.save(target, unflatten({path: np.asarray(params[path]) for path in group}))
                for path in group:
                    if report:
                        report(path, params[path].nbytes)
            ocp_v1.partial.finalize(target)
    except BaseException:
        _remove_parts(target)
        raise
    next(target.glob("*/_METADATA")).parent.rename(folder / "params")  # Orbax has it in a folder of its own
    for rest in target.iterdir():
        rest.unlink()
    target.rmdir()


def _remove_parts(target: Path) -> None:
    """Removes what a failed save has written, and what its threads, which nothing waits for, still write."""
    gone = 0
    for _ in range(50):
        leftovers = list(target.parent.glob(f"{target.name}*"))
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        gone = 0 if leftovers else gone + 1
        if gone > 3:
            break
        time.sleep(0.05)


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
    stored_in: dict[str, dict[str, Any]] = {}
    for item, stored, leaf in leaves.values():
        stored_in.setdefault(item, {})[stored] = leaf
    readers = {item: _Item(folder / item, own) for item, own in stored_in.items()}
    return {name: readers[item].leaf(stored) for name, (item, stored, _) in leaves.items()}


class _Item:
    """The arrays of an item folder. Small ones are read several at once, as each call of Orbax looks at all names."""

    def __init__(self, folder: Path, leaves: Mapping[str, Any]) -> None:
        self.folder, self.leaves, self.names = folder, leaves, list(leaves)
        self.places = {name: place for place, name in enumerate(leaves)}
        self.held: dict[str, np.ndarray] = {}

    def leaf(self, name: str) -> LazyArray:
        return LazyArray.whole(tuple(self.leaves[name].shape), self.leaves[name].dtype, lambda: self.read(name))

    def read(self, name: str) -> np.ndarray:
        if name not in self.held:
            self.held = {}  # before others are read
            self.held = self._read_group(name)
        return self.held[name]

    def _read_group(self, first: str) -> dict[str, np.ndarray]:
        group: dict[str, Any] = {}
        filled = 0
        for name in self.names[self.places[first] :]:
            leaf = self.leaves[name]
            filled += int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
            if group and filled > READ_AHEAD:
                break
            group[name] = leaf
        with contextlib.suppress(Exception):  # then it is found out whether the first one is damaged
            return flatten(read_parts(self.folder, group))
        try:
            return flatten(read_parts(self.folder, {first: self.leaves[first]}))
        except Exception as error:
            raise CheckpointError(
                f"The checkpoint {self.folder.parent} is damaged: {first} cannot be read ({first_line(error)})"
            ) from error
