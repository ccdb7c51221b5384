"""The autoencoder in the layout of diffusers' AutoencoderKL: mapping table, settings, and the names of older files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tensors import FileTensor, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Params, Row, Table, linear, norm, read_torch_tensors, to_torch_tensors
from pixelstory_jax.models.autoencoder import Autoencoder, AutoencoderConfig

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_KEY = re.compile(rf"(.*\.mid_block\.attentions\.0)\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r".*\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")

_SETTINGS: dict[str, str] = {
    "block_out_channels": "block_channels",
    "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_num_groups": "groups",
    "scaling_factor": "scaling_factor",
}
_FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def _convolution(torch: str, path: str) -> tuple[Row, ...]:
    return linear(torch, path, "conv")


def _resnet(torch: str, path: str) -> tuple[Row, ...]:
    return (
        *(row for n in (1, 2) for row in norm(f"{torch}.norm{n}", f"{path}/norm_{n}")),
        *(row for n in (1, 2) for row in _convolution(f"{torch}.conv{n}", f"{path}/conv_{n}")),
        *_convolution(f"{torch}.conv_shortcut", f"{path}/shortcut"),
    )


def _half(half: str, blocks: str, step: str, levels: int, layers: int) -> tuple[Row, ...]:
    """Encoder or decoder: what `blocks` and `step` are called in torch, and the residual blocks of a level."""
    middle = f"{half}.mid_block"
    rows = [
        *_convolution(f"{half}.conv_in", f"{half}/conv_in"),
        *(row for n in (0, 1) for row in _resnet(f"{middle}.resnets.{n}", f"{half}/middle/resnet_{n}")),
        *norm(f"{middle}.attentions.0.group_norm", f"{half}/middle/attention/norm"),
        *norm(f"{half}.conv_norm_out", f"{half}/head/norm"),
        *_convolution(f"{half}.conv_out", f"{half}/head/conv"),
    ]
    for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        rows += linear(f"{middle}.attentions.0.{theirs}", f"{half}/middle/attention/{ours}")
    for level in range(levels):
        for n in range(layers):
            rows += _resnet(f"{half}.{blocks}.{level}.resnets.{n}", f"{half}/level_{level}_resnet_{n}")
        if level != levels - 1:
            rows += _convolution(f"{half}.{blocks}.{level}.{step}rs.0.conv", f"{half}/level_{level}_{step}/conv")
    return tuple(rows)


def autoencoder_table(config: AutoencoderConfig) -> Table:
    """AutoencoderKL, complete."""
    levels, layers = len(config.block_channels), config.layers_per_block
    return Table(
        (
            *_half("encoder", "down_blocks", "downsample", levels, layers),
            *_half("decoder", "up_blocks", "upsample", levels, layers + 1),
            *_convolution("quant_conv", "moments"),
            *_convolution("post_quant_conv", "from_latents"),
        )
    )


def autoencoder_shapes(config: AutoencoderConfig) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s; computes nothing."""
    model, side = Autoencoder(config), config.reduction
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    noise = jax.ShapeDtypeStruct((1, 1, 1, config.latent_channels), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]


def current_names(tensors: TensorMap) -> dict[str, FileTensor | np.ndarray]:
    """The tensors of an older file under today's names: attention as `to_q`, … and as matrices, not 1 x 1 kernels.

    Nothing is read yet.
    """
    renamed = {}
    for key, value in tensors.items():
        old = _OLD_KEY.fullmatch(key)
        name = f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}" if old else key
        pointwise = _ATTENTION_WEIGHT.fullmatch(name) and tuple(value.shape[2:]) == (1, 1)
        renamed[name] = _as_matrix(value) if pointwise else value
    return renamed


def _as_matrix(kernel: FileTensor | np.ndarray) -> FileTensor | np.ndarray:
    """A 1 x 1 kernel [O, I, 1, 1] as [O, I]."""
    if isinstance(kernel, FileTensor):
        return FileTensor(kernel.shape[:2], kernel.dtype, lambda: kernel.read()[:, :, 0, 0], kernel.file)
    return kernel[:, :, 0, 0]


def read_autoencoder(config: AutoencoderConfig, tensors: TensorMap) -> Params:
    """Parameters from a state dict of AutoencoderKL, of today's or older names.

    Raises:
      WeightsError: naming every tensor that is missing, unexpected or mis-shaped.
    """
    return read_torch_tensors(autoencoder_table(config), current_names(tensors), autoencoder_shapes(config))


def autoencoder_config(settings: Mapping[str, Any], **changes: Any) -> AutoencoderConfig:
    """Sizes from the settings (`config.json`) of an AutoencoderKL; `changes` replace fields.

    Raises:
      ValueError: a setting that our network does not have.
    """
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"The autoencoder's setting {name} is {settings[name]!r}; only {value!r} is known.")
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        other = sorted(set(settings.get(name, ())) - {kind})
        if other:
            raise ValueError(f"The autoencoder's setting {name} has {', '.join(other)}; only {kind} is known.")
    values = {ours: settings[theirs] for theirs, ours in _SETTINGS.items() if theirs in settings}
    if "block_channels" in values:
        values["block_channels"] = tuple(values["block_channels"])
    return AutoencoderConfig(**{**values, **changes})


def autoencoder_settings(config: AutoencoderConfig) -> dict[str, Any]:
    """The settings that diffusers needs to build the same network."""
    levels = len(config.block_channels)
    sizes = {theirs: getattr(config, ours) for theirs, ours in _SETTINGS.items()}
    return {
        "_class_name": "AutoencoderKL",
        **_FIXED,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **sizes,
        "block_out_channels": list(config.block_channels),
    }


def read_autoencoder_file(path: str | os.PathLike[str]) -> tuple[AutoencoderConfig, Params]:
    """Sizes and parameters of a file that `write_autoencoder_file` wrote.

    Raises:
      WeightsError: a file that is absent, damaged or without settings, or tensors that do not fit them.
    """
    config = read_autoencoder_sizes(path)
    return config, read_autoencoder(config, read_safetensors(path)[0])


def read_autoencoder_sizes(path: str | os.PathLike[str]) -> AutoencoderConfig:
    """The sizes alone of a file that `write_autoencoder_file` wrote, without a device of JAX being touched.

    Raises:
      WeightsError: a file that is absent, damaged or without settings.
    """
    _, metadata = read_safetensors(path)
    try:
        return autoencoder_config(json.loads(metadata["config"]))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata hold no settings of an autoencoder ({error}).") from error


def write_autoencoder_file(
    path: str | os.PathLike[str], config: AutoencoderConfig, params: Mapping[str, Any], trained_by: str
) -> None:
    """A float16 safetensors file in the layout of AutoencoderKL, its settings in the metadata under "config".

    Args:
      trained_by: name of the run, kept in the metadata.
    """
    tensors = to_torch_tensors(autoencoder_table(config), params)
    halves = {key: value.astype(np.float16) for key, value in tensors.items()}
    write_safetensors(path, halves, {"config": json.dumps(autoencoder_settings(config)), "trained_by": trained_by})
