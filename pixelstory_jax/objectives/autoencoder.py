"""Training of the image autoencoder: pictures come back as they were, and latents are near a unit normal.

The loss is the negative evidence bound with a Laplace and a little normal likelihood, and a term for edges: flat-colour
pictures are judged by their outlines. Letters: B pictures, H, W sides in pixels, h, w sides of the latents, L channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.sharding import PartitionSpec

from pixelstory_jax.data.pictures import Pictures
from pixelstory_jax.data.pipeline import stack_examples
from pixelstory_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    byte_pixels,
    posterior_sample,
    signed_pixels,
)
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.objectives.objective import Batch, Evaluation, Params

# Kernels [k, k, in, out]: the result's channels over both axes; all else is small and stays whole.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"conv(_in|_1|_2)?/kernel", PartitionSpec(None, None, None, ("fsdp", "tensor"))),
)
DISTURBANCE = 0.1  # noise in latents, as a share of their standard deviation, that decoding has to bear
SHOWN = 8  # pictures on a sheet


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the terms, each a mean over all of its values (pixels in [-1, 1], latents).

    `halved` asks latents of half the resolution for the picture of half the resolution (arXiv 2502.14831): latents are
    then smooth like pictures, which diffusion learns much faster.
    """

    absolute: float = 1.0
    squared: float = 0.5
    edges: float = 1.0
    halved: float = 0.25
    divergence: float = 4e-3


def differences(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Steps from each pixel to the one below and to the one on the right, of [B, H, W, C]."""
    return images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]


def edge_loss(images: jax.Array, others: jax.Array) -> jax.Array:
    """Mean absolute difference of the steps between neighbouring pixels, both directions added up."""
    pairs = zip(differences(images), differences(others), strict=True)
    return sum((jnp.abs(a - b).mean() for a, b in pairs), jnp.zeros(()))


def halve(images: jax.Array) -> jax.Array:
    """Means of 2 x 2 neighbours, [B, H, W, C] to [B, H / 2, W / 2, C]."""
    return reduce(images, "b (h y) (w x) c -> b h w c", "mean", y=2, x=2)


def normal_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Mean Kullback-Leibler divergence, in nats a value, from normals of these moments to the unit normal."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()


def signal_to_noise(images: jax.Array, others: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in decibels per picture, [B], of uint8 pictures [B, H, W, C]."""
    error = jnp.square(images.astype(jnp.float32) - others.astype(jnp.float32)).mean((1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-3))


def comparison_sheet(rows: Iterable[np.ndarray], scale: int = 2) -> np.ndarray:
    """Rows of pictures below each other, uint8 [B, H, W, 3] each, every pixel `scale` times enlarged."""
    page = np.concatenate([rearrange(row, "b h w c -> h (b w) c") for row in rows])
    return page.repeat(scale, 0).repeat(scale, 1)


class AutoencoderObjective:
    """See the module. The score is the signal-to-noise ratio of held-out pictures, decoded from the mean latents."""

    name = "autoencoder"
    sharding_rules = SHARDING_RULES
    next_command = "python -m experiments.ship_autoencoder --workdir={workdir} --out=tiny_autoencoder.safetensors"

    def __init__(
        self,
        config: AutoencoderConfig,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        weights: AutoencoderLoss,
        evaluation_batches: Callable[[], Iterable[Batch]],
    ):
        self.config, self.batch_spec, self.weights = config, dict(batch_spec), weights
        self.evaluation_batches = evaluation_batches
        self.model = Autoencoder(config)
        self._score = jax.jit(self.score_batch)

    @property
    def contents(self) -> dict[str, int]:
        return {"images": 1}

    def describe(self) -> str:
        height, width = self.batch_spec["image"].shape[1:3]
        side, channels = self.config.reduction, self.config.latent_channels
        return (
            f"An autoencoder of {height} x {width} pixels to {height // side} x {width // side} latents of {channels} "
            "channels, from random initialisation."
        )

    def starting_weights(self) -> Mapping[str, Any]:
        return {}

    def trainable(self, path: str) -> bool:
        return True

    def _latents_shape(self) -> tuple[int, int, int, int]:
        batch, height, width, _ = self.batch_spec["image"].shape
        side = self.config.reduction
        return batch, height // side, width // side, self.config.latent_channels

    def init(self, rng: jax.Array) -> Params:
        images = jnp.zeros(self.batch_spec["image"].shape)
        return self.model.init(rng, images, jnp.zeros(self._latents_shape()))["params"]

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images, weights = signed_pixels(batch["image"]), self.weights
        noise = jax.random.normal(rng, (len(images), *self._latents_shape()[1:]))
        outputs: Any = self.model.apply({"params": params}, images, noise)
        decoded, mean, logvar = outputs
        sampled = posterior_sample(mean, logvar, noise)
        coarse: Any = self.model.apply({"params": params}, halve(sampled), method=Autoencoder.decode)
        terms = {
            "absolute": jnp.abs(decoded - images).mean(),
            "squared": jnp.square(decoded - images).mean(),
            "edges": edge_loss(decoded, images),
            "halved": jnp.abs(coarse - halve(images)).mean(),
            "divergence": normal_divergence(mean, logvar),
        }
        total = sum((getattr(weights, name) * term for name, term in terms.items()), jnp.zeros(()))
        return total, {**terms, "latent_deviation": mean.std(), "posterior_deviation": jnp.exp(0.5 * logvar).mean()}

    def score_batch(
        self, params: Params, images: jax.Array, rng: jax.Array
    ) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
        """Scores per picture [B] of uint8 pictures, and the pictures decoded from clean and from disturbed latents."""

        def decode(latents: jax.Array) -> jax.Array:
            return byte_pixels(self.model.apply({"params": params}, latents, method=Autoencoder.decode))  # type: ignore[arg-type]

        moments: Any = self.model.apply({"params": params}, signed_pixels(images), method=Autoencoder.encode)
        mean, logvar = moments
        deviation = mean.std()
        clean, disturbed = decode(mean), decode(mean + DISTURBANCE * deviation * jax.random.normal(rng, mean.shape))
        drawn = decode(posterior_sample(mean, logvar, jax.random.normal(jax.random.fold_in(rng, 1), mean.shape)))
        scores = {
            "psnr": signal_to_noise(images, clean),
            "psnr_disturbed": signal_to_noise(images, disturbed),
            "psnr_drawn": signal_to_noise(images, drawn),
            "latent_deviation": jnp.broadcast_to(deviation, len(images)),
            "posterior_deviation": jnp.exp(0.5 * logvar).mean((1, 2, 3)),
        }
        return scores, (clean, disturbed)

    def evaluate(self, params: Params, step: int) -> Evaluation:
        rows, sheet = [], np.zeros((0, 0, 3), np.uint8)
        for number, batch in enumerate(self.evaluation_batches()):
            images = batch["image"]
            scores, decoded = jax.device_get(self._score(params, images, jax.random.key(number)))
            rows.append(scores)
            if number == 0:
                sheet = comparison_sheet([pictures[:SHOWN] for pictures in (images, *decoded)])
        metrics = {name: float(np.concatenate([row[name] for row in rows]).mean()) for name in rows[0]}
        table = "\n".join(f"{name:>20} {value:.4f}" for name, value in metrics.items())
        return Evaluation(metrics, score=metrics["psnr"], table=table, images={"reconstructions": sheet})


def measure_scale(objective: AutoencoderObjective, params: Params) -> tuple[AutoencoderConfig, dict[str, float]]:
    """Sizes with the factor that brings latents of held-out pictures to unit deviation, and the scores there."""
    metrics = objective.evaluate(params, 0).metrics
    return dataclasses.replace(objective.config, scaling_factor=round(1 / metrics["latent_deviation"], 5)), metrics


def build_autoencoder_objective(config: Any) -> AutoencoderObjective:
    """The objective that configs/autoencoder_tiny.py describes, with its held-out pictures.

    Raises:
      ValueError: sizes that do not fit together.
    """
    model = sizes_from_config(AutoencoderConfig, config.model)
    size, batch = config.data.size, config.train.batch_size
    step = 2 * model.reduction  # latents are halved in the loss
    if size % step:
        raise ValueError(f"data.size is {size}; model.block_channels needs a multiple of {step}.")
    if config.eval.examples < batch:
        raise ValueError(f"eval.examples is {config.eval.examples}; at least one batch ({batch}) is needed.")
    held_out = Pictures(seed=config.seed, split="test", size=size, scenes=config.eval.scenes)

    def evaluation_batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, config.eval.examples - batch + 1, batch):
            indices = list(range(start, start + batch))
            yield stack_examples([held_out[index] for index in indices], indices)

    spec = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)}
    return AutoencoderObjective(model, spec, AutoencoderLoss(**config.loss), evaluation_batches)
