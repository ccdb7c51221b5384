"""Noise schedules of diffusion: how much noise a training step has, and what a network predicts from it.

T training steps, B batch, P panels; latents have any shape [B, ...].
a_t is the cumulative product of 1 - beta: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) epsilon, of signal sqrt(a_t) and noise
sqrt(1 - a_t). The tables are those of diffusers: bit for bit, or in the last bits where they are rescaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.models.sizes import check_choice

BETAS = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
LARGEST_BETA = 0.999  # of the cosine schedule

Array = jax.Array | np.ndarray


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each training step has, and what the network predicts.

    Attributes:
      train_steps: T, at least 2.
      betas: "scaled_linear" (the roots of the betas are evenly spaced), "linear", or "squaredcos_cap_v2"
        (arXiv 2102.09672, equation 17; it ignores `beta_start` and `beta_end`).
      prediction: "epsilon" (the noise), "v_prediction" (signal * noise - noise level * x0, arXiv 2202.00512) or
        "sample" (x0).
      zero_terminal_snr: rescale the betas so that the last step has no signal (arXiv 2305.08891, algorithm 1).
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: str = "scaled_linear"
    prediction: str = "epsilon"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.train_steps < 2:
            raise ValueError(f"train_steps is {self.train_steps}; at least 2 are needed.")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must rise between 0 and 1.")
        check_choice(self, "betas", BETAS)
        check_choice(self, "prediction", PREDICTIONS)

    @classmethod
    def stable_diffusion(cls, **changes: Any) -> NoiseSchedule:
        """Of Stable Diffusion 1.5 and SDXL."""
        return cls(**changes)

    def alphas_cumprod(self) -> np.ndarray:
        """a_t, float32 [T]. With `zero_terminal_snr` the last is 0."""
        if self.betas == "scaled_linear":
            betas = _float32_ramp(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        elif self.betas == "linear":
            betas = _float32_ramp(self.beta_start, self.beta_end, self.train_steps)
        else:
            betas = _cosine_betas(self.train_steps)
        if self.zero_terminal_snr:
            betas = _without_terminal_signal(betas)
        return _cumulative_alphas(betas)


def _float32_ramp(start: float, stop: float, count: int) -> np.ndarray:
    """Evenly spaced float32 numbers [count] as torch makes them: a float32 step, counted from the nearer end."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    number = np.arange(count)
    rising, falling = first + step * number, last - step * (count - 1 - number)
    return np.where(number < count // 2, rising, falling).astype(np.float32)


def _cosine_betas(count: int) -> np.ndarray:
    def alpha(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha((step + 1) / count) / alpha(step / count) for step in range(count)]
    return np.minimum(betas, LARGEST_BETA).astype(np.float32)


def _cumulative_alphas(betas: np.ndarray) -> np.ndarray:
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def _without_terminal_signal(betas: np.ndarray) -> np.ndarray:
    """The betas whose signal is shifted to end at 0 and scaled to start as before."""
    signal = np.sqrt(_cumulative_alphas(betas))
    first, last = signal[0], signal[-1]
    alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _levels(table: Array, t: Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """Signal and noise at steps t [B] or [B, ...], with as many trailing axes as broadcast to arrays of `ndim`."""
    alphas = jnp.asarray(table)[t]
    alphas = alphas.reshape(alphas.shape + (1,) * (ndim - alphas.ndim))
    return jnp.sqrt(alphas), jnp.sqrt(1 - alphas)


def add_noise(table: Array, x0: jax.Array, noise: jax.Array, t: Array) -> jax.Array:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise.

    Args:
      table: [T], `NoiseSchedule.alphas_cumprod()`. x0, noise: [B, ...].
      t: int, in 0..T-1, the leading axes of x0: [B] one step per row, [B, P] one per panel.
    """
    signal, level = _levels(table, t, x0.ndim)
    return signal * x0 + level * noise


def velocity(table: Array, x0: jax.Array, noise: jax.Array, t: Array) -> jax.Array:
    """v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512, appendix D); arguments as `add_noise`."""
    signal, level = _levels(table, t, x0.ndim)
    return signal * noise - level * x0


def training_target(prediction: str, table: Array, x0: jax.Array, noise: jax.Array, t: Array) -> jax.Array:
    """What a network of this prediction type should put out for `add_noise(table, x0, noise, t)`."""
    if prediction == "v_prediction":
        return velocity(table, x0, noise, t)
    return noise if prediction == "epsilon" else x0


def snr(table: Array, t: Array) -> jax.Array:
    """The signal-to-noise ratio a_t / (1 - a_t), of the shape of t."""
    alphas = jnp.asarray(table)[t]
    return alphas / (1 - alphas)


class Conversion(NamedTuple):
    """x0 and epsilon as linear functions of x and of the network's output."""

    x0_of_x: Any
    x0_of_output: Any
    epsilon_of_x: Any
    epsilon_of_output: Any

    @classmethod
    def of(cls, prediction: str, signal: Any, noise: Any) -> Conversion:
        """For arrays (numpy or jax) of signal and noise."""
        zero = 0 * signal
        if prediction == "epsilon":
            return cls(1 / signal, -noise / signal, zero, zero + 1)
        if prediction == "v_prediction":
            return cls(signal, -noise, noise, signal)
        return cls(zero, zero + 1, 1 / noise, -signal / noise)

    def __call__(self, x: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0 = self.x0_of_x * x + self.x0_of_output * output
        return x0, self.epsilon_of_x * x + self.epsilon_of_output * output


def x0_and_epsilon(
    prediction: str, table: Array, x: jax.Array, output: jax.Array, t: Array
) -> tuple[jax.Array, jax.Array]:
    """What a network's output says about the clean latents and the noise of x = x_t; arguments as `add_noise`."""
    return Conversion.of(prediction, *_levels(table, t, x.ndim))(x, output)
