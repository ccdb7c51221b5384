"""PixelLM as a training task: next-token loss on the answers, mask losses on their codebook tokens.

Two forms, by `PixelLMConfig.mode`. "paper" trains everything but the vision tower and the base language model (which
LoRA adapts) and weights pixels that several predictions of one question claim by `refinement` (target refinement loss).
"faithful" trains what the released script trains (the neck and the prompt encoder stay as they were drawn).
Sources: arXiv 2312.02228, section 3; the released train_ds.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.resize import resize_bilinear
from pixelstory_jax.objectives.losses import mask_losses, next_token_loss, token_accuracy
from pixelstory_jax.objectives.objective import Batch, Evaluation, Params

# Parameter path -> partition over the mesh axes; layers are stacked on the first axis of scanned kernels. Wide input or
# output sides go over "tensor", the other side over "fsdp"; small parameters stay whole.
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"llama/embedding", PartitionSpec("tensor", "fsdp")),
    (r"llama/head", PartitionSpec("fsdp", "tensor")),
    (r"layers/.*(out|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"layers/.*/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/.*/lora_a", PartitionSpec(None, "fsdp", None)),
    (r"layers/.*/lora_b", PartitionSpec(None, None, "tensor")),
    (r"mm_projector/first/kernel", PartitionSpec("fsdp", "tensor")),
    (r"mm_projector/second/kernel", PartitionSpec("tensor", "fsdp")),
    (r"text_projector/first/kernel", PartitionSpec("fsdp", "tensor")),
)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; `refinement` is the factor on pixels that two or more predicted masks claim (1 = off)."""

    language: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    refinement: float = 2.0


@dataclass(frozen=True)
class Trained:
    """Which of the pretrained parts are optimised in full. LoRA leaves, embeddings and the output head always are."""

    vision: bool = False
    language_model: bool = False


class PixelLMObjective:
    """See the module; `evaluator(params, step)` scores generated answers, `start()` reads the starting weights."""

    name = "pixellm"
    sharding_rules = SHARDING_RULES
    next_command = (
        'python -m experiments.segment --checkpoint={workdir} --image=photo.jpg --question="What can you eat here?"'
    )

    def __init__(
        self,
        config: PixelLMConfig,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        weights: LossWeights,
        trained: Trained,
        evaluator: Callable[[Params, int], Evaluation],
        start: Callable[[], Mapping[str, Any]] = dict,
        start_name: str = "random initialisation",
    ):
        self.config, self.batch_spec, self.weights, self.trained = config, dict(batch_spec), weights, trained
        self.evaluator, self.start, self.start_name = evaluator, start, start_name
        self.model = PixelLM(config)

    @property
    def contents(self) -> dict[str, int]:
        """Tokens are the places of the language model: image tokens, text and padding of all rows."""
        return {"images": 1, "tokens": int(np.prod(self.batch_spec["tokens"].shape[1:]))}

    def describe(self) -> str:
        frozen = [
            part
            for part, on in (("vision tower", self.trained.vision), ("language model", self.trained.language_model))
            if not on
        ]
        rank = self.config.llama.lora.rank
        lora = f", LoRA of rank {rank}" if rank else ""
        return (
            f"PixelLM, mode {self.config.mode}, starting from {self.start_name}. "
            f"Frozen: {' and '.join(frozen) or 'nothing'}{lora}."
        )

    def starting_weights(self) -> Mapping[str, Any]:
        """Arrays by parameter path that replace initialised ones.

        Where the weights hold only the language path's projector, the mask path's starts as a copy of it: its outputs
        are already close to the names of what they show.
        """
        start = self.start()
        mask_path = {f"out_{path}": array for path, array in start.items() if path.startswith("mm_projector/")}
        return {**mask_path, **start}

    def trainable(self, path: str) -> bool:
        if path.startswith(self.config.frozen):
            return False
        if path.startswith("vision/"):
            return self.trained.vision
        if path.startswith("llama/"):
            open_parts = ("lora_", "llama/embedding", "llama/head")
            return self.trained.language_model or any(part in path for part in open_parts)
        return True

    def init(self, rng: jax.Array) -> Params:
        batch = {key: jnp.zeros(spec.shape, spec.dtype) for key, spec in self.batch_spec.items()}
        return self.model.init(rng, batch)["params"]

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        output: Any = self.model.apply({"params": params}, batch, rng)
        side = batch["target_masks"].shape[-1]
        masks = mask_losses(
            resize_bilinear(output.mask_logits, side, side),
            batch["target_masks"],
            batch["target_valid"],
            batch["target_question"],
            batch["image_size"],
            alpha=self.weights.refinement if self.config.mode == "paper" else 1.0,
        )
        language = next_token_loss(output.logits, batch["labels"])
        weights = self.weights
        # The refinement loss takes the place of the plain cross-entropy; their difference is shown.
        total = weights.language * language + weights.bce * masks["refinement"] + weights.dice * masks["dice"]
        return total, {
            "language": language,
            "bce": masks["bce"],
            "dice": masks["dice"],
            "refinement": masks["refinement"] - masks["bce"],
            "token_accuracy": token_accuracy(output.logits, batch["labels"]),
        }

    def evaluate(self, params: Params, step: int) -> Evaluation:
        return self.evaluator(params, step)
