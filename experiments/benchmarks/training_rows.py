"""Rows of training steps: loss, gradients, clipping and AdamW of the tiny models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from experiments.benchmarks.diffusion_rows import DIFFUSERS
from experiments.benchmarks.language_rows import TRANSFORMERS, middle_pixellm, normal
from experiments.benchmarks.row import Row, Side
from pixelstory_jax.models.pixellm import IMAGE_TOKEN, PixelLMConfig
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig
from pixelstory_jax.training.options import TrainOptions

LEARNING_RATE, CLIP_NORM = 1e-3, 1.0
OPTIONS = TrainOptions(learning_rate=LEARNING_RATE, schedule="constant", clip_norm=CLIP_NORM)
SEED = 0
IGNORE = -100
COMPARED = 2  # steps whose loss and gradient norm are compared: the second one has been through the optimizer


def training_rows(quick: bool) -> list[Row]:
    return [pixellm_step(quick), story_step(quick)]


def our_steps(objective: Any, params: Any, batch: dict[str, np.ndarray]) -> Side:
    """The trainer's own step, again and again from the state that the last one left."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.work import stage_of
    from pixelstory_jax.training.optimizer import build_optimizer
    from pixelstory_jax.training.state import TrainState, build_step, split_trained

    trained, _ = split_trained(params, objective.trainable)
    optimizer = build_optimizer(OPTIONS, trained)
    step = build_step(objective, optimizer, OPTIONS, SEED)
    compiled = jax.jit(step, donate_argnums=0)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), None)
    shapes = jax.eval_shape(lambda state: state, state)
    here = {name: jnp.asarray(values) for name, values in batch.items()}
    held = [state]
    del state, params, trained

    def run() -> Any:
        state, scalars = compiled(held.pop(), here)
        held.append(jax.block_until_ready(state))
        return scalars["loss"], scalars["gradient_norm"]

    return Side(run, lambda: [stage_of(step, shapes, here)])


def torch_steps(module: Any, loss: Any) -> Side:
    """The same step of a module whose trained parameters ask for gradients; `loss(step number)` is its loss."""
    import torch

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, fused=True)
    steps = iter(range(1 << 30))

    def run() -> Any:
        optimizer.zero_grad()
        value = loss(next(steps))
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        return value, norm

    return Side(run)


# PixelLM


def pixellm_step(quick: bool) -> Row:
    """The tiny PixelLM as its config trains it: eight pictures of four rows, the tower frozen."""
    config, images, questions, length, slots = PixelLMConfig.tiny(), 8, 4, 100, 8
    if quick:
        config, images, questions, slots = middle_pixellm(quick), 2, 2, 3

    def batch() -> dict[str, np.ndarray]:
        return pixellm_batch(config, images, questions, length, slots)

    def ours() -> Side:
        import jax

        from experiments.benchmarks.our_answer import our_pixellm
        from experiments.benchmarks.random_weights import draw_tensor
        from pixelstory_jax.objectives.pixellm import LossWeights, PixelLMObjective, Trained

        spec = {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in batch().items()}
        trained = Trained(vision=False, language_model=True)
        objective = PixelLMObjective(config, spec, LossWeights(), trained, evaluator=no_evaluation)
        return our_steps(objective, our_pixellm(config, draw_tensor), batch())

    def torch() -> Side:
        from experiments.benchmarks.random_weights import fill_module
        from experiments.benchmarks.torch_pixellm import TorchPixelLM
        from experiments.benchmarks.torch_training import pixellm_loss

        model = fill_module(TorchPixelLM(config), kept=("token_weights", "scale_weights"))
        model.model.vision_tower.requires_grad_(False)
        return torch_steps(model, pixellm_loss(model, batch()))

    return training_row("training step, tiny PixelLM", ours, torch, TRANSFORMERS)


def no_evaluation(*_: Any) -> Any:
    raise AssertionError("Nothing is evaluated here.")


def pixellm_batch(config: PixelLMConfig, images: int, questions: int, length: int, slots: int) -> dict[str, np.ndarray]:
    """Random pictures and words; a third of the slots is empty, and rows are of different lengths."""
    rng, group, side = np.random.default_rng(0), config.group, config.vision.canvas
    tokens = rng.integers(3, config.llama.vocab, (images, questions, length)).astype(np.int32)
    tokens[:, :, 2 : 2 + config.image_tokens] = IMAGE_TOKEN
    valid = np.arange(length) < rng.integers(length - 20, length + 1, (images, questions, 1))
    first_word = 2 + config.image_tokens
    labels = np.where(valid & (np.arange(length) > first_word + 8), tokens, IGNORE)
    question = rng.integers(0, questions, (images, slots)).astype(np.int32)
    start = question * length + rng.integers(first_word + 8, length - 20 - group, (images, slots))
    return {
        "image": rng.integers(0, 256, (images, side, side, 3)).astype(np.uint8),
        "image_size": np.full((images, 2), side, np.int32),
        "tokens": tokens,
        "token_valid": valid,
        "labels": labels.astype(np.int32),
        "target_positions": (start[:, :, None] + np.arange(group)).astype(np.int32),
        "target_masks": (rng.random((images, slots, side, side)) < 0.3).astype(np.uint8),
        "target_valid": np.broadcast_to(np.arange(slots) < -(-2 * slots // 3), (images, slots)).copy(),
        "target_question": question,
    }


def training_row(name: str, ours: Any, torch: Any, libraries: tuple[str, ...]) -> Row:
    return Row(name, ours, torch, target=1.2, tolerance=1e-3, warmups=COMPARED, libraries=libraries, seconds=25)


# StoryDiffusion


def story_step(quick: bool) -> Row:
    """The tiny StoryDiffusion as its config trains it: stories of four panels that share, from latents and captions."""
    config, stories, panels, side = StoryDiffusionConfig.tiny(), 8, 4, 24
    if quick:
        text = dataclasses.replace(config.text, width=16, layers=1, heads=2, mlp_width=32)
        network = UNetConfig.tiny(channels=(8, 16), depths=(0, 1), heads=(1, 2), groups=4, context_width=text.width)
        config, stories, side = dataclasses.replace(config, unet=network, text=text), 2, 8
    text = config.text

    def batch() -> dict[str, np.ndarray]:
        words = np.random.default_rng(1).integers(3, text.eos_id, (stories, panels, text.length))
        return {"latents": normal(stories, panels, side, side, 4), "tokens": words.astype(np.int32)}

    def ours() -> Side:
        import jax

        from experiments.benchmarks.random_weights import our_params
        from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, clip_text_shapes
        from pixelstory_jax.interop.unet_table import unet_table

        objective = story_objective(config, batch())
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        params = {
            "unet": our_params(unet_table(config.unet), shapes["unet"]),
            "text": our_params(CLIP_TEXT, clip_text_shapes(text)),
        }
        return our_steps(objective, params, batch())

    def torch() -> Side:
        from torch import nn

        from experiments.benchmarks.torch_diffusion import unet
        from experiments.benchmarks.torch_training import clip_text, draw_steps, story_loss

        draws = draw_steps(story_objective(config, batch()), batch(), SEED, COMPARED)
        model = nn.ModuleDict({"unet": unet(config.unet), "text": clip_text(text)})
        return torch_steps(model, story_loss(model, draws))

    return training_row(
        "training step, tiny StoryDiffusion", ours, torch, ("experiments.benchmarks.torch_training", *DIFFUSERS)
    )


def story_objective(config: StoryDiffusionConfig, batch: dict[str, np.ndarray]) -> Any:
    """With the losses of `configs/storydiffusion.py`."""
    import jax

    from pixelstory_jax.inference.noise_schedule import NoiseSchedule
    from pixelstory_jax.objectives.storydiffusion import DiffusionLoss, StoryDiffusionObjective

    return StoryDiffusionObjective(
        config,
        NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True),
        DiffusionLoss(min_snr=0.0, share=0.9, rate=0.7, mixed=0.5, time_spread=1.2, time_mean=1.0),
        {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in batch.items()},
        empty={"text": np.full(config.text.length, config.text.eos_id, np.int32)},
        picture_size=batch["latents"].shape[2] * config.autoencoder.reduction,
        train_text=True,
        train_unet="full",
        evaluator=no_evaluation,
    )
