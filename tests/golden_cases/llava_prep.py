"""llava_prep.npz: image tokens among the text, and a forward pass of the language model."""

from __future__ import annotations

from math import isqrt
from typing import Any

import jax
import numpy as np
from einops import rearrange

from pixelstory_jax.interop.tables import CLIP_VISION_FEATURES, LLAMA, PROJECTORS, Table
from pixelstory_jax.interop.torch_layout import Params, read_torch_tensors
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llama import LlamaConfig
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import (
    IMAGE_TOKEN,
    ImageFeatures,
    PixelLM,
    PixelLMConfig,
    image_token_validity,
)
from pixelstory_jax.objectives.losses import IGNORE, next_token_loss
from tests.golden_cases.fixture import Fixture


def select_layers(fixture: Fixture) -> tuple[int, int]:
    """Which hidden states the reference reads, counted from the last."""
    return fixture.meta.get("mm_vision_select_layer", -2), fixture.meta.get("second_level_layer", -11)


def model_config(fixture: Fixture, decoder: PixelDecoderConfig) -> PixelLMConfig:
    """The faithful model of the sizes in meta."""
    meta = fixture.meta
    clip = meta["clip"]
    states = clip["layers"] + 1
    feature_layers = tuple(states + layer for layer in select_layers(fixture))
    patch = fixture.weights["model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"].shape[-1]
    key = fixture.weights["model.layers.0.self_attn.k_proj.weight"]
    return PixelLMConfig(
        vision=ClipVisionConfig(
            canvas=meta["size"],
            patch_size=patch,
            width=clip["hidden"],
            layers=max(feature_layers),
            heads=clip["heads"],
            mlp_width=clip["inter"],
            activation=meta["clip_hidden_act"],
        ),
        llama=LlamaConfig(
            vocab=meta["vocab"],
            width=meta["hidden"],
            layers=meta["layers"],
            heads=meta["heads"],
            kv_heads=meta["heads"] * key.shape[0] // meta["hidden"],
            mlp_width=meta["inter"],
            rope_theta=meta["rope_theta"],
            norm_eps=meta["rms_norm_eps"],
        ),
        decoder=decoder,
        feature_layers=feature_layers,
        codebook_tokens=meta["seg_token_num"],
        image_tokens_side=isqrt(meta["image_tokens"]),
        mode="faithful",
    )


def read_params(fixture: Fixture, config: PixelLMConfig, table: Table) -> Params:
    """The parameters that the table names, strictly."""
    batch = {
        "image": jax.ShapeDtypeStruct((1, config.vision.canvas, config.vision.canvas, 3), np.uint8),
        "image_size": jax.ShapeDtypeStruct((1, 2), np.int32),
        "tokens": jax.ShapeDtypeStruct((1, 1, 2), np.int32),
        "token_valid": jax.ShapeDtypeStruct((1, 1, 2), bool),
        "target_positions": jax.ShapeDtypeStruct((1, 1, config.group), np.int32),
    }
    expected: dict[str, Any] = jax.eval_shape(PixelLM(config).init, jax.random.key(0), batch)["params"]
    parts = {row.path.split("/")[0] for row in table.rows}
    return read_torch_tensors(table, fixture.weights, {name: expected[name] for name in expected if name in parts})


def expand(rows: np.ndarray, image_tokens: int, fill: int, is_image: np.ndarray) -> np.ndarray:
    """[R, T] with the one place of each row that `is_image` marks repeated `image_tokens` times as `fill`."""
    expanded = []
    for row, image in zip(rows, is_image, strict=True):
        (place,) = np.flatnonzero(image)
        expanded.append(np.concatenate([row[:place], np.full(image_tokens, fill, row.dtype), row[place + 1 :]]))
    return np.stack(expanded)


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    inputs = fixture.inputs
    config = model_config(fixture, PixelDecoderConfig(scales=len(select_layers(fixture))))
    model = PixelLM(config)
    tower = CLIP_VISION_FEATURES.prefixed("model.vision_tower.vision_tower.", "vision/")
    params = read_params(fixture, config, LLAMA.prefixed("", "llama/") + PROJECTORS + tower)
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    tokens = expand(inputs["input_ids"], config.image_tokens, IMAGE_TOKEN, is_image)[:, None]
    text_valid = expand(inputs["attention_masks"], config.image_tokens, 1, is_image).astype(bool)[:, None]
    labels = expand(inputs["labels"], config.image_tokens, IGNORE, is_image)
    pixels, size = rearrange(inputs["images"], "b c h w -> b h w c"), inputs["clip_resize"]

    @jax.jit
    def run(params: Params) -> dict[str, jax.Array]:
        def call(method: Any, *arguments: Any) -> Any:
            return model.apply({"params": params}, *arguments, method=method)

        states = call(PixelLM.vision_features, pixels, size)
        valid = image_token_validity(size, config.vision.patch_size, config.vision.grid, config.image_tokens_side)
        projected = call(PixelLM.projected_features, states)
        features = ImageFeatures(call(PixelLM.language_tokens, states[0]), valid, projected)
        embeddings, key_valid = call(PixelLM.embed, tokens, text_valid, features)
        _, unmasked = call(PixelLM.embed, tokens, np.ones_like(text_valid), features)
        hidden = call(PixelLM.states, tokens, text_valid, features)[:, 0]
        logits = call(PixelLM.logits, hidden)
        return {
            "inputs_embeds": embeddings[:, 0],
            "attention_mask": key_valid[:, 0],
            "no_attention_mask_given/attention_mask": unmasked[:, 0],
            **{f"image_features_level{level}": projected[level] for level in range(config.scales)},
            "last_hidden_state": hidden,
            "logits": logits,
            "loss": next_token_loss(logits, labels),
        }

    return {"labels": labels, **{name: np.asarray(value) for name, value in run(params).items()}}
