"""losses.npz: mask losses and their gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.objectives.losses import dice_loss, overlap_loss, sigmoid_ce_loss
from tests.golden_cases.fixture import Fixture


@jax.jit
def _case(logits: jax.Array, targets: jax.Array, num_masks: jax.Array, question: jax.Array) -> dict[str, jax.Array]:
    results = {}
    for name, function in (
        ("dice", lambda x: dice_loss(x, targets, num_masks)),
        ("sigmoid_ce", lambda x: sigmoid_ce_loss(x, targets, num_masks)),
        ("overlap", lambda x: overlap_loss(x, targets, num_masks, question)),
    ):
        results[name], results[f"grad_{name}"] = jax.value_and_grad(function)(logits)
    return results


def batch_mask_losses(
    logits: list[jax.Array], targets: list[np.ndarray], bce_weight: float, dice_weight: float
) -> dict[str, jax.Array]:
    """The weighted mask losses of a batch of pictures of different sizes, at their own sizes."""
    masks = sum(len(target) for target in targets)
    pairs = list(zip(logits, targets, strict=True))
    bce = bce_weight * sum((sigmoid_ce_loss(x, y, masks) for x, y in pairs), start=jnp.float32(0))
    dice = dice_weight * sum((dice_loss(x, y, masks) for x, y in pairs), start=jnp.float32(0))
    return {"mask_bce_loss": bce, "mask_dice_loss": dice, "mask_loss": bce + dice}


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    results = {}
    for case in fixture.meta["cases"]:
        inputs = {name: fixture.inputs[f"{case}/{name}"] for name in ("logits", "targets", "num_masks")}
        counts = fixture.inputs[f"{case}/question_counts"]
        question = np.repeat(np.arange(len(counts)), counts)
        for name, value in _case(**inputs, question=question).items():
            results[f"{case}/{name}"] = np.asarray(value)
    logits, targets = fixture.numbered("batch/logits_"), fixture.numbered("batch/targets_")

    @jax.jit
    def batch(logits: list[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = batch_mask_losses(logits, targets, fixture.meta["bce_loss_weight"], fixture.meta["dice_loss_weight"])
        return terms["mask_loss"], terms

    (_, terms), gradients = jax.value_and_grad(batch, has_aux=True)([jnp.asarray(x) for x in logits])
    results |= {f"batch/{name}": np.asarray(value) for name, value in terms.items()}
    results |= {f"batch/grad_logits_{number}": np.asarray(value) for number, value in enumerate(gradients)}
    return results
