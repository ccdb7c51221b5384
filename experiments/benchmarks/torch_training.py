"""Training losses in PyTorch, equal to those of `pixelstory_jax.objectives`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.benchmarks.torch_pixellm import TorchPixelLM
from pixelstory_jax.objectives.losses import DICE_EPS, DICE_SCALE, IGNORE
from pixelstory_jax.objectives.pixellm import LossWeights

WEIGHTS = LossWeights()


def pixellm_loss(model: TorchPixelLM, batch: Mapping[str, np.ndarray]) -> Callable[[int], Tensor]:
    """The loss of the mode "paper" on a batch of `PixelLMObjective`; empty slots cost nothing here."""
    data = {name: torch.tensor(values) for name, values in batch.items()}
    images, questions, length = data["tokens"].shape
    tokens, valid = data["tokens"].long().flatten(0, 1), data["token_valid"].long().flatten(0, 1)
    targets = data["labels"].long().flatten(0, 1)[:, 1:]

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            states = model.vision(model.normalised(data["image"]))
        image_tokens, necked = model.encode_image(states)
        embeddings = model.embed(tokens, image_tokens.repeat_interleave(questions, 0))
        hidden = model.model(inputs_embeds=embeddings, attention_mask=valid, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1]
        language = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        hidden = hidden.unflatten(0, (images, questions)).flatten(1, 2)
        terms = [mask_terms(model, necked[image], hidden[image], data, image) for image in range(images)]
        cross_entropy, dice = torch.cat(terms, 1).mean(1)
        return WEIGHTS.language * language + WEIGHTS.bce * cross_entropy + WEIGHTS.dice * dice

    return loss


def mask_terms(model: TorchPixelLM, necked: Tensor, hidden: Tensor, data: Mapping[str, Tensor], image: int) -> Tensor:
    """[2, K] cross-entropy, weighted where masks of a question overlap, and dice of one image's targets."""
    real = data["target_valid"][image]
    truth, question = data["target_masks"][image, real].float(), data["target_question"][image, real]
    logits = model.masks(necked, hidden[data["target_positions"][image, real].long() - 1])
    logits = functional.interpolate(logits[None], truth.shape[1:], mode="bilinear")[0]
    same = (question[:, None] == question).float()
    overlapping = torch.einsum("st,thw->shw", same, (logits > 0).float()) > 1.5
    weights = torch.where(overlapping, WEIGHTS.refinement, 1.0)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, weights, reduction="none").mean((1, 2))
    inside = logits.sigmoid() / DICE_SCALE
    both, areas = 2 * (inside * truth).sum((1, 2)), inside.sum((1, 2)) + (truth / DICE_SCALE).sum((1, 2))
    return torch.stack([entropy, 1 - (both + DICE_EPS) / (areas + DICE_EPS)])
