"""The training state, and the one compiled step that advances it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives.flops import GRADIENTS, FlatParams
from pixelstory_jax.objectives.objective import Batch, Objective, Params
from pixelstory_jax.training.errors import CheckpointError, TrainingStopped
from pixelstory_jax.training.finite import step_flags
from pixelstory_jax.training.optimizer import learning_rate_schedule
from pixelstory_jax.training.options import TrainOptions
from pixelstory_jax.training.sharding import Rules, partition, replicated


class TrainState(NamedTuple):
    """All that changes during training. Random keys are folded from the seed and `step`, never carried.

    step: int32 scalar, optimizer steps done. params: nested dict, trained and frozen parameters.
    opt_state, ema: over the trained parameters only, by slash path; ema is None where it is off.
    """

    step: Any
    params: Params
    opt_state: Any
    ema: FlatParams | None


def split_trained(params: Params, trainable: Callable[[str], bool]) -> tuple[FlatParams, FlatParams]:
    """(trained, frozen) by slash path."""
    flat = flatten(params)
    trained = {path: value for path, value in flat.items() if trainable(path)}
    return trained, {path: value for path, value in flat.items() if path not in trained}


def averaged_params(state: TrainState) -> Params:
    """The parameters to evaluate and to use: the averages where there are any, else the parameters."""
    return state.params if state.ema is None else unflatten({**flatten(state.params), **state.ema})


def make_state(objective: Objective, optimizer: optax.GradientTransformation, ema: float, seed: int) -> TrainState:
    """The state before the first step; pure, so that `jax.eval_shape` gives its shapes."""
    params = objective.init(jax.random.fold_in(jax.random.key(seed), 0x1217))
    trained, _ = split_trained(params, objective.trainable)
    averages = jax.tree.map(jnp.copy, trained) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), averages)


def state_shardings(shapes: TrainState, rules: Rules, mesh: Mesh) -> TrainState:
    """Shardings of every leaf: parameters by the rules, moments and averages like their parameter."""
    flat = flatten(shapes.params)
    by_path = {path: NamedSharding(mesh, partition(path, leaf.shape, rules, mesh)) for path, leaf in flat.items()}

    def like_parameter(key_path: Any, leaf: Any) -> NamedSharding:
        for key in key_path:
            name = getattr(key, "key", None)
            if name in by_path and flat[name].shape == leaf.shape:
                return by_path[name]
        return replicated(mesh)  # counters, and factored moments, which are small

    return TrainState(
        replicated(mesh),
        unflatten(by_path),
        jax.tree_util.tree_map_with_path(like_parameter, shapes.opt_state),
        None if shapes.ema is None else {path: by_path[path] for path in shapes.ema},
    )


READ_WHOLE = 4 << 30  # bytes of a starting array up to which the host holds all of it at once


def place_starting_weights(state: TrainState, weights: Mapping[str, Any], shardings: TrainState) -> TrainState:
    """Replaces initialised parameters by `weights` (by slash path: arrays, or lazy ones that are read here)."""
    flat, where = flatten(state.params), flatten(shardings.params)
    wrong = [f"{path} is unknown" for path in weights if path not in flat]
    for path in weights.keys() & flat.keys():
        if tuple(weights[path].shape) != flat[path].shape:
            wrong.append(f"{path} has shape {list(weights[path].shape)}, not {list(flat[path].shape)}")
    if wrong:
        raise CheckpointError(f"The starting weights do not fit the model: {'; '.join(sorted(wrong))}")
    for path, array in weights.items():
        if array.nbytes <= READ_WHOLE:  # an array in a file would be read again for each device
            array = np.asarray(array)
        read = functools.partial(_read_part, array, flat[path].dtype)
        flat[path] = jax.make_array_from_callback(flat[path].shape, where[path], read)
    ema = None if state.ema is None else {path: jnp.copy(flat[path]) for path in state.ema}
    return state._replace(params=unflatten(flat), ema=ema)


def _read_part(array: Any, dtype: Any, index: Any) -> np.ndarray:
    return np.asarray(array[index], dtype)


def build_step(
    objective: Objective, optimizer: optax.GradientTransformation, options: TrainOptions, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step function: (state, global batch) -> (next state, float32 scalars and the flags "finite" of finite.py).

    Gradients exist for trained parameters only. With `accumulate` the batch is cut into micro-batches whose losses,
    metrics and gradients are averaged.
    """
    schedule = learning_rate_schedule(options)

    def loss_and_gradients(trained: FlatParams, frozen: FlatParams, batch: Batch, rng: jax.Array) -> Any:
        def loss_function(trained: FlatParams) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(unflatten({**frozen, **trained}), batch, rng)

        (loss, metrics), gradients = jax.value_and_grad(loss_function, has_aux=True)(trained)
        return (loss, metrics), gradients

    def accumulated(trained: FlatParams, frozen: FlatParams, batch: Batch, rng: jax.Array) -> Any:
        count = options.accumulate
        # Row r goes to micro-batch r % count: every device keeps its own rows.
        micro = {k: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}

        def one(total: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, index = item
            result = loss_and_gradients(trained, frozen, part, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda t, r: t + r.astype(t.dtype) / count, total, result), None

        first = {k: x[0] for k, x in micro.items()}
        shapes = jax.eval_shape(loss_and_gradients, trained, frozen, first, rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        total, _ = jax.lax.scan(one, zeros, (micro, jnp.arange(count)))
        return jax.tree.map(lambda t, s: t.astype(s.dtype), total, shapes)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, frozen = split_trained(state.params, objective.trainable)
        compute = loss_and_gradients if options.accumulate == 1 else accumulated
        with jax.named_scope(GRADIENTS):
            (loss, metrics), gradients = compute(trained, frozen, batch, rng)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)  # type: ignore[assignment]
        flags = step_flags(gradients, trained)
        ema = state.ema
        if ema is not None:
            # A short memory at first, so that the random start does not linger.
            decay = jnp.minimum(options.ema, (1.0 + state.step) / (10.0 + state.step))
            ema = {
                path: decay.astype(a.dtype) * a + (1 - decay).astype(a.dtype) * trained[path] for path, a in ema.items()
            }
        scalars = {
            "loss": loss,
            **{name: value for name, value in metrics.items() if name != "loss"},
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        scalars = {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}
        return TrainState(state.step + 1, unflatten({**frozen, **trained}), opt_state, ema), {
            **scalars,
            "finite": flags,
        }

    return step


def check_trained(params: Params, objective: Objective) -> None:
    if not split_trained(params, objective.trainable)[0]:
        raise TrainingStopped(f"The objective {objective.name} trains no parameter at all")
