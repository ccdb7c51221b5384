"""Optimizers and learning rate schedules, over a flat dict of the trained parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers, muon

from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.options import TrainOptions


def learning_rate_schedule(options: TrainOptions) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine, linear or constant down to `final_fraction` of the peak."""
    warmup = options.warmup_steps if options.warmup_steps >= 1 else options.warmup_steps * options.steps
    warmup = min(int(round(warmup)), options.steps)
    peak, rest = options.learning_rate, max(options.steps - warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=options.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * options.final_fraction, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[options.schedule]()
    if not warmup:
        return after
    # The first step already moves: its rate is peak / warmup, not 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def decay_mask(trained: Mapping[str, Any], no_decay: str) -> dict[str, bool]:
    """True for matrices; False for 1-D parameters and those whose path matches `no_decay`.

    The path decides as well as the shape because scanned layers stack their biases and norm scales to 2-D.
    """
    return {path: leaf.ndim > 1 and not re.search(no_decay, path) for path, leaf in trained.items()}


def learning_rate_factors(paths: Iterable[str], multipliers: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate per path: that of the longest prefix (whole path components), else 1."""
    paths = list(paths)
    by_length = sorted(multipliers, key=len)
    covers = {prefix: [p for p in paths if f"{p}/".startswith(prefix.rstrip("/") + "/")] for prefix in by_length}
    unused = [prefix for prefix, covered in covers.items() if not covered]
    if unused:
        raise ConfigError(f"train.learning_rate_multipliers: no trained parameter starts with {', '.join(unused)}")
    factors = dict.fromkeys(paths, 1.0)
    for prefix in by_length:
        factors.update(dict.fromkeys(covers[prefix], float(multipliers[prefix])))
    return factors


def _scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: Any, params: Any = None) -> Any:
        return {path: value * factors[path] for path, value in updates.items()}

    return optax.stateless(update)


def hidden_matrix(path: str, leaf: Any, pattern: str) -> MuonDimensionNumbers | None:
    """Which axes Muon makes orthogonal; None leaves the leaf to AdamW.

    The last two of a matrix or a stack of them; all but the last against the last of a convolution [k, k, in, out].
    """
    if leaf.ndim not in (2, 3, 4) or not re.search(pattern, path):
        return None
    return MuonDimensionNumbers((0, 1, 2), 3) if leaf.ndim == 4 else MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _muon(
    schedule: optax.Schedule, options: TrainOptions, mask: Any, trained: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on hidden matrices, AdamW on the rest.

    Updates have the root mean square of typical AdamW updates (arXiv 2502.16982), so one learning rate serves both.
    """
    dimensions = {path: hidden_matrix(path, leaf, options.muon_matrices) for path, leaf in trained.items()}
    return muon(
        schedule,
        weight_decay=options.weight_decay,
        weight_decay_mask=mask,
        adam_b1=options.b1,
        adam_b2=options.b2,
        adam_weight_decay=options.weight_decay,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=lambda _: dimensions,  # what it is called with has holes; the paths decide
        consistent_rms=0.2,
    )


def build_optimizer(options: TrainOptions, trained: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer for `trained`, a flat dict slash path -> array or ShapeDtypeStruct."""
    schedule = learning_rate_schedule(options)
    mask = decay_mask(trained, options.no_decay)
    decay = options.weight_decay
    if options.optimizer == "adamw":
        core = optax.adamw(schedule, b1=options.b1, b2=options.b2, weight_decay=decay, mask=mask)
    elif options.optimizer == "lion":
        core = optax.lion(schedule, b1=options.b1, b2=options.b2, weight_decay=decay, mask=mask)
    elif options.optimizer == "muon":
        core = _muon(schedule, options, mask, trained)
    else:
        core = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(decay, mask),  # decoupled and scaled by the learning rate, as in AdamW
            optax.scale_by_learning_rate(schedule),
        )
    parts = [core]
    if options.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(options.clip_norm))
    if options.learning_rate_multipliers:
        parts.append(_scale_by_path(learning_rate_factors(trained, options.learning_rate_multipliers)))
    return optax.chain(*parts)
