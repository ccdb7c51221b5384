"""The shipped panel classifier, ready to use on panels as they are: uint8 pictures in, names and features out."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.data.builtin.things import FOLDER
from pixelstory_jax.data.labelled_panels import HEADS
from pixelstory_jax.evaluation.panel_metrics import accuracy, confusion_counts
from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.models.autoencoder import signed_pixels
from pixelstory_jax.models.panel_classifier import PanelClassifier as PanelNetwork
from pixelstory_jax.models.panel_classifier import PanelClassifierConfig
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.sizes import sizes_from_config

PANEL_CLASSIFIER = FOLDER / "assets" / "panel_classifier.safetensors"
_BATCH = 64


class PanelClassifier:
    """Reads panels.

    Attributes:
      config: sizes of the network.
      params: its parameters.
      classes: for "character", "pose" and "place" the words that the numbers stand for.
    """

    def __init__(self, config: PanelClassifierConfig, params: Any, classes: Mapping[str, tuple[str, ...]]) -> None:
        numbers = dict(zip(HEADS, (config.characters, config.poses, config.places), strict=True))
        if {head: len(words) for head, words in classes.items()} != numbers:
            raise ValueError(f"The classifier has the classes {numbers}; expected as many words for each.")
        self.config, self.params, self.classes = config, params, dict(classes)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What panels show.

        Args:
          images: uint8 [N, S, S, 3], S a multiple of `config.reduction`; trained on S = 96.

        Returns:
          character, pose, place: int32 [N], the likeliest class.
          character_probability, pose_probability, place_probability: float32 [N, classes].
          features: float32 [N, F], for a Fréchet distance.

        Raises:
          ValueError: not uint8, or of another shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"Panels are {images.dtype}{list(images.shape)}; expected uint8 [N, S, S, 3].")
        parts = []
        for start in range(0, max(len(images), 1), _BATCH):  # one batch even of nothing, so that all arrays are there
            batch = images[start : start + _BATCH]
            padding = np.zeros((_BATCH - len(batch), *images.shape[1:]), np.uint8)
            part = jax.device_get(_probabilities(self.config, self.params, np.concatenate([batch, padding])))
            parts.append({name: array[: len(batch)] for name, array in part.items()})
        read = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        numbers = {head: read[f"{head}_probability"].argmax(-1).astype(np.int32) for head in HEADS}
        return {**numbers, **read}


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(config: PanelClassifierConfig, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    reading: Any = PanelNetwork(config).apply({"params": params}, signed_pixels(images))
    probabilities = {f"{head}_probability": jax.nn.softmax(getattr(reading, head)) for head in HEADS}
    return {**probabilities, "features": reading.features.astype(jnp.float32)}


def read_panel_classifier(path: str | Path = PANEL_CLASSIFIER) -> PanelClassifier:
    """The shipped classifier, or one that `write_panel_classifier` wrote.

    Raises:
      WeightsError: the file is missing, damaged, or does not hold a panel classifier.
    """
    arrays, metadata = read_safetensors(path)
    try:
        config = sizes_from_config(PanelClassifierConfig, json.loads(metadata["sizes"]))
        classes = {head: tuple(words) for head, words in json.loads(metadata["classes"]).items()}
        params = unflatten({name: array.astype(np.float32) for name, array in arrays.items()})
        side = config.reduction
        shapes = jax.eval_shape(PanelNetwork(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
        if {k: v.shape for k, v in flatten(shapes).items()} != {k: v.shape for k, v in arrays.items()}:
            raise ValueError("its arrays are not those of its sizes")
        return PanelClassifier(config, params, classes)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: not a panel classifier ({error}).") from error


def write_panel_classifier(path: str | Path, classifier: PanelClassifier) -> None:
    """Writes parameters as float16, with sizes and words in the file's metadata."""
    halves = {name: np.asarray(value, np.float16) for name, value in flatten(classifier.params).items()}
    sizes = {name: getattr(classifier.config, name) for name in PanelClassifierConfig.__dataclass_fields__}
    write_safetensors(path, halves, {"sizes": json.dumps(sizes), "classes": json.dumps(classifier.classes)})


def head_accuracies(read: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Share of panels of which each head is right."""
    return {head: accuracy(read[head], labels[head]) for head in HEADS}


def accuracy_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracies of the heads (columns) on several sets of panels (rows by name)."""
    lines = ["".join(["panels".ljust(24), *(head.rjust(12) for head in HEADS)])]
    for name, values in rows.items():
        lines.append("".join([name.ljust(24), *(f"{values[head]:12.4f}" for head in HEADS)]))
    return "\n".join(lines)


def confusion_table(predicted: np.ndarray, true: np.ndarray, words: tuple[str, ...]) -> str:
    """How often each class (rows) was read as each (columns)."""
    width = max(map(len, words)) + 2
    lines = ["".join([" " * width, *(word.rjust(width) for word in words)])]
    for word, counts in zip(words, confusion_counts(predicted, true, len(words)), strict=True):
        lines.append("".join([word.ljust(width), *(f"{count:{width}d}" for count in counts)]))
    return "\n".join(lines)
