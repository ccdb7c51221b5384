"""Training of the panel classifier on real panels, changed so that it judges generated ones fairly.

Generated panels come out of the tiny autoencoder's decoder from latents that are not quite right. So a share of the
training pictures goes through the autoencoder, with noise in the latents, and all are blurred, made noisy and shifted
in colour a little. Letters: B panels, S side in pixels, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from pixelstory_jax.data.builtin.characters import builtin_cast
from pixelstory_jax.data.builtin.start import StartError
from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_AUTOENCODER
from pixelstory_jax.data.labelled_panels import HEADS, class_names, held_out_panels
from pixelstory_jax.evaluation.panel_classifier import (
    PanelClassifier,
    accuracy_table,
    confusion_table,
    head_accuracies,
)
from pixelstory_jax.interop.autoencoder_table import read_autoencoder_file
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.models.autoencoder import Autoencoder, AutoencoderConfig, byte_pixels, signed_pixels
from pixelstory_jax.models.panel_classifier import PanelClassifier as PanelNetwork
from pixelstory_jax.models.panel_classifier import PanelClassifierConfig
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.objectives.objective import Batch, Evaluation, Params

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)  # small: whole on every device
NOISE = 0.25  # deviation of the noise in latents, as a share of theirs, in evaluation


@dataclass(frozen=True)
class Augmentation:
    """How training panels are changed; pixels are in [-1, 1]. Each panel draws its own strengths, evenly from 0 up.

    Attributes:
      decoded: share of the panels of a batch that go through the autoencoder.
      latent_noise: largest deviation of the noise in their latents, as a share of that of the latents.
      blur: largest share of a 3 x 3 smoothed copy.
      noise: largest deviation of noise in pixels.
      colour: largest change of brightness and of each channel's scale.
    """

    decoded: float = 0.5
    latent_noise: float = 0.5
    blur: float = 1.0
    noise: float = 0.1
    colour: float = 0.15

    def __post_init__(self) -> None:
        for name in ("decoded", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; a share lies between 0 and 1.")
        for name in ("latent_noise", "noise", "colour"):
            if getattr(self, name) < 0:
                raise ValueError(f"augmentation.{name} is {getattr(self, name)}; it must not be negative.")


def smoothed(images: jax.Array) -> jax.Array:
    """[B, S, S, C] averaged with weights 1/4, 1/2, 1/4 along both axes; the edge repeats."""
    for axis in (1, 2):
        size = images.shape[axis]
        before, after = np.maximum(np.arange(size) - 1, 0), np.minimum(np.arange(size) + 1, size - 1)
        neighbours = jnp.take(images, before, axis=axis) + jnp.take(images, after, axis=axis)
        images = images / 2 + neighbours / 4
    return images


def disturbed(images: jax.Array, options: Augmentation, rng: jax.Array) -> jax.Array:
    """Panels [B, S, S, 3] mirrored or not, blurred, with noise and other colours; not clipped."""
    keys = iter(jax.random.split(rng, 6))
    row = (len(images), 1, 1, 1)
    images = jnp.where(jax.random.bernoulli(next(keys), 0.5, row), images[:, :, ::-1], images)
    blur = jax.random.uniform(next(keys), row, maxval=options.blur)
    images = images + blur * (smoothed(images) - images)
    scale = jax.random.uniform(next(keys), (*row[:3], 3), minval=-options.colour, maxval=options.colour)
    shift = jax.random.uniform(next(keys), row, minval=-options.colour, maxval=options.colour)
    images = images * (1 + scale) + shift
    deviation = jax.random.uniform(next(keys), row, maxval=options.noise)
    return images + deviation * jax.random.normal(next(keys), images.shape)


class PanelClassifierObjective:
    """Params: `classifier`, which is trained, and, unless the config `autoencoder` is None, the frozen `autoencoder`.

    The score is the accuracy on held-out panels, averaged over heads and over the ways in which the panels are shown.
    """

    name = "panel_classifier"
    sharding_rules = SHARDING_RULES
    next_command = "python -m experiments.ship_panel_classifier --workdir={workdir} --out=panel_classifier.safetensors"

    def __init__(
        self,
        config: PanelClassifierConfig,
        autoencoder: AutoencoderConfig | None,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        augmentation: Augmentation,
        held_out: Callable[[], Mapping[str, np.ndarray]],
        classes: Mapping[str, tuple[str, ...]],
        start: Callable[[], Mapping[str, Any]] = dict,
    ):
        """Args:

        held_out: gives the panels to evaluate on, a batch of any length. classes: words of each head.
        start: gives starting weights by path, which hold the autoencoder if there is one.
        """
        self.config, self.batch_spec, self.augmentation = config, dict(batch_spec), augmentation
        self.held_out, self.classes, self.start = held_out, dict(classes), start
        self.model = PanelNetwork(config)
        self.autoencoder = None if autoencoder is None else Autoencoder(autoencoder)
        self._decoded_bytes = jax.jit(
            lambda params, images, noise, rng: byte_pixels(self.decoded(params, signed_pixels(images), noise, rng))
        )

    @property
    def contents(self) -> dict[str, int]:
        return {"images": 1}

    def describe(self) -> str:
        classes = ", ".join(f"{len(words)} {head}s" for head, words in self.classes.items())
        seen = "as they are" if self.autoencoder is None else "as they are and decoded by the tiny autoencoder"
        return f"A classifier of panels ({classes}) from random initialisation, on panels {seen}."

    def starting_weights(self) -> Mapping[str, Any]:
        return self.start()

    def trainable(self, path: str) -> bool:
        return path.startswith("classifier/")

    def init(self, rng: jax.Array) -> Params:
        images = jnp.zeros((1, *self.batch_spec["image"].shape[1:]))
        params = {"classifier": self.model.init(rng, images)["params"]}
        if self.autoencoder is not None:
            config, (_, height, width, _) = self.autoencoder.config, images.shape
            latents = jnp.zeros((1, height // config.reduction, width // config.reduction, config.latent_channels))
            params["autoencoder"] = self.autoencoder.init(rng, images, latents)["params"]
        return params

    def decoded(self, params: Params, images: jax.Array, noise: jax.Array, rng: jax.Array) -> jax.Array:
        """Panels [B, S, S, 3] after encoding and decoding, clipped to [-1, 1].

        Args:
          noise: [B, 1, 1, 1] deviation of the noise in the latents, as a share of that of the latents.
        """
        autoencoder, variables = self.autoencoder, {"params": params["autoencoder"]}
        assert autoencoder is not None
        moments: Any = autoencoder.apply(variables, images, method=Autoencoder.encode)
        latents, _ = moments
        latents = latents + noise * latents.std() * jax.random.normal(rng, latents.shape)
        pixels: Any = autoencoder.apply(variables, latents, method=Autoencoder.decode)
        return jnp.clip(pixels, -1.0, 1.0)

    def augmented(self, params: Params, images: jax.Array, rng: jax.Array) -> jax.Array:
        """Training panels [B, S, S, 3]; the order of a batch is random, so its first rows are the decoded ones."""
        strength_rng, latent_rng, picture_rng = jax.random.split(rng, 3)
        count = 0 if self.autoencoder is None else round(self.augmentation.decoded * len(images))
        if count:
            noise = jax.random.uniform(strength_rng, (count, 1, 1, 1), maxval=self.augmentation.latent_noise)
            images = jnp.concatenate([self.decoded(params, images[:count], noise, latent_rng), images[count:]])
        return disturbed(images, self.augmentation, picture_rng)

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = self.augmented(params, signed_pixels(batch["image"]), rng)
        reading: Any = self.model.apply({"params": params["classifier"]}, images)
        losses, terms = {}, {}
        for head in HEADS:
            logits = getattr(reading, head)
            losses[head] = optax.softmax_cross_entropy_with_integer_labels(logits, batch[head]).mean()
            terms[f"{head}_accuracy"] = (logits.argmax(-1) == batch[head]).mean(dtype=jnp.float32)
        return sum(losses.values(), jnp.zeros(())), {**losses, **terms}

    def evaluate(self, params: Params, step: int) -> Evaluation:
        labels = self.held_out()
        classifier = PanelClassifier(self.config, params["classifier"], self.classes)
        sets = {"real": labels["image"]}
        if self.autoencoder is not None:
            sets["decoded"] = self._all_decoded(params, labels["image"], 0.0)
            sets["decoded, noisy"] = self._all_decoded(params, labels["image"], NOISE)
        read = {name: classifier(images) for name, images in sets.items()}
        rows = {name: head_accuracies(values, labels) for name, values in read.items()}
        table = accuracy_table(rows)
        for head in HEADS[:2]:
            table += f"\n\n{confusion_table(read['real'][head], labels[head], self.classes[head])}"
        metrics = {
            f"{head}_{name.replace(', ', '_')}": value for name, row in rows.items() for head, value in row.items()
        }
        return Evaluation(metrics, score=float(np.mean(list(metrics.values()))), table=table)

    def _all_decoded(self, params: Params, images: np.ndarray, noise: float) -> np.ndarray:
        """uint8 panels [N, S, S, 3] after encoding and decoding, a batch at a time."""
        size, parts = self.batch_spec["image"].shape[0], []
        for start in range(0, len(images), size):
            rows = np.arange(start, start + size) % len(images)  # the last batch is filled up with the first panels
            level, rng = jnp.full((size, 1, 1, 1), noise), jax.random.key(start)
            parts.append(jax.device_get(self._decoded_bytes(params, images[rows], level, rng)))
        return np.concatenate(parts)[: len(images)]


def build_panel_classifier_objective(config: Any) -> PanelClassifierObjective:
    """The objective that configs/panel_classifier.py describes, with its held-out panels.

    Raises:
      ValueError: sizes that do not fit together, or an autoencoder that cannot be read.
    """
    classes = class_names(builtin_cast())
    counts = {f"{head}s": len(words) for head, words in classes.items()}
    sizes = sizes_from_config(PanelClassifierConfig, {**config.model, **counts})
    autoencoder, frozen = _frozen_autoencoder(config.autoencoder)
    size, batch = config.data.size, config.train.batch_size
    side = max(sizes.reduction, autoencoder.reduction if autoencoder else 1)
    if size % side:
        raise ValueError(f"data.size is {size}; the networks need a multiple of {side}.")
    if config.eval.examples < 1:
        raise ValueError(f"eval.examples is {config.eval.examples}; at least 1 is needed.")
    spec = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)}
    spec |= {head: jax.ShapeDtypeStruct((batch,), np.int32) for head in HEADS}
    return PanelClassifierObjective(
        sizes,
        autoencoder,
        spec,
        Augmentation(**config.augmentation),
        held_out=functools.cache(lambda: held_out_panels(config.eval.examples, config.seed, size)),
        classes=classes,
        start=lambda: frozen,
    )


def _frozen_autoencoder(source: str) -> tuple[AutoencoderConfig | None, dict[str, np.ndarray]]:
    """(sizes, weights by path) that `config.autoencoder` names: "builtin", "" for none, or a file of that kind.

    Raises:
      StartError: the file is missing or damaged.
    """
    if not source:
        return None, {}
    try:
        sizes, params = read_autoencoder_file(TINY_AUTOENCODER if source == "builtin" else source)
    except WeightsError as error:
        raise StartError(f"The autoencoder that config.autoencoder names cannot be read: {error}") from error
    return sizes, {f"autoencoder/{path}": array for path, array in flatten(params).items()}
