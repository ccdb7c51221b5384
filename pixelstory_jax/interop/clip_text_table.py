"""CLIP text encoders in the layout of transformers' CLIPTextModel and CLIPTextModelWithProjection: mapping table,
settings, and the two ways that keys are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pixelstory_jax.interop.tensors import FileTensor, TensorMap
from pixelstory_jax.interop.torch_layout import Params, Row, Table, linear, norm, read_torch_tensors
from pixelstory_jax.models.clip_text import ClipText, ClipTextConfig

PREFIX = "text_model."
_PROJECTION = "text_projection.weight"
_WITH_PROJECTION = "CLIPTextModelWithProjection"

_SETTINGS: dict[str, str] = {
    "vocab_size": "vocab",
    "max_position_embeddings": "length",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "eos_token_id": "eos_id",
}


_LAYER = PREFIX + "encoder.layers.{n}."
_LINEAR = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.out_proj": "attention/out",
    "mlp.fc1": "mlp/up",
    "mlp.fc2": "mlp/down",
}
CLIP_TEXT = Table(
    rows=(
        Row(f"{PREFIX}embeddings.token_embedding.weight", "token_embedding"),
        Row(f"{PREFIX}embeddings.position_embedding.weight", "position_embedding"),
        *norm(f"{PREFIX}final_layer_norm", "final_norm"),
        *norm(f"{_LAYER}layer_norm1", "layers/attention_norm"),
        *norm(f"{_LAYER}layer_norm2", "layers/mlp_norm"),
        *(row for theirs, ours in _LINEAR.items() for row in linear(_LAYER + theirs, f"layers/{ours}")),
        Row(_PROJECTION, "projection/kernel", "linear"),
    ),
    ignored=(r"text_model\.embeddings\.position_ids",),
)
"""Both classes, complete; the projection only where the encoder has one."""


def clip_text_shapes(config: ClipTextConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s; computes nothing."""
    tokens = jax.ShapeDtypeStruct((1, config.length), np.int32)
    return jax.eval_shape(ClipText(config).init, jax.random.key(0), tokens)["params"]


def released_names(tensors: TensorMap) -> dict[str, FileTensor | np.ndarray]:
    """The tensors under the keys of released files, `text_model.…`.

    The newest transformers has no such prefix inside CLIPTextModel and saves a freshly made encoder without it.
    """
    if any(key.startswith(PREFIX) for key in tensors):
        return dict(tensors)
    return {key if key == _PROJECTION else PREFIX + key: value for key, value in tensors.items()}


def read_clip_text(config: ClipTextConfig, tensors: TensorMap) -> Params:
    """Parameters from a state dict of CLIPTextModel or CLIPTextModelWithProjection, with or without `text_model.`.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    return read_torch_tensors(CLIP_TEXT, released_names(tensors), clip_text_shapes(config))


def clip_text_config(settings: Mapping[str, Any], **changes: Any) -> ClipTextConfig:
    """Sizes from the settings (`config.json`) of a text encoder; `changes` replace fields.

    Files of both classes name a `projection_dim`; only "CLIPTextModelWithProjection" among the `architectures` has the
    projection.

    Raises:
      ValueError: a setting is missing, or one that our network does not have.
    """
    projected = _WITH_PROJECTION in (settings.get("architectures") or ())
    needed = [*_SETTINGS, *(["projection_dim"] if projected else [])]
    missing = [name for name in needed if name not in settings]
    if missing:
        raise ValueError(f"The settings of the text encoder lack {', '.join(missing)}.")
    values = {ours: settings[theirs] for theirs, ours in _SETTINGS.items()}
    values["projection"] = settings["projection_dim"] if projected else 0
    return ClipTextConfig(**{**values, **changes})


def clip_text_settings(config: ClipTextConfig) -> dict[str, Any]:
    """The settings that transformers needs to build the same network."""
    return {
        "architectures": [_WITH_PROJECTION if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **{theirs: getattr(config, ours) for theirs, ours in _SETTINGS.items()},
        "bos_token_id": 0,  # this one and the next are what released files say; the network does not use them
        "pad_token_id": 1,
        "projection_dim": config.projection or config.width,
    }
