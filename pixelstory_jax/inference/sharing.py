"""How panels share during sampling: which layers and steps, which tokens, drawn on the host and passed as arrays.

The rules are those of the released StoryDiffusion apps and of the paper (arXiv 2405.01434, section 3.1). Uniform draws
are arguments: recorded draws reproduce the reference.

S denoising steps, L sharing layers, R anchors, N tokens of an image at a layer, K sampled tokens of an anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixelstory_jax.models.consistent_attention import Sample, Sharing
from pixelstory_jax.models.sizes import check_choice

SCHEDULES = ("always", "app", "low_vram")
STRATEGIES = ("bank", "replay", "joint")
SAMPLINGS = ("mask", "gathered", "bernoulli")
EARLY_STEPS, EARLY_GATE, LATE_GATE = 20, 0.3, 0.1  # a layer shares if its draw is above the gate of the step
PLAIN_STEPS = {"app": 5, "low_vram": 1}  # so many first steps without gates
PLAIN, SAMPLED, EVERYTHING = 0, 1, 2


@dataclass(frozen=True)
class SharingPlan:
    """How a story is shared.

    Attributes:
      strategy: "bank" (anchors first, later panels read what they stored), "replay" (anchors are computed again beside
        later panels, nothing is stored) or "joint" (all panels at once, in windows).
      anchors: panels of a character that the others look at, for bank and replay.
      window: panels that see each other in joint generation; 0 for all.
      rate: share of an anchor's tokens that is seen: one number, or one per grid, coarsest first (sa32, sa64 of the
        apps).
      sampling: "gathered" (a fixed number of tokens, the paper's wording), "bernoulli" (each token by itself, gathered
        and padded, as the low-VRAM app) or "mask" (each token by itself, all keys masked, as the first app).
      schedule: "always" (every layer at every step), "app" or "low_vram" (the gates of the released apps).
    """

    strategy: str = "joint"
    anchors: int = 2
    window: int = 4
    rate: float | tuple[float, ...] = 0.5
    sampling: str = "gathered"
    schedule: str = "always"

    def __post_init__(self) -> None:
        check_choice(self, "strategy", STRATEGIES)
        check_choice(self, "sampling", SAMPLINGS)
        check_choice(self, "schedule", SCHEDULES)
        if self.anchors < 1:
            raise ValueError(f"anchors is {self.anchors}; at least 1 is needed.")
        if self.window < 0 or self.window == 1:
            raise ValueError(f"window is {self.window}; 0 (all panels) or at least 2 is needed.")
        if self.rate == ():
            raise ValueError("rate is (); one number is needed, or one per grid.")
        if not all(0 <= rate <= 1 for rate in self._rates(1)):
            raise ValueError(f"rate is {self.rate}; shares lie between 0 and 1.")
        if self.schedule == "app" and self.sampling != "mask":
            raise ValueError("The app's schedule reads all tokens in its first steps; it needs sampling 'mask'.")
        if self.schedule == "app" and self.strategy == "replay":
            raise ValueError(
                "The app's schedule reads where anchors are plain, but a replay makes both in one call; take 'bank'."
            )

    def _rates(self, grids: int) -> tuple[float, ...]:
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,) * grids
        return rates if len(rates) >= grids else rates + rates[-1:] * (grids - len(rates))

    def rates(self, grids: Sequence[int]) -> dict[int, float]:
        """N -> rate for the grids of a network, coarsest first; the last rate serves all finer grids."""
        return dict(zip(grids, self._rates(len(grids)), strict=False))


@dataclass(frozen=True)
class Draws:
    """Uniform numbers in [0, 1) that decide everything that is random about sharing.

    Attributes:
      layers: float64 [S, L], against the gates.
      tokens: N -> float32 [S, R, N], against the rates.
    """

    layers: np.ndarray
    tokens: Mapping[int, np.ndarray]

    @classmethod
    def from_seed(cls, seed: int, steps: int, layers: int, anchors: int, grids: Sequence[int]) -> Draws:
        """The draws of a story. Each anchor and grid has a stream of its own: an anchor more changes no other's."""
        tokens = {
            grid: np.stack(
                [np.random.default_rng((seed, 1, grid, r)).random((steps, grid), np.float32) for r in range(anchors)],
                axis=1,
            )
            if anchors
            else np.zeros((steps, 0, grid), np.float32)
            for grid in grids
        }
        return cls(np.random.default_rng((seed, 0)).random((steps, layers)), tokens)


def attention_path(schedule: str, reading: bool, step: int, draw: float) -> int:
    """What a layer does: PLAIN self-attention, SAMPLED anchors, or EVERYTHING in them (the first reads of the app)."""
    if schedule == "always":
        return SAMPLED
    if step < PLAIN_STEPS[schedule]:
        return EVERYTHING if schedule == "app" and reading and step < PLAIN_STEPS["app"] else PLAIN
    return SAMPLED if draw > (EARLY_GATE if step < EARLY_STEPS else LATE_GATE) else PLAIN


def sample_tokens(draws: np.ndarray, rate: float, sampling: str) -> Sample:
    """Which of the tokens [..., N] are shown, for any leading axes."""
    chosen = draws < np.float32(rate)
    if sampling == "mask":
        return Sample(chosen)
    if sampling == "bernoulli":
        most = max(1, int(chosen.sum(-1).max(initial=0)))
        order = np.argsort(~chosen, axis=-1, kind="stable")[..., :most]
        return Sample(np.arange(most) < chosen.sum(-1, keepdims=True), order.astype(np.int32))
    count = max(1, round(rate * draws.shape[-1]))
    index = np.sort(np.argsort(draws, axis=-1, kind="stable")[..., :count], axis=-1)
    return Sample(np.full(index.shape, rate > 0), index.astype(np.int32))


def share_steps(plan: SharingPlan, draws: Draws, sees: np.ndarray, reading: bool, store: bool = False) -> Sharing:
    """The sharing of a whole denoising loop: gates and samples have the steps as a leading axis, `sees` has not.

    Args:
      sees: bool [G or 1, A, R], which panel may see which anchor.
      reading: whether the anchors were made by an earlier pass (bank) or are blind to the panels (replay).
      store: whether the pass keeps a bank.
    """
    steps = len(draws.layers)
    path = np.array([[attention_path(plan.schedule, reading, s, u) for u in draws.layers[s]] for s in range(steps)])
    rates = plan.rates(tuple(draws.tokens))
    samples = {grid: sample_tokens(u, rates[grid], plan.sampling) for grid, u in draws.tokens.items()}
    if plan.sampling == "mask":
        everything = (path == EVERYTHING).any(1)[:, None, None]
        samples = {grid: Sample(sample.valid | everything) for grid, sample in samples.items()}
    window = plan.window if plan.strategy == "joint" and sees.shape[1] == sees.shape[2] else 0
    return Sharing(sees, samples, path != PLAIN, None, store, 0 if window >= sees.shape[1] else window)
