"""Losses of PixelLM (arXiv 2312.02228, section 3.3) on padded batches of static shape.

B images, S target slots per image, h, w sides of the canvas, Q questions, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

IGNORE = -100
DICE_SCALE = 1000.0
DICE_EPS = 1e-6
COUNT_EPS = 1e-8


def next_token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each next token, meaned over all supervised tokens of the batch; 0 where there are none.

    Args:
      logits: [..., T, V]. labels: [..., T] ids, IGNORE where not supervised; aligned with the inputs, shifted here.
    """
    targets = labels[..., 1:]
    supervised = targets != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[..., :-1, :].astype(jnp.float32), jnp.where(supervised, targets, 0)
    )
    return jnp.where(supervised, losses, 0).sum() / jnp.maximum(supervised.sum(), 1)


def token_accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of supervised tokens that are the most likely one; arguments as `next_token_loss`."""
    targets = labels[..., 1:]
    supervised = targets != IGNORE
    right = (logits[..., :-1, :].argmax(-1) == targets) & supervised
    return right.sum() / jnp.maximum(supervised.sum(), 1)


def pixel_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy with logits per pixel, float32."""
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def dice_loss(
    logits: jax.Array, targets: jax.Array, num_masks: jax.Array | float, pixel_valid: jax.Array | None = None
) -> jax.Array:
    """1 - 2 |P Y| / (|P| + |Y|) per mask, summed over the masks and divided by `num_masks` + 1e-8.

    The areas are divided by 1000 before 1e-6 is added, as in the reference.

    Args:
      logits, targets: [..., H, W]; the leading axes are masks.
      num_masks: divisor. pixel_valid: bool, broadcastable to the masks; False pixels count in no area.
    """
    return _sum_over_masks(_dice(logits, targets, pixel_valid), num_masks)


def _dice(logits: jax.Array, targets: jax.Array, pixel_valid: jax.Array | None) -> jax.Array:
    probability = jax.nn.sigmoid(logits.astype(jnp.float32)) / DICE_SCALE
    truth = targets.astype(jnp.float32)
    if pixel_valid is not None:
        probability = jnp.where(pixel_valid, probability, 0)
        truth = jnp.where(pixel_valid, truth, 0)
    both = 2 * (probability * truth).sum((-2, -1))
    areas = probability.sum((-2, -1)) + (truth / DICE_SCALE).sum((-2, -1))
    return 1 - (both + DICE_EPS) / (areas + DICE_EPS)


def sigmoid_ce_loss(
    logits: jax.Array,
    targets: jax.Array,
    num_masks: jax.Array | float,
    weights: jax.Array | None = None,
    pixel_valid: jax.Array | None = None,
) -> jax.Array:
    """Binary cross-entropy meaned over the (valid) pixels of a mask, summed over masks, divided by `num_masks` + 1e-8.

    Args:
      logits, targets: [..., H, W]. weights: factor per pixel (`refinement_weights`). pixel_valid: as `dice_loss`.
    """
    return _sum_over_masks(_mean_cross_entropy(logits, targets, weights, pixel_valid), num_masks)


def _mean_cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None, pixel_valid: jax.Array | None
) -> jax.Array:
    losses = pixel_cross_entropy(logits, targets)
    if weights is not None:
        losses = losses * weights
    if pixel_valid is None:
        return losses.mean((-2, -1))
    valid = jnp.broadcast_to(pixel_valid, losses.shape)
    return jnp.where(valid, losses, 0).sum((-2, -1)) / jnp.maximum(valid.sum((-2, -1)), 1)


def _sum_over_masks(losses: jax.Array, num_masks: jax.Array | float) -> jax.Array:
    return losses.sum() / (num_masks + COUNT_EPS)


def overlaps(logits: jax.Array, question: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """[..., S, H, W] bool: pixels where two or more predicted masks of the mask's own question are positive.

    Args:
      logits: [..., S, H, W]. question: [..., S] which question each mask belongs to. valid: bool [..., S] real masks.
    """
    same = question[..., :, None] == question[..., None, :]
    if valid is not None:
        same = same & valid[..., None, :]
    positive = (logits > 0).astype(jnp.float32)
    return jnp.einsum("...st,...thw->...shw", same.astype(jnp.float32), positive) > 1.5


def refinement_weights(
    logits: jax.Array, question: jax.Array, valid: jax.Array | None = None, alpha: float = 2.0
) -> jax.Array:
    """The paper's A: `alpha` where predicted masks of one question overlap, else 1. No gradient."""
    return jax.lax.stop_gradient(jnp.where(overlaps(logits, question, valid), alpha, 1.0))


def overlap_loss(logits: jax.Array, targets: jax.Array, num_masks: jax.Array | float, question: jax.Array) -> jax.Array:
    """The released code's refinement term: cross-entropy of overlapped pixels only, meaned over all pixels.

    Added to the plain cross-entropy with the same weight it is the paper's loss with alpha = 2.
    """
    weights = jax.lax.stop_gradient(overlaps(logits, question).astype(jnp.float32))
    return sigmoid_ce_loss(logits, targets, num_masks, weights)


def mask_losses(
    mask_logits: jax.Array,
    target_masks: jax.Array,
    target_valid: jax.Array,
    target_question: jax.Array,
    image_size: jax.Array,
    alpha: float = 2.0,
) -> dict[str, jax.Array]:
    """The mask terms of a batch, unweighted, meaned over its real targets (0 where there are none).

    Args:
      mask_logits: [B, S, h, w] on the padded canvas. target_masks: [B, S, h, w] 0 or 1, other values do not count.
      target_valid: bool [B, S]. target_question: int [B, S].
      image_size: [B, 2] (height, width) of the picture in the canvas; other pixels do not count.
      alpha: weight of pixels where masks of one question overlap; 1 switches target refinement off.

    Returns:
      "bce" plain cross-entropy, "refinement" the cross-entropy with the weights of `refinement_weights` (this one is to
      be trained on; it equals "bce" where nothing overlaps), and "dice".
    """
    height, width = mask_logits.shape[-2:]
    rows = jnp.arange(height)[None, :] < image_size[:, :1]
    columns = jnp.arange(width)[None, :] < image_size[:, 1:]
    pixel_valid = (rows[:, :, None] & columns[:, None, :])[:, None] & (target_masks <= 1)  # [B, S, h, w]
    count = target_valid.sum().astype(jnp.float32)
    weights = refinement_weights(mask_logits, target_question, target_valid, alpha)
    per_mask = {
        "bce": _mean_cross_entropy(mask_logits, target_masks, None, pixel_valid),
        "refinement": _mean_cross_entropy(mask_logits, target_masks, weights, pixel_valid),
        "dice": _dice(mask_logits, target_masks, pixel_valid),
    }
    return {name: _sum_over_masks(jnp.where(target_valid, values, 0), count) for name, values in per_mask.items()}
