"""The sections `train` and `profile` of a config, with their defaults and checks in one place."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from pixelstory_jax.training.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train. Every field can be set in `config.train`.

    steps: optimizer steps. batch_size: examples of one global batch.
    optimizer: adamw, adafactor, lion or muon. b1, b2, weight_decay: as usual.
    clip_norm: largest global norm of the gradient; 0 = off.
    learning_rate: the peak. schedule: cosine, linear or constant. final_fraction: last rate as a share of the peak.
    warmup_steps: steps if at least 1, a share of `steps` if below 1.
    muon_matrices: with the optimizer muon, regular expression on the slash path of the matrices that it takes; AdamW
      has the rest.
    no_decay: regular expression on the slash path of parameters without weight decay (1-D ones never have any).
    learning_rate_multipliers: slash path prefix -> factor on the learning rate; the longest prefix wins.
    accumulate: micro-batches per step; gradients are averaged over them. ema: decay of averaged parameters, 0 = off.
    eval_every, checkpoint_every, log_every: steps; 0 = only at the end (log_every must be positive).
    mesh: sizes of the axes data, fsdp, tensor; one may be -1 (whatever is left).
    data_threads, prefetch: threads that make batches, and how many batches wait ready.
    data_processes: worker processes for data instead of threads; 0 = threads.
    """

    steps: int = 1000
    batch_size: int = 8
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: float = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    muon_matrices: str = r"(^|/)layers/.*kernel$"
    no_decay: str = (
        r"(^|/)(([^/]*_)?bias(_\d+)?|scale|([^/]*_)?embedding|[^/]*norm[^/]*"
        r"|token_weights|scale_weights|mask_tokens|iou_token|no_mask|points|not_a_point)(/|$)"
    )
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    learning_rate_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    ema: float = 0.0
    eval_every: int = 0
    checkpoint_every: int = 0
    log_every: int = 10
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "tensor": 1})
    data_threads: int = 2
    data_processes: int = 0
    prefetch: int = 4

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> TrainOptions:
        """Reads `config.train` (a ConfigDict or dict); raises ConfigError in one sentence."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for key, value in dict(section).items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean train.{near[0]}?" if near else ""
                raise ConfigError(f"The trainer has no field train.{key}{hint}")
            values[key] = value.to_dict() if hasattr(value, "to_dict") else value
        options = cls(**{key: value for key, value in values.items() if value is not None})
        options._check_types()
        options._check_values()
        return options

    def _check_types(self) -> None:
        words: dict[Any, str] = {"int": "a whole number", "float": "a number", "str": "text"}
        accepted: dict[Any, Any] = {"int": int, "float": (int, float), "str": str}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in words and (not isinstance(value, accepted[field.type]) or isinstance(value, bool)):
                raise ConfigError(f"train.{field.name} must be {words[field.type]}, got {value!r}")
        for name, kind in (("learning_rate_multipliers", "float"), ("mesh", "int")):
            if not isinstance(getattr(self, name), Mapping):
                raise ConfigError(f"train.{name} must be a dict, got {getattr(self, name)!r}")
            for key, value in getattr(self, name).items():
                if not isinstance(value, accepted[kind]) or isinstance(value, bool):
                    raise ConfigError(f"train.{name}: {key} must be {words[kind]}, got {value!r}")

    def _check_values(self) -> None:
        for name in ("steps", "batch_size", "log_every", "accumulate", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "clip_norm", "eval_every", "checkpoint_every", "data_threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        choices = {"optimizer": ("adamw", "adafactor", "lion", "muon"), "schedule": ("cosine", "linear", "constant")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"train.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("no_decay", "muon_matrices"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ConfigError(
                    f"train.{name} must be a regular expression, got {getattr(self, name)!r} ({error})"
                ) from error
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train.ema must be at least 0 and below 1, got {self.ema}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulate ({self.accumulate})"
            )
        unknown = set(self.mesh) - {"data", "fsdp", "tensor"}
        if unknown:
            raise ConfigError(f"train.mesh has the axes data, fsdp and tensor, got {', '.join(sorted(unknown))}")


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """The section `profile` of a config.

    steps: which steps to trace, as "10:13" for the steps 10, 11, 12 and 13; empty for none.
    """

    steps: str = ""

    @classmethod
    def from_config(cls, section: Mapping[str, Any], last: int) -> ProfileOptions:
        """Reads `config.profile`; raises ConfigError in one sentence where no run of `last` steps has such steps."""
        unknown = set(section) - {"steps"}
        if unknown:
            raise ConfigError(f"The profiler has no field profile.{min(unknown)}; it has profile.steps")
        options = cls(**section)
        span = options.span
        if options.steps and (span is None or not 1 <= span[0] <= span[1] <= last):
            raise ConfigError(
                f"profile.steps must be FIRST:LAST, two steps from 1 to train.steps ({last}), as 10:13, got "
                f"{options.steps!r}"
            )
        return options

    @property
    def span(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"(\d+):(\d+)", str(self.steps))
        return (int(match[1]), int(match[2])) if match else None
