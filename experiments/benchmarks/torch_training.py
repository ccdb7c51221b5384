"""Training losses in PyTorch, equal to those of `pixelstory_jax.objectives`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from experiments.benchmarks.random_weights import fill_module
from experiments.benchmarks.torch_pixellm import TorchPixelLM
from pixelstory_jax.inference.noise_schedule import add_noise, training_target
from pixelstory_jax.interop.clip_text_table import PREFIX, clip_text_settings
from pixelstory_jax.models.clip_text import ClipTextConfig
from pixelstory_jax.objectives.losses import DICE_EPS, DICE_SCALE, IGNORE
from pixelstory_jax.objectives.pixellm import LossWeights
from pixelstory_jax.objectives.storydiffusion import draw_times, random_sharing

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


@dataclass(frozen=True)
class Draws:
    """What is random about a step of `StoryDiffusionObjective`, drawn by its own functions.

    noisy, target [B, A, h, w, C]; times [B, A]; tokens [B, A, T] after captions were dropped; mask bool [B, A N, A N],
    which token of a story sees which.
    """

    noisy: Tensor
    target: Tensor
    times: Tensor
    tokens: Tensor
    mask: Tensor


def draw_steps(objective: Any, batch: Mapping[str, np.ndarray], seed: int, steps: int) -> list[Draws]:
    """Those of the first steps of a run with this seed."""
    rngs = [jax.random.fold_in(jax.random.key(seed), step) for step in range(steps)]
    return [draw_step(objective, batch, rng) for rng in rngs]


def draw_step(objective: Any, batch: Mapping[str, np.ndarray], rng: jax.Array) -> Draws:
    """Follows `StoryDiffusionObjective.loss`."""
    _, time_rng, noise_rng, drop_rng, share_rng = jax.random.split(rng, 5)
    options, schedule, table, clean = objective.options, objective.schedule, objective.table, batch["latents"]
    stories, panels = clean.shape[:2]
    dropped = np.asarray(jax.random.bernoulli(drop_rng, options.drop_caption, (stories,)))
    times = draw_times(time_rng, stories, panels, schedule.train_steps, options)
    noise = jax.random.normal(noise_rng, clean.shape)
    grids = objective.config.unet.sharing_grids(*objective.latent_size)
    sharing = random_sharing(share_rng, stories, panels, grids, options.share, options.rate)
    (tokens,) = grids
    shown = np.zeros((panels, tokens), bool)
    np.put_along_axis(shown, np.asarray(sharing.samples[tokens].index), True, axis=1)
    sees = np.asarray(sharing.sees)[:, :, :, None] & shown | np.eye(panels, dtype=bool)[None, :, :, None]
    mask = np.repeat(sees.reshape(stories, panels, panels * tokens), tokens, axis=1)
    fields = (
        add_noise(table, jnp.asarray(clean), noise, times),
        training_target(schedule.prediction, table, jnp.asarray(clean), noise, times),
        times,
        np.where(dropped[:, None, None], objective.empty["text"], batch["tokens"]).astype(np.int64),
        mask,
    )
    return Draws(*(torch.tensor(np.asarray(field)) for field in fields))


def clip_text(config: ClipTextConfig) -> Any:
    """The text encoder of these sizes, filled."""
    encoder = CLIPTextModel(CLIPTextConfig.from_dict(clip_text_settings(config)))
    return fill_module(getattr(encoder, "text_model", encoder), prefix=PREFIX)


class SharedAttention:
    """Self-attention over all panels of a story at once under `mask`, as a processor of diffusers."""

    mask: Tensor

    def __call__(self, layer: Any, hidden_states: Tensor, **_: Any) -> Tensor:
        stories = len(self.mask)
        together = hidden_states.unflatten(0, (stories, -1)).flatten(1, 2)  # [B, A N, C]
        query, key, value = (
            linear(together).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
            for linear in (layer.to_q, layer.to_k, layer.to_v)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask[:, None])
        return layer.to_out[0](attended.transpose(1, 2).flatten(2)).reshape(hidden_states.shape)


def story_loss(model: Any, draws: Sequence[Draws]) -> Callable[[int], Tensor]:
    """The loss of the prediction by a U-Net whose up blocks share; step after step takes the next of the draws."""
    shared = SharedAttention()
    for name, module in model["unet"].named_modules():
        if name.startswith("up_blocks") and name.endswith("attn1"):
            module.set_processor(shared)

    def loss(step: int) -> Tensor:
        drawn = draws[step % len(draws)]
        shared.mask = drawn.mask
        context = model["text"](drawn.tokens.flatten(0, 1)).last_hidden_state
        noisy = drawn.noisy.flatten(0, 1).permute(0, 3, 1, 2)
        predicted = model["unet"](noisy, drawn.times.flatten(), context).sample.permute(0, 2, 3, 1)
        return functional.mse_loss(predicted, drawn.target.flatten(0, 1))

    return loss
