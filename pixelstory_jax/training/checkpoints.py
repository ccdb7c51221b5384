"""Checkpoints, with everything of Orbax behind this file.

    WORKDIR/checkpoints/last/STEP/   the newest two: parameters, optimizer, position in the data, config
    WORKDIR/checkpoints/best/STEP/   the best by evaluation score: the parameters that were evaluated, config, score

Saves are asynchronous and atomic (a folder gets its name when it is complete). Restoring is strict: every array must be
there with its shape. A newest checkpoint that cannot be read gives way to the one before it, with a warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives.objective import Params
from pixelstory_jax.training import processes
from pixelstory_jax.training.errors import CheckpointError, first_line, is_disk_full
from pixelstory_jax.training.state import TrainState

KEEP_LAST = 2
HERE = "{checkpoint}"  # how texts of a saved config begin that name files of the checkpoint's own folder


class Restored(NamedTuple):
    state: TrainState
    data: dict[str, int]  # position in the data
    notes: list[str]  # what a person should be told: damaged checkpoints that were set aside


class Checkpoints:
    """The checkpoints of one WORKDIR. Use as a context manager, so that the last save is complete on leaving."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
        self.folder = workdir.absolute() / "checkpoints"
        self._config = json.loads(json.dumps(config))
        self._last = _manager(self.folder / "last", KEEP_LAST)
        self._best = _manager(self.folder / "best", 1)
        scores = ((_read_score(self.folder / "best" / str(step)), step) for step in self._best.all_steps())
        best: tuple[float, int] = max(scores, default=(-np.inf, -1))
        self._best_score, self._best_step = best

    @property
    def best_step(self) -> int | None:
        """The step of the best parameters; None where nothing was scored."""
        return None if self._best_score == -np.inf else self._best_step

    @property
    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint; one that is being written does not count."""
        return max((p for p in (self.folder / "last").iterdir() if p.name.isdigit()), key=_step, default=None)

    def save_last(self, state: TrainState, data: Mapping[str, int]) -> None:
        """Starts to save; returns when the arrays have been copied from the devices. No effect if the step is there."""
        step = int(state.step)
        if step in self._last.all_steps():
            return
        items = {
            "params": ocp.args.PyTreeSave(state.params),
            "train": ocp.args.PyTreeSave(_train_tree(state)),
            "data": ocp.args.JsonSave(dict(data)),
            "config": ocp.args.JsonSave(self._config),
        }
        with self._explain_failure():
            self._best.wait_until_finished()  # two saves at once would meet at the same barrier of several processes
            self._last.save(step, args=ocp.args.Composite(**items))

    def save_best(self, step: int, params: Params, score: float, metrics: Mapping[str, float]) -> bool:
        """Starts to save if `score` is above all before; True if so."""
        if not score > self._best_score:
            return False
        with self._explain_failure():
            self._last.wait_until_finished()
            self._best.wait_until_finished()
            if step in self._best.all_steps():
                self._best.delete(step)
            items = {
                "params": ocp.args.PyTreeSave(params),
                "config": ocp.args.JsonSave(self._config),
                "evaluation": ocp.args.JsonSave({"score": score, "step": step, "metrics": dict(metrics)}),
            }
            self._best.save(step, args=ocp.args.Composite(**items))
        self._best_score, self._best_step = score, step
        return True

    def restore_best(self, shardings: Params) -> Params:
        """The best parameters, placed as `shardings` (like the parameters) say; waits for running saves.

        Raises:
          CheckpointError: they cannot be read.
        """
        self.wait()
        where = flatten(shardings)
        return load_params(self.folder / "best" / str(self._best_step), lambda path, _: where[path])[0]

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed."""
        with self._explain_failure():
            self._last.check_for_errors()
            self._best.check_for_errors()

    def wait(self) -> None:
        """Waits for running saves; raises CheckpointError if one failed."""
        with self._explain_failure():
            self._last.wait_until_finished()
            self._best.wait_until_finished()
        self.check()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.wait()
        with contextlib.suppress(Exception):  # a failed save was reported by `check`, or another error is on its way
            self._last.close()
        with contextlib.suppress(Exception):
            self._best.close()
        if isinstance(error, CheckpointError | OSError):  # where the disk is full, a save that was running fails too
            _remove_unfinished(self.folder)

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        silence_abandoned_work()
        try:
            yield
        except Exception as error:
            for manager in (self._last, self._best):
                with contextlib.suppress(Exception):  # the other save may still run, or fail for the same reason
                    manager.wait_until_finished()
            _remove_unfinished(self.folder)
            why = "the disk is full or the quota is used up" if is_disk_full(error) else first_line(error)
            usable = f"{self.newest} is complete and usable" if self.newest else "there is no earlier one"
            raise CheckpointError(
                f"A checkpoint could not be written to {self.folder} ({why}); training has stopped, {usable}; "
                "make room and run the same command again"
            ) from error

    def restore(self, shapes: TrainState, shardings: TrainState) -> Restored | None:
        """The newest readable checkpoint placed as `shardings` say; None if there is no checkpoint at all.

        Raises:
          CheckpointError: arrays are missing, unknown or of another shape, or no checkpoint can be read.
        """
        steps = sorted(self._last.all_steps(), reverse=True)
        damaged: list[tuple[int, str]] = []
        for step in steps:
            try:
                state, data = self._restore_step(step, shapes, shardings)
            except CheckpointError:
                raise
            except Exception as error:
                damaged.append((step, first_line(error)))
                continue
            notes = [self._set_aside(bad, why, step) for bad, why in damaged]
            return Restored(state, data, notes)
        if damaged:
            named = " and ".join(str(self.folder / "last" / str(step)) for step, _ in damaged)
            raise CheckpointError(
                f"No checkpoint can be read: {named} are incomplete or damaged ({damaged[0][1]}); delete "
                f"{self.folder / 'last'} to train from the start, or start from other weights in a new --workdir"
            )
        return None

    def _restore_step(self, step: int, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, int]]:
        folder = self.folder / "last" / str(step)
        wanted, where = _train_tree(shapes), _train_tree(shardings)
        check_tree(flatten(read_metadata(folder / "params")), flatten(shapes.params), folder)
        check_tree(flatten(read_metadata(folder / "train")), flatten(wanted), folder)
        items = self._last.restore(
            step,
            args=ocp.args.Composite(
                params=_placed(shapes.params, shardings.params),
                train=_placed(wanted, where),
                data=ocp.args.JsonRestore(),
            ),
        )
        return _state_from_trees(items["params"], items["train"], shapes), items["data"]

    def _set_aside(self, step: int, why: str, instead: int) -> str:
        """Moves a damaged checkpoint out of the way, so that its step can be saved again."""
        source, target = self.folder / "last" / str(step), self.folder / f"damaged-{step}"
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(source, target)
        processes.meet(f"set aside {step}")
        self._last.reload()
        return f"Warning: checkpoint {source} is incomplete or damaged ({why}); moved to {target}, using step {instead}"


def load_params(
    path: str | Path, sharding_for: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None
) -> tuple[Params, dict[str, Any]]:
    """(parameters, config) of a checkpoint.

    Args:
      path: a WORKDIR (its best checkpoint, else its last), a folder `best` or `last`, or one checkpoint STEP.
      sharding_for: (slash path, shape) -> sharding, to read straight into sharded arrays; host arrays without it.

    Raises:
      CheckpointError: one sentence that names the folder and says what is wrong with it.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    try:
        params = _read_tree(folder / "params", sharding_for)
        if (folder / "train").is_dir():
            averages = _read_tree(folder / "train", None, only="ema").get("ema", {})
            flat = flatten(params)
            for name, value in flatten(averages).items():
                flat[name] = value if sharding_for is None else jax.device_put(value, sharding_for(name, value.shape))
            params = unflatten(flat)
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {folder} is incomplete or damaged ({first_line(error)}); use another one"
        ) from error
    return params, config


def find_checkpoint(path: str | Path) -> Path:
    """The folder STEP that `path` (WORKDIR, checkpoints, best, last or STEP itself) stands for."""
    path = Path(path).absolute()
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}: the folder does not exist")
    if (path / "params").is_dir():
        return path
    for parent in (path / "checkpoints/best", path / "best", path / "checkpoints/last", path / "last", path):
        steps = sorted((int(p.name), p) for p in parent.glob("*") if p.name.isdigit()) if parent.is_dir() else []
        if steps:
            return steps[-1][1]
    raise CheckpointError(
        f"There is no checkpoint in {path}: expected a workdir of experiments.train (with checkpoints/best or "
        "checkpoints/last) or one of its checkpoint folders"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config saved with the checkpoint folder STEP."""
    try:
        return _located(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "config"), folder)
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint {folder} has no readable config ({first_line(error)}); use another one"
        ) from error


def _located(value: Any, folder: Path) -> Any:
    """The config with files of the checkpoint, as imported ones name them, under their present paths."""
    if isinstance(value, dict):
        return {name: _located(inner, folder) for name, inner in value.items()}
    return value.replace(HERE, str(folder)) if isinstance(value, str) and value.startswith(HERE) else value


def check_tree(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError that lists every array that is missing, unknown or of another shape."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not known to the model" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        has, needs = tuple(found[name].shape), tuple(wanted[name].shape)
        if has != needs:
            wrong.append(f"{name} has shape {list(has)}, not {list(needs)}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CheckpointError(
            f"The checkpoint {folder} does not fit this config: {shown}; use the config that it was trained with, "
            "or a new --workdir"
        )


def _without_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def silence_abandoned_work() -> None:
    """What a failed save or read leaves running complains piece by piece when it ends; one sentence has said it."""
    for name, wanted in (("absl", _without_orbax), ("asyncio", _is_retrieved)):
        logging.getLogger(name).addFilter(wanted)  # which does nothing the second time
    usual, usual_of_threads = sys.unraisablehook, sys.excepthook
    if usual.__module__ == __name__:
        return

    def abandoned(error: BaseException | None) -> bool:
        return any(words in str(error) for words in ("Event loop is closed", "sys.meta_path is None"))

    def unraisable_hook(unraisable: Any) -> None:
        if not abandoned(unraisable.exc_value):
            usual(unraisable)

    def except_hook(kind: Any, error: BaseException, trace: Any) -> None:  # what threads outside Python print by
        if not abandoned(error):
            usual_of_threads(kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable_hook, except_hook


def _manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    silence_abandoned_work()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
    try:
        return ocp.CheckpointManager(folder, options=options)
    except OSError as error:
        raise CheckpointError(f"The folder {folder} cannot be used for checkpoints ({first_line(error)})") from error


def _read_score(folder: Path) -> float:
    try:
        return float(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(folder / "evaluation")["score"])
    except Exception:
        return -np.inf  # a damaged best checkpoint must not stop the run; the next evaluation replaces it


def _step(folder: Path) -> int:
    return int(folder.name)


def _segments(key_path: Any) -> str:
    """Key path of a pytree leaf -> slash path of plain names, independent of the classes in the tree."""
    names = []
    for key in key_path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
    return "/".join(names)


def _train_tree(state: TrainState) -> dict[str, Any]:
    """Step, optimizer state and averages as nested dicts, which read back under any version of optax's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.opt_state)
    tree = {"step": state.step, "optimizer": unflatten({_segments(path): leaf for path, leaf in leaves})}
    if state.ema is not None:
        tree["ema"] = unflatten(state.ema)
    return tree


def _state_from_trees(params: Params, train: dict[str, Any], shapes: TrainState) -> TrainState:
    flat = flatten(train["optimizer"])
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes.opt_state)
    opt_state = jax.tree_util.tree_unflatten(structure, [flat[_segments(path)] for path, _ in leaves])
    return TrainState(train["step"], params, opt_state, flatten(train["ema"]) if "ema" in train else None)


def _placed(shapes: Any, shardings: Any) -> ocp.args.PyTreeRestore:
    restore_args = jax.tree.map(
        lambda leaf, sharding: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype),
        shapes,
        shardings,
    )
    return ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args)


def read_metadata(item: Path) -> dict[str, Any]:
    """Nested dict of what is stored (with .shape and .dtype) in one item folder of a checkpoint."""
    silence_abandoned_work()  # first: reads that a failed one leaves behind end at any time
    metadata = ocp.PyTreeCheckpointHandler().metadata(item)
    return getattr(metadata, "tree", metadata)


def _read_tree(
    item: Path, sharding_for: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None, only: str | None = None
) -> dict[str, Any]:
    """One item folder as nested dict; with `only`, just that branch (empty if it is not there)."""
    tree = read_metadata(item)
    if only is not None:
        if only not in tree:
            return {}
        tree = {only: tree[only]}
    return read_parts(item, flatten(tree), sharding_for)


def read_parts(
    item: Path,
    leaves: Mapping[str, Any],
    sharding_for: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Some arrays of an item folder as nested dict; `leaves` are those of `read_metadata`, by slash path."""
    restore_args: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if sharding_for is None:
            restore_args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            restore_args[name] = ocp.ArrayRestoreArgs(sharding=sharding_for(name, tuple(leaf.shape)), dtype=leaf.dtype)
    shapes = unflatten({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
            item,
            args=ocp.args.PyTreeRestore(item=shapes, restore_args=unflatten(restore_args), partial_restore=True),
        )


def _remove_unfinished(folder: Path) -> None:
    for _ in range(20 if jax.process_index() == 0 else 0):
        leftovers = list(folder.glob("*/*.orbax-checkpoint-tmp*"))
        if not leftovers:
            break
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        time.sleep(0.05)  # the threads of an abandoned save may still be writing
