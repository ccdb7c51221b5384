"""Pretraining of the tiny vision tower and language model that the tiny PixelLM starts from.

The real PixelLM starts from CLIP and LLaVA. No such model is small enough for a laptop, so the project trains its
own: the tower learns what each patch shows (name, covered cells, box), the projector and the language model learn to
talk about pictures in words (captions, boxes in words, questions and answers). No codebook token and no mask decoder
is involved.

Letters: B images, P patches, M + 1 objects with the background first, K names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from pixelstory_jax.models.clip_vision import patch_validity
from pixelstory_jax.models.dense_heads import DenseHeads
from pixelstory_jax.models.pixellm import ImageFeatures, PixelLM, PixelLMConfig, image_token_validity, normalise_pixels
from pixelstory_jax.objectives.losses import next_token_loss, token_accuracy
from pixelstory_jax.objectives.objective import Batch, Evaluation, Params
from pixelstory_jax.objectives.pixellm import SHARDING_RULES

PRETRAINED_PARTS = ("vision/", "mm_projector/", "llama/")
HEADS = ("heads_high", "heads_low")
CELLS = 4
SHARPNESS = 12.0  # scale of cosines, like CLIP's temperature


def patch_targets(objects: jax.Array, patch: int, count: int) -> tuple[jax.Array, jax.Array]:
    """What each patch shows, from the map of objects [B, C, C] (0 background, k object k).

    Returns:
      owner [B, P] int32, the object that covers most of the patch, 0 where all cover less than a quarter of it;
      cells [B, P, CELLS ** 2] float32, the share of each cell that objects cover.
    """
    blocks = rearrange(objects, "b (r p) (c q) -> b (r c) p q", p=patch, q=patch)
    share = jnp.stack([(blocks == k).mean(axis=(2, 3)) for k in range(1, count)], axis=-1)  # [B, P, M]
    owner = jnp.where(share.max(-1) >= 0.25, share.argmax(-1) + 1, 0)
    covered = (blocks > 0).astype(jnp.float32)
    cells = rearrange(covered, "b n (i p) (j q) -> b n (i j) (p q)", i=CELLS, j=CELLS).mean(-1)
    return owner, cells


def unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis at length 1."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


class PretrainingObjective:
    """Joint training of tower, projector and language model on annotated scenes.

    Params: the parts of `PixelLM` named in PRETRAINED_PARTS, and `heads_high`, `heads_low` that are thrown away later.
    """

    name = "pretraining"
    sharding_rules = SHARDING_RULES
    next_command = "python -m experiments.ship_pretrained --workdir={workdir} --out=tiny_start.safetensors"

    def __init__(
        self,
        config: PixelLMConfig,
        classes: int,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        evaluation_batches: Callable[[], Iterable[Batch]],
        dense_weight: float,
        alignment_weight: float,
        name_tokens: np.ndarray,
        train_tower: bool = True,
        start: Callable[[], Mapping[str, Any]] = dict,
        start_name: str = "random initialisation",
    ):
        self.config = config
        self.classes = classes
        self.model = PixelLM(config)
        self.heads = DenseHeads(classes, CELLS)
        self.batch_spec = dict(batch_spec)
        self.evaluation_batches = evaluation_batches
        self.dense_weight, self.alignment_weight = dense_weight, alignment_weight
        self.name_tokens = name_tokens
        self.train_tower, self.start, self.start_name = train_tower, start, start_name
        self._metrics = jax.jit(lambda params, batch: self.loss(params, batch, jax.random.key(0))[1])

    @property
    def contents(self) -> dict[str, int]:
        """Tokens are the places of the language model: image tokens, text and padding of all rows."""
        return {"images": 1, "tokens": int(np.prod(self.batch_spec["tokens"].shape[1:]))}

    def describe(self) -> str:
        names = self.classes - 1
        what = "a tiny vision tower and language model" if self.train_tower else "a tiny language model, tower frozen,"
        return f"Pretraining {what} from {self.start_name} on {names} names."

    def starting_weights(self) -> Mapping[str, Any]:
        """Arrays by parameter path that replace initialised ones."""
        return self.start()

    def trainable(self, path: str) -> bool:
        return self.train_tower or path.startswith(("mm_projector/", "llama/"))

    def forward(self, model: PixelLM, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of a PixelLM whose mask parts are left out: logits [B, Q, T, V], patch states [L, B, P, D], image tokens."""
        vision = self.config.vision
        image_size = batch["image_size"]
        states = model.vision_features(normalise_pixels(batch["image"], image_size), image_size)
        valid = image_token_validity(image_size, vision.patch_size, vision.grid, self.config.image_tokens_side)
        features = ImageFeatures(model.language_tokens(states[0]), valid, jnp.zeros(()))
        logits = model.logits(model.states(batch["tokens"], batch["token_valid"], features))
        return logits, states, features.llm_tokens

    def init(self, rng: jax.Array) -> Params:
        batch = {k: jnp.zeros(v.shape, v.dtype) for k, v in self.batch_spec.items()}
        model_rng, *head_rngs = jax.random.split(rng, 3)
        params = self.model.init(model_rng, batch, method=self.forward)["params"]
        features = jnp.zeros((1, 1, self.config.vision.width))
        heads = {name: self.heads.init(r, features)["params"] for name, r in zip(HEADS, head_rngs, strict=True)}
        return {**params, **heads}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model_params = {part: tree for part, tree in params.items() if part not in HEADS}
        outputs: Any = self.model.apply({"params": model_params}, batch, method=self.forward)
        logits, states, image_tokens = outputs
        language = next_token_loss(logits, batch["labels"])
        alignment = self.alignment(image_tokens, params["llama"]["embedding"], batch)
        total = language + self.alignment_weight * alignment
        terms = {"language": language, "language_accuracy": token_accuracy(logits, batch["labels"])}
        terms["alignment"] = alignment
        for level, head in enumerate(HEADS):
            read_outs: Any = self.heads.apply({"params": params[head]}, states[level])
            names, cells, boxes = read_outs
            dense = self.dense_terms(names, cells, boxes, batch)
            weight = self.dense_weight * (1.0 if level == 0 else 0.3)
            total += weight * (dense["names"] + dense["cells"] + 2.0 * dense["boxes"])
            if level == 0:
                terms |= dense
        return total, terms

    def alignment(self, image_tokens: jax.Array, embedding: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy between what an image token shows and the names whose word embeddings it is closest to.

        As CLIP's loss ties pictures to captions: afterwards attention finds a named thing by nearness to its name.

        Args:
          image_tokens: [B, I, D] projected. embedding: [V, D] of the language model.
        """
        vision, side = self.config.vision, self.config.image_tokens_side
        owner, _ = patch_targets(batch["objects"], vision.patch_size, batch["object_classes"].shape[1])
        names = jnp.take_along_axis(batch["object_classes"], owner, axis=1)  # [B, P]
        shown = jax.nn.one_hot(names, self.classes)[..., 1:]  # [B, P, K]
        shown = rearrange(
            shown, "b (r i c j) k -> b (r c) (i j) k", r=side, c=side, i=vision.grid // side, j=vision.grid // side
        ).mean(2)  # share of each name in an image token
        known = (self.name_tokens >= 0)[..., None]
        words = (embedding[jnp.maximum(self.name_tokens, 0)] * known).sum(1) / known.sum(1)  # [K, D]
        nearness = jnp.einsum("bid,kd->bik", unit(image_tokens), unit(words)) * SHARPNESS
        losses = -(shown * jax.nn.log_softmax(nearness)).sum(-1)
        return losses.sum() / jnp.maximum(shown.sum(), 1)

    def dense_terms(
        self, name_logits: jax.Array, cell_logits: jax.Array, boxes: jax.Array, batch: Batch
    ) -> dict[str, jax.Array]:
        """Losses of what the patches show; arguments as `DenseHeads` returns them."""
        vision = self.config.vision
        owner, cells = patch_targets(batch["objects"], vision.patch_size, batch["object_classes"].shape[1])
        names = jnp.take_along_axis(batch["object_classes"], owner, axis=1)  # [B, P]
        true_boxes = jnp.take_along_axis(batch["object_boxes"], owner[..., None], axis=1)  # [B, P, 4]
        valid = patch_validity(batch["image_size"], vision.patch_size, vision.grid).astype(jnp.float32)
        shown = valid * (owner > 0)
        count = jnp.maximum(shown.sum(), 1)
        weight = valid * jnp.where(owner > 0, 1.0, 1 / 3)  # background patches are many and easy
        naming = optax.softmax_cross_entropy_with_integer_labels(name_logits, names)
        covering = optax.sigmoid_binary_cross_entropy(cell_logits, cells).mean(-1)
        return {
            "names": (naming * weight).sum() / weight.sum(),
            "cells": (covering * valid).sum() / valid.sum(),
            "boxes": (jnp.abs(boxes - true_boxes).mean(-1) * shown).sum() / count,
            "name_accuracy": ((name_logits.argmax(-1) == names) * shown).sum() / count,
        }

    def evaluate(self, params: Params, step: int) -> Evaluation:
        rows = [jax.device_get(self._metrics(params, batch)) for batch in self.evaluation_batches()]
        metrics = {key: float(sum(row[key] for row in rows) / len(rows)) for key in rows[0]}
        table = "\n".join(f"{key:>20} {value:.4f}" for key, value in metrics.items())
        return Evaluation(metrics, score=metrics["name_accuracy"] + metrics["language_accuracy"], table=table)
