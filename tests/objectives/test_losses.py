from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.objectives.losses import (
    IGNORE,
    dice_loss,
    mask_losses,
    next_token_loss,
    overlap_loss,
    refinement_weights,
    sigmoid_ce_loss,
)


def random_batch(seed: int = 0):
    """Two pictures with 3 and 1 targets in 4 slots; the second picture fills a part of the canvas."""
    rng = np.random.default_rng(seed)
    return {
        "mask_logits": jnp.asarray(3 * rng.standard_normal((2, 4, 8, 8)), jnp.float32),
        "target_masks": (rng.random((2, 4, 8, 8)) > 0.5).astype(np.uint8),
        "target_valid": np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool),
        "target_question": np.array([[0, 0, 1, 0], [0, 0, 0, 0]], np.int32),
        "image_size": np.array([[8, 8], [5, 8]], np.int32),
    }


def test_padded_batch_equals_the_reference_on_cropped_pictures():
    batch = random_batch()
    ours = mask_losses(**batch)
    pictures = []
    for b in range(2):
        rows, columns = batch["image_size"][b]
        kept = batch["target_valid"][b]
        cropped = (batch[name][b][kept][:, :rows, :columns] for name in ("mask_logits", "target_masks"))
        pictures.append((*cropped, batch["target_question"][b][kept]))
    for name, function in (("bce", sigmoid_ce_loss), ("dice", dice_loss)):
        np.testing.assert_allclose(ours[name], sum(function(x, y, 4) for x, y, _ in pictures), rtol=1e-5)
    # With alpha = 2 the paper's loss is the plain one plus the released code's term for overlapped pixels.
    overlapped = sum(overlap_loss(x, y, 4, q) for x, y, q in pictures)
    np.testing.assert_allclose(ours["refinement"], ours["bce"] + overlapped, rtol=1e-5)
    np.testing.assert_allclose(mask_losses(**batch, alpha=1.0)["refinement"], ours["bce"], rtol=1e-6)


def test_what_is_no_target_or_no_picture_has_no_gradient():
    batch = random_batch()
    gradient = jax.grad(lambda x: sum(mask_losses(**{**batch, "mask_logits": x}).values()))(batch["mask_logits"])
    assert np.any(gradient[0, 2]) and np.any(gradient[1, 0, :5])
    assert not np.any(gradient[0, 3]) and not np.any(gradient[1, 1:]) and not np.any(gradient[1, 0, 5:])


def test_overlap_counts_only_masks_of_the_same_question():
    logits = jnp.ones((1, 4, 1, 2)) * jnp.array([1.0, -1.0])
    question, valid = jnp.array([[0, 0, 1, 0]]), jnp.array([[True, True, True, False]])
    np.testing.assert_array_equal(
        refinement_weights(logits, question, valid)[0, :, 0], [[2, 1], [2, 1], [1, 1], [2, 1]]
    )
    alone = refinement_weights(logits, question, jnp.array([[True, False, True, False]]))
    np.testing.assert_array_equal(alone[0, 0, 0], [1, 1])


def test_no_targets_cost_nothing():
    batch = {**random_batch(), "target_valid": np.zeros((2, 4), bool)}
    values, gradient = jax.value_and_grad(lambda x: mask_losses(**{**batch, "mask_logits": x})["dice"])(
        batch["mask_logits"]
    )
    assert values == 0 and np.isfinite(gradient).all()


def test_next_token_loss_shifts_and_ignores():
    logits = np.random.default_rng(0).standard_normal((1, 4, 5)).astype(np.float32)
    labels = np.array([[3, IGNORE, 2, 1]])
    chance = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    np.testing.assert_allclose(next_token_loss(logits, labels), -(chance[1, 2] + chance[2, 1]) / 2, rtol=1e-5)
    assert next_token_loss(logits, np.full((1, 4), IGNORE)) == 0
