"""CLIP's vision tower in the layout of transformers: settings, names of several versions, and towers of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pixelstory_jax.interop.settings import check_known, need
from pixelstory_jax.interop.tables import CLIP_VISION, CLIP_VISION_FEATURES
from pixelstory_jax.interop.tensors import FileTensor, LazyArray, LazyParams, TensorMap
from pixelstory_jax.interop.torch_layout import map_tensors
from pixelstory_jax.models.clip_vision import ACTIVATIONS, ClipVision, ClipVisionConfig, resize_position_table

SETTINGS = {
    "image_size": "canvas",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}
DEFAULTS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
# Of a vision section inside another model, which names only what differs from what transformers takes.
NESTED_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
PREFIX = "vision_model."
OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # of a whole CLIPModel


def vision_section(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision settings of a CLIPVisionModel or of a whole CLIPModel."""
    nested = settings.get("vision_config")
    return settings if nested is None else {**NESTED_DEFAULTS, **_given(nested)}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not null."""
    return {name: value for name, value in settings.items() if value is not None}


def clip_vision_config(settings: Mapping[str, Any], **changes: Any) -> ClipVisionConfig:
    """Sizes of the complete tower from a `config.json`; `changes` replace fields.

    Raises:
      WeightsError: a setting is missing, or is one that our network does not have.
    """
    section = {**DEFAULTS, **_given(vision_section(settings))}
    need(section, SETTINGS, "vision tower")
    check_known(section, {"hidden_act": ACTIVATIONS, "num_channels": (3,)}, "vision tower")
    sizes = {ours: section[theirs] for theirs, ours in SETTINGS.items()}
    sizes |= {"activation": section["hidden_act"], "norm_eps": section["layer_norm_eps"], "has_final_norm": True}
    return ClipVisionConfig(**{**sizes, **changes})


def clip_vision_settings(config: ClipVisionConfig, dtype: str = "float32") -> dict[str, Any]:
    """What transformers needs to build the same tower: the `config.json` of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **{theirs: getattr(config, ours) for theirs, ours in SETTINGS.items()},
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "num_channels": 3,
        "projection_dim": 768,
        "torch_dtype": dtype,
    }


def preprocessor_settings(canvas: int) -> dict[str, Any]:
    """`preprocessor_config.json` of CLIP for pictures of `canvas` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": canvas, "width": canvas},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": canvas},
    }


def released_vision_names(tensors: TensorMap, prefix: str = "") -> dict[str, FileTensor | np.ndarray]:
    """The tower's tensors under the names of released files, `vision_model.…`, from any of the layouts.

    Args:
      prefix: what stands before the tower's names, as `vision_tower.` in LLaVA. The other half of a CLIPModel is left
        out, and files of transformers 5, which have no `vision_model.`, get it.
    """
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    own = {name: value for name, value in own.items() if not name.startswith(OTHER_PARTS)}
    return {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in own.items()}


def clip_vision_shapes(config: ClipVisionConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s; computes nothing."""
    pixels = jax.ShapeDtypeStruct((1, config.canvas, config.canvas, 3), np.float32)

    def init(rng: Any, pixels: Any) -> Any:
        return ClipVision(config).init(rng, pixels, None, (config.layers,))

    return jax.eval_shape(init, jax.random.key(0), pixels)["params"]


def read_clip_vision(config: ClipVisionConfig, tensors: TensorMap, prefix: str = "") -> LazyParams:
    """Parameters of a tower, complete or with fewer layers than the file, in the precision of the file.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    table = CLIP_VISION if config.has_final_norm else CLIP_VISION_FEATURES
    return map_tensors(table, released_vision_names(tensors, prefix), clip_vision_shapes(config))


def resized_tower(params: LazyParams, grid: int, faithful: bool, prefix: str = "") -> LazyParams:
    """The tower with its position table taken to another grid; see `resize_position_table`."""
    path = f"{prefix}position_embedding"
    table = params[path]
    shape = (grid**2 + 1, table.shape[1])
    if table.shape == shape:
        return params

    def read() -> np.ndarray:
        return np.asarray(resize_position_table(np.asarray(table, np.float32), grid, faithful)).astype(table.dtype)

    return {**params, path: LazyArray.whole(shape, table.dtype, read)}


def complete_tower(config: ClipVisionConfig, params: LazyParams, layers: int) -> tuple[ClipVisionConfig, LazyParams]:
    """A tower with as many layers as a CLIPVisionModel and a final norm, for readers that build a whole one.

    Layers behind those that exist are zero, which passes their input on; the norm that is missing is the identity.
    """
    shapes = clip_vision_shapes(config)
    grown: LazyParams = {}
    for path, value in params.items():
        grown[path] = _with_zero_layers(value, layers) if path.startswith("layers/") else value
    width = (shapes["class_embedding"].shape[0],)
    kind = params["class_embedding"].dtype
    if not config.has_final_norm:
        grown["final_norm/scale"] = LazyArray.whole(width, kind, lambda: np.ones(width, kind))
        grown["final_norm/bias"] = LazyArray.whole(width, kind, lambda: np.zeros(width, kind))
    complete = ClipVisionConfig(
        **{**{name: getattr(config, name) for name in config.__dataclass_fields__}, "layers": layers},
    )
    return complete, grown


def _with_zero_layers(value: LazyArray, layers: int) -> LazyArray:
    missing = layers - value.shape[0]
    if missing <= 0:
        return value
    shape = (layers, *value.shape[1:])
    zeros = (missing, *value.shape[1:])
    return LazyArray.whole(
        shape, value.dtype, lambda: np.concatenate([np.asarray(value), np.zeros(zeros, value.dtype)])
    )
