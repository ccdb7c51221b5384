"""pixel_decoder.npz: neck, prompt encoder and mask decoder of one image, with gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.interop.tables import pixel_decoder
from pixelstory_jax.interop.torch_layout import read_torch_tensors, to_torch_tensors
from pixelstory_jax.models.pixel_decoder import (
    MaskDecoder,
    Neck,
    PixelDecoderConfig,
    PromptEncoder,
    fuse_scales,
)
from tests.golden_cases.fixture import Fixture
from tests.golden_cases.restored import restore_masks, restored


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    meta, inputs = fixture.meta, fixture.inputs
    grid, scales = meta["grid"], meta["image_feature_scale_num"]
    config = PixelDecoderConfig(
        width=meta["embed_dim"],
        heads=meta["num_heads"],
        mlp_width=meta["decoder_mlp_dim"],
        depth=meta["transformer_depth"],
        cross_downsample=meta["attention_downsample_rate"],
        mask_tokens=meta["num_multimask_outputs"] + 1,
        iou_width=meta["iou_head_hidden_dim"],
        scales=scales,
        fused_size=meta["fused_out_size"],
    )
    neck, prompt_encoder, decoder = Neck(config), PromptEncoder(config), MaskDecoder(config)
    features = rearrange(inputs["image_features"], "l d h w -> 1 l h w d")
    prompts = inputs["pred_embeddings"][None]

    def forward(params: dict[str, Any], features: jax.Array, prompts: jax.Array, weights: jax.Array) -> dict[str, Any]:
        necked = neck.apply({"params": params["neck"]}, features)
        dense, code = prompt_encoder.apply({"params": params["prompt_encoder"]}, grid)
        results = decoder.apply({"params": params["mask_decoder"]}, necked, prompts, dense, code, True)
        fused = fuse_scales([scale.masks[0, :, 0] for scale in results], weights, meta["fused_out_size"])
        return {"neck": necked, "dense": dense, "code": code, "scales": results, "fused": fused}

    def initial() -> dict[str, Any]:
        """Parameters of the right shapes, for `jax.eval_shape`."""
        rng, code = jax.random.key(0), jnp.zeros((grid, grid, config.width))
        image = jnp.zeros((1, scales, grid, grid, config.width))
        return {
            "neck": neck.init(rng, features)["params"],
            "prompt_encoder": prompt_encoder.init(rng, grid)["params"],
            "mask_decoder": decoder.init(rng, image, prompts, code[0, 0], code, True)["params"],
        }

    table = pixel_decoder(scales, config.depth)
    params = read_torch_tensors(table, fixture.weights, jax.eval_shape(initial))
    sizes = [tuple(map(tuple, pair)) for pair in zip(inputs["clip_resize"], inputs["original_size"], strict=True)]

    @jax.jit
    def loss(params: Any, features: jax.Array, prompts: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
        result = forward(params, features, prompts, weights)
        result["uncropped"] = [restore_masks(result["fused"], *pair, crop=False) for pair in sizes]
        masks = restore_masks(result["fused"], *sizes[0])
        return (inputs["grad_output_pred_masks_0"] * masks).sum(), result

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (_, result), gradients = gradient(params, features, prompts, inputs["multiscale_scalar"])
    targets = prompts.shape[1]
    spread = np.broadcast_to(np.asarray(result["dense"])[None, :, None, None], (targets, config.width, grid, grid))
    ours = {
        "dense_pe": rearrange(result["code"], "h w d -> 1 d h w"),
        "sparse_embeddings": prompts[0],
        "dense_embeddings": spread,
        "neck": rearrange(result["neck"], "1 l h w d -> l d h w"),
        "fused_low_res_masks": result["fused"][:, None],
    }
    for number, scale in enumerate(result["scales"]):
        ours[f"level{number}/all_masks"], ours[f"level{number}/all_iou_predictions"] = scale.masks[0], scale.quality[0]
        ours[f"level{number}/low_res_masks"] = scale.masks[0, :, :1]
        ours[f"level{number}/iou_predictions"] = scale.quality[0, :, :1]
    for number, (pair, uncropped) in enumerate(zip(sizes, result["uncropped"], strict=True)):
        ours[f"pred_masks_clip_{number}"] = uncropped
        ours[f"pred_masks_{number}"], ours[f"mask_score_{number}"] = restored(result["fused"], *pair)
    by_name = {
        **to_torch_tensors(table, gradients[0]),
        "image_features": rearrange(gradients[1], "1 l h w d -> l d h w"),
        "pred_embeddings": gradients[2][0],
        "multiscale_scalar": gradients[3],
    }
    gradients_asked = {f"grad/{name}": value for name, value in by_name.items() if f"grad/{name}" in fixture.expected}
    return {name: np.asarray(value) for name, value in {**ours, **gradients_asked}.items()}
