"""What the training loop knows of a task: the protocol that every objective follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec

Params = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Attributes:
      metrics: scalars by name, for the writers.
      score: higher is better; the best checkpoint is chosen by it.
      table: what a person reads at the end of training.
      images: pictures by name, uint8 [H, W, 3].
      records: one dict per scored example, JSON-able.
    """

    metrics: dict[str, float]
    score: float
    table: str = ""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


class Objective(Protocol):
    """A task that the trainer can optimise. All functions of params are pure."""

    name: str
    batch_spec: dict[str, jax.ShapeDtypeStruct]  # one global batch
    sharding_rules: tuple[tuple[str, PartitionSpec], ...]  # first regular expression that matches a parameter path wins
    next_command: str  # worth trying after training; {workdir} is filled in

    @property
    def contents(self) -> Mapping[str, int]:
        """What one example holds, by its unit, for rates: {"images": 1, "tokens": 400}; padding included."""
        ...

    def init(self, rng: jax.Array) -> Params:
        """Starting parameters, float32."""
        ...

    def starting_weights(self) -> Mapping[str, Any]:
        """Arrays by slash path that replace starting parameters, empty if there are none; host memory or a file.

        Called once, by a run that starts anew. Neither resuming nor evaluating needs what is read here.
        """
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and its named float32 terms."""
        ...

    def trainable(self, path: str) -> bool:
        """Whether the parameter with this slash-separated path is optimised; the others are frozen."""
        ...

    def evaluate(self, params: Params, step: int) -> Evaluation:
        """Scores the parameters on held-out data."""
        ...

    def describe(self) -> str:
        """What a person should know before the run: starting weights, data, what is trained."""
        ...
