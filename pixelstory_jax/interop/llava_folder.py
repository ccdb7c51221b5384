"""LLaVA in its two layouts: the original one (versions 1 and 1.5) and that of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixelstory_jax.interop.clip_vision_folder import (
    clip_vision_config,
    clip_vision_settings,
    read_clip_vision,
    released_vision_names,
)
from pixelstory_jax.interop.llama_folder import DEFAULTS, llama_config, llama_settings
from pixelstory_jax.interop.settings import check_known
from pixelstory_jax.interop.tables import CLIP_VISION, LLAMA
from pixelstory_jax.interop.tensors import FileTensor, LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Row, Table, linear, map_tensors
from pixelstory_jax.interop.weights import prefixed
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.llava import Llava, LlavaConfig

TOWER = "model.vision_tower.vision_tower."  # of the original layout, where it is in the file at all
HF_TOWER = "vision_tower."
KNOWN: dict[str, tuple[Any, ...]] = {
    "vision_feature_select_strategy": ("default",),
    "multimodal_projector_bias": (True,),
    "projector_hidden_act": ("gelu",),
    "mm_vision_select_feature": ("patch",),
}


def llava_table(projector: str) -> Table:
    """LlavaLlamaForCausalLM of the original code, without its tower."""
    rows: tuple[Row, ...] = linear("model.mm_projector", "mm_projector/first")
    if projector != "linear":
        first, second = "model.mm_projector.0", "model.mm_projector.2"
        rows = (*linear(first, "mm_projector/first"), *linear(second, "mm_projector/second"))
    return LLAMA.prefixed("", "llama/") + Table(rows, ours_only=(r"vision/.*",))


def llava_hf_table() -> Table:
    """LlavaForConditionalGeneration of transformers, in the names of its released files."""
    rows = (
        *linear("multi_modal_projector.linear_1", "mm_projector/first"),
        *linear("multi_modal_projector.linear_2", "mm_projector/second"),
    )
    tower = CLIP_VISION.prefixed(HF_TOWER, "vision/")
    return LLAMA.prefixed("language_model.", "llama/") + Table(rows) + tower


def is_hf(settings: Mapping[str, Any]) -> bool:
    """Whether a folder's settings are those of transformers' own LLaVA."""
    return "text_config" in settings


def llava_config(settings: Mapping[str, Any], tower: Mapping[str, Any] | None = None) -> LlavaConfig:
    """Sizes from a `config.json` of either layout.

    Args:
      tower: settings of the CLIP tower, which the original layout does not have.

    Raises:
      WeightsError: a setting is missing, or is one that our network does not have.
    """
    check_known(settings, KNOWN, "LLaVA model")
    text: Mapping[str, Any]
    if is_hf(settings):
        tower = {"vision_config": settings.get("vision_config") or {}}
        text = {**DEFAULTS, **{name: value for name, value in settings["text_config"].items() if value is not None}}
        layer, projector = settings.get("vision_feature_layer", -2), "mlp2x_gelu"
    else:
        text, layer = settings, settings.get("mm_vision_select_layer", -2)
        projector = settings.get("mm_projector_type") or "linear"
        if projector not in ("linear", "mlp2x_gelu"):
            raise WeightsError(
                f"The LLaVA model has mm_projector_type={projector!r}; linear or mlp2x_gelu can be read."
            )
    if not isinstance(layer, int):
        raise WeightsError(f"The LLaVA model reads the layers {layer!r} of its tower; one layer can be read.")
    vision = clip_vision_config(tower) if tower else _unseen_tower(settings)
    feature = layer if layer >= 0 else vision.layers + 1 + layer
    token = settings.get("image_token_index", settings.get("image_token_id", 32000))
    return LlavaConfig(vision, llama_config(text), feature, projector, token)


def _unseen_tower(settings: Mapping[str, Any]) -> ClipVisionConfig:
    """The tower of an original folder that names it only: CLIP's large one, of the width that the settings say."""
    return ClipVisionConfig.clip_large_336(width=settings.get("mm_hidden_size", 1024))


def released_hf_names(tensors: TensorMap) -> dict[str, FileTensor | np.ndarray]:
    """Tensors of transformers' LLaVA under the names of released files, from those that version 5 has in memory."""
    renamed: dict[str, FileTensor | np.ndarray] = {}
    for name, value in tensors.items():
        if name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        elif name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        else:
            name = name.removeprefix("model.")
        renamed[name] = value
    tower = released_vision_names(renamed, HF_TOWER)
    rest = {name: value for name, value in renamed.items() if not name.startswith(HF_TOWER)}
    return {**rest, **{HF_TOWER + name: value for name, value in tower.items()}}


def read_llava(config: LlavaConfig, tensors: TensorMap, hf: bool) -> LazyParams:
    """Parameters from a state dict of either layout; an original one without a tower gives none for `vision/`.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    shapes = Llava.shapes(config)
    if hf:
        return map_tensors(llava_hf_table(), released_hf_names(tensors), shapes)
    rest = {name: value for name, value in tensors.items() if not name.startswith(TOWER)}
    params = map_tensors(llava_table(config.projector), rest, shapes)
    if len(rest) < len(tensors):
        params |= prefixed(read_clip_vision(config.vision, tensors, TOWER), "vision/")
    return params


def llava_settings(config: LlavaConfig, tower: str, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of the original code; `tower` names the CLIP that it loads beside."""
    return {
        **llama_settings(config.llama, dtype=dtype),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision.width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layer - config.vision.layers - 1,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
    }


def llava_hf_settings(config: LlavaConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of transformers.

    Raises:
      WeightsError: a projector that transformers does not have.
    """
    if config.projector != "mlp2x_gelu":
        raise WeightsError(f"transformers' LLaVA has no projector {config.projector!r}; use the original layout.")
    inner = {"architectures": None, "torch_dtype": None}
    text, vision = llama_settings(config.llama), clip_vision_settings(config.vision)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {name: value for name, value in text.items() if name not in inner},
        "vision_config": {name: value for name, value in vision.items() if name not in inner},
        "image_token_index": config.image_token,
        "image_seq_length": config.vision.grid**2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.feature_layer - config.vision.layers - 1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def processor_settings(config: LlavaConfig) -> dict[str, Any]:
    """`processor_config.json` of transformers: how many tokens a picture becomes."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1,  # the class token, which is dropped
        "vision_feature_select_strategy": "default",
    }


def tower_name(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The CLIP that an original folder names: a folder in it, else the name as it is; None for none."""
    name = settings.get("mm_vision_tower") or settings.get("vision_tower")
    if not name:
        return None
    # One that was written beside the model may have been moved with it since.
    inside = next((place for place in (folder / name, folder / Path(name).name) if place.is_dir()), None)
    return str(inside or name)
