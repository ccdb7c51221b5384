"""PixelLM in the layout of its releases: settings, dtypes, and the parts that the original code has no place for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixelstory_jax.data.tokenizers import IMAGE_END, IMAGE_START, Tokenizer
from pixelstory_jax.interop.clip_vision_folder import (
    clip_vision_config,
    clip_vision_settings,
    read_clip_vision,
    resized_tower,
)
from pixelstory_jax.interop.llama_folder import llama_config, llama_settings, llama_table
from pixelstory_jax.interop.settings import need, read_json
from pixelstory_jax.interop.tables import pixellm
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import FileTensor, LazyArray, LazyParams, WeightsError
from pixelstory_jax.interop.torch_layout import map_tensors
from pixelstory_jax.interop.weights import grown_rows, prefixed
from pixelstory_jax.models.clip_vision import ClipVisionConfig
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.pixel_decoder import PixelDecoderConfig
from pixelstory_jax.models.pixellm import PixelLM, PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config

TOWER_FIELDS = ("patch_size", "width", "heads", "mlp_width", "activation", "norm_eps")
ARCHITECTURE = "PixelLMForCausalLM"
OWN_SECTION = "pixelstory_jax"  # in config.json: all sizes, which the original settings do not name
OWN_WEIGHTS = "pixelstory_jax.safetensors"  # parameters that the original code keeps as constants
OWN_PATHS = ("token_weights", "scale_weights")
CANVAS = 448
# Parts that releases keep in float32 whatever the rest has: they were made anew in it before saving.
FLOAT32_PARTS = ("model.text_hidden_fcs.", "model.image_feature_neck.", "model.prompt_encoder.", "model.mask_decoder.")
# Checkpoints that training wrote, with LoRA apart; what the documented command leaves at its default.
RAW_PREFIX = "base_model.model."
RAW_TOWER = "model.vision_tower.vision_tower."
RAW_LORA = {"r": 8, "lora_alpha": 16}
RAW_CODEBOOK = 3


def pixellm_config(settings: Mapping[str, Any], codebook_tokens: int | None, tower: Mapping[str, Any]) -> PixelLMConfig:
    """Sizes of a folder.

    Args:
      settings: its `config.json`. codebook_tokens: N, counted in its vocabulary. tower: settings of its CLIP.

    Raises:
      WeightsError: a setting is missing, or one that our network does not have.
    """
    if OWN_SECTION in settings:
        return sizes_from_config(PixelLMConfig, settings[OWN_SECTION])
    need(settings, ("mm_hidden_size", "out_dim"), "PixelLM model")
    vision = clip_vision_config(tower)
    scales = int(settings.get("image_feature_scale_num", 2))
    if scales != 2 or not codebook_tokens:
        raise WeightsError("A released PixelLM has 2 feature scales and [SEG0], [SEG1], … among its added tokens.")
    layers = vision.layers - 1, vision.layers - 10  # states -2 and -11 of the tower
    canvas = int(settings.get("resize_vision_tower_size", CANVAS))
    llama = llama_config(settings, remat="full")
    return PixelLMConfig(
        dataclasses.replace(
            vision, canvas=canvas, layers=layers[0], has_final_norm=False, dtype=llama.dtype, remat="full"
        ),
        llama,
        PixelDecoderConfig(width=int(settings["out_dim"]), dtype=llama.dtype),
        layers,
        codebook_tokens,
        mode="faithful",
    )


def count_codebook(added: Mapping[str, int]) -> int:
    """Codebook tokens [SEG0], [SEG1], … of a vocabulary, over all scales."""
    return sum(name.startswith("[SEG") for name in added)


def read_pixellm(folder: Path, tower: Path | None) -> tuple[PixelLMConfig, LazyParams]:
    """A released folder, or one that we wrote, with the CLIP tower that stands beside it.

    Args:
      tower: folder of the CLIP; without it the result has none.

    Raises:
      WeightsError: files are missing or do not fit.
    """
    settings = read_json(folder / "config.json")
    tower_settings = (
        read_json(tower / "config.json") if tower else clip_vision_settings(ClipVisionConfig.clip_large_336())
    )
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    config = pixellm_config(settings, count_codebook(added) // 2, tower_settings)
    shapes = pixellm_shapes(config)
    table = pixellm(config.scales, config.decoder.depth)
    params = map_tensors(table, open_tensors(folder), shapes)
    if tower:
        file_config = clip_vision_config(tower_settings, layers=config.vision.layers, has_final_norm=False)
        own = {name: getattr(config.vision, name) for name in TOWER_FIELDS}
        wrong = [
            f"{name} {getattr(file_config, name)}, not {value}"
            for name, value in own.items()
            if getattr(file_config, name) != value
        ]
        if wrong:
            raise WeightsError(f"{tower} is another tower than that of {folder}: it has {', '.join(wrong)}.")
        vision = read_clip_vision(file_config, open_tensors(tower))
        params |= prefixed(resized_tower(vision, config.vision.grid, config.mode == "faithful"), "vision/")
    if (folder / OWN_WEIGHTS).is_file():
        params |= _own_weights(folder / OWN_WEIGHTS, shapes)
    absent = sorted(path for path in flatten(shapes) if path not in params and not path.startswith("vision/"))
    if absent:
        raise WeightsError(f"{folder} lacks {', '.join(absent)}: {OWN_WEIGHTS}, which holds them, is not there.")
    return config, params


def read_raw_pixellm(file: Path, base: Path) -> tuple[PixelLMConfig, LazyParams]:
    """What training with the original code wrote (`pytorch_model.bin`), with its low-rank additions merged.

    Args:
      base: folder of the LLaVA that was trained, for the settings that the file does not have.

    Raises:
      WeightsError: it cannot be read or does not fit.
    """
    from pixelstory_jax.interop.lora_files import merge_lora

    tensors: dict[str, FileTensor | np.ndarray] = {
        name.removeprefix(RAW_PREFIX).replace(".base_layer.", "."): value for name, value in open_tensors(file).items()
    }
    lora = {name: tensors.pop(name) for name in list(tensors) if ".lora_" in name}
    needed = "model.embed_tokens.weight", "model.text_hidden_fcs.0.2.weight", "model.mm_projector.0.weight"
    absent = [name for name in needed if name not in tensors]
    if absent:
        raise WeightsError(f"{file} is no checkpoint of PixelLM's training: it lacks {', '.join(absent)}.")
    vocab, out_dim, tower_width = tensors[needed[0]].shape[0], tensors[needed[1]].shape[0], tensors[needed[2]].shape[1]
    settings = {**read_json(base / "config.json"), "vocab_size": vocab, "out_dim": out_dim}
    tower = clip_vision_settings(ClipVisionConfig.clip_large_336(width=tower_width))
    config = pixellm_config({**settings, "mm_hidden_size": tower_width}, RAW_CODEBOOK, tower)
    rest = {name: value for name, value in tensors.items() if not name.startswith(RAW_TOWER)}
    params = map_tensors(pixellm(config.scales, config.decoder.depth), rest, pixellm_shapes(config))
    vision = read_clip_vision(config.vision, tensors, RAW_TOWER)
    params |= prefixed(vision, "vision/")
    return config, merge_lora(params, {"llama/": llama_table()}, lora, settings=RAW_LORA) if lora else params


def _own_weights(file: Path, shapes: Mapping[str, Any]) -> LazyParams:
    tensors, flat = open_tensors(file), flatten(shapes)
    wrong = [f"{path} {list(value.shape)}" for path, value in tensors.items() if value.shape != flat[path].shape]
    if wrong:
        raise WeightsError(f"{file} holds parameters that do not fit: {', '.join(wrong)}.")
    return {path: LazyArray.whole(value.shape, value.dtype, value.read) for path, value in tensors.items()}


def pixellm_shapes(config: PixelLMConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s, without low-rank additions; computes nothing."""
    bare = dataclasses.replace(
        config, llama=dataclasses.replace(config.llama, lora=dataclasses.replace(config.llama.lora, rank=0))
    )
    side, group = bare.vision.canvas, bare.group
    batch = {
        "image": jax.ShapeDtypeStruct((1, side, side, 3), "uint8"),
        "image_size": jax.ShapeDtypeStruct((1, 2), "int32"),
        "tokens": jax.ShapeDtypeStruct((1, 1, 8), "int32"),
        "token_valid": jax.ShapeDtypeStruct((1, 1, 8), "bool"),
        "target_positions": jax.ShapeDtypeStruct((1, 1, group), "int32"),
    }
    return jax.eval_shape(PixelLM(bare).init, jax.random.key(0), batch)["params"]


def pixellm_settings(config: PixelLMConfig, tower: str, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` that the original code reads; all sizes of ours are in a section of their own."""
    return {
        **llama_settings(config.llama, dtype=dtype),
        "architectures": [ARCHITECTURE],
        "model_type": "llava",
        "use_cache": False,
        "mm_hidden_size": config.vision.width,
        "mm_vision_tower": tower,
        "vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": None,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "train_mask_decoder": True,
        "out_dim": config.decoder.width,
        "image_feature_scale_num": config.scales,
        "resize_vision_tower": True,
        "resize_vision_tower_size": config.vision.canvas,
        "pad_train_clip_images": True,
        "vision_tower_for_mask": True,
        "separate_mm_projector": True,
        "mm_projector_hidden_dim": 2,
        "mm_projector_out_dim": 1,
        OWN_SECTION: dataclasses.asdict(config),
    }


def differences(config: PixelLMConfig) -> list[str]:
    """What of a model the original code cannot compute as we do; empty for one that it can."""
    found = []
    if config.mode != "faithful":
        found.append(
            "it does not know the learned fusion weights and the finer fused masks of mode=paper, but fuses with "
            "constants at 128 x 128"
        )
    released = (23, 14), 448, 14, 3
    if (config.feature_layers, config.vision.canvas, config.vision.patch_size, config.codebook_tokens) != released:
        found.append("layers 23 and 14 of a tower of 448 pixels, and 3 tokens a scale, are built into it")
    return found


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """`added_tokens.json`: codebook and image marks with their ids."""
    return dict(sorted(tokenizer.added.items(), key=lambda item: item[1]))


def tokenizer_settings(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """`tokenizer_config.json` for a SentencePiece vocabulary, as the releases have it."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(id_): {
                "content": name,
                "lstrip": False,
                "rstrip": False,
                "normalized": name not in (IMAGE_START, IMAGE_END),
                "single_word": False,
                "special": name in (IMAGE_START, IMAGE_END),
            }
            for name, id_ in added_tokens(tokenizer).items()
        },
    }


def grow_vocabulary(params: LazyParams, vocab: int) -> LazyParams:
    """Language model parameters (`llama/…`) for a vocabulary with new tokens behind those of the file."""
    grown = dict(params)
    for path, axis in (("llama/embedding", 0), ("llama/head", 1)):
        if path in params:
            grown[path] = grown_rows(params[path], vocab, axis, seed=axis)
    return grown
