"""Mapping table of the U-Net: diffusers' `UNet2DConditionModel` (SD 1.5 and SDXL) and our parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pixelstory_jax.interop.torch_layout import Row, Table, linear, norm
from pixelstory_jax.models.unet import UNetConfig

# Options that change the network, with the values that are implemented; the first is what diffusers takes for none.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
NEEDED = (
    *("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "in_channels", "out_channels"),
    *("cross_attention_dim", "attention_head_dim"),
)


def config_from_diffusers(options: Mapping[str, Any], **changes: Any) -> UNetConfig:
    """Sizes from a `unet/config.json`; `changes` replace fields.

    Raises:
      ValueError: an option is missing, or is one that neither Stable Diffusion 1.5 nor SDXL has.
    """
    missing = [name for name in NEEDED if name not in options]
    if missing:
        raise ValueError(f"The settings of the U-Net lack {', '.join(missing)}.")
    for name, values in IMPLEMENTED.items():
        _check_option(options, name, options.get(name, values[0]) in values, f"{values[0]!r} is")
    channels = tuple(options["block_out_channels"])
    attended = _attended_levels(options)
    depths = _depths(options, attended)
    for name in ("layers_per_block", "cross_attention_dim"):
        _check_option(options, name, isinstance(options[name], int), "one number for all levels is")
    heads = options.get("num_attention_heads") or options["attention_head_dim"]
    has_text_time = options.get("addition_embed_type") == "text_time"
    time_id_width = (options.get("addition_time_embed_dim") if has_text_time else None) or 256
    sizes: dict[str, Any] = {
        "channels": channels,
        "depths": depths,
        "heads": (heads,) * len(channels) if isinstance(heads, int) else tuple(heads),
        "layers_per_block": options["layers_per_block"],
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "context_width": options["cross_attention_dim"],
        "linear_projection": options.get("use_linear_projection", False),
        "pooled_width": options["projection_class_embeddings_input_dim"] - 6 * time_id_width if has_text_time else 0,
        "time_id_width": time_id_width,
        "groups": options.get("norm_num_groups", 32),
        "norm_eps": options.get("norm_eps", 1e-5),
    }
    return UNetConfig(**{**sizes, **changes})


def unet_settings(config: UNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """A `unet/config.json` of which diffusers builds the same network; `config_from_diffusers` reads it back.

    What only says how we compute (dtype, remat) and low-rank additions are not in it.

    Args:
      sample_size: side of the latents that a pipeline paints where it is not told otherwise.
    """
    depths = [depth or 1 for depth in config.depths[:-1]] + [config.mid_depth]  # the last one is the middle block's too
    kinds = ["CrossAttn" if depth else "" for depth in config.depths]
    settings: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        **{name: values[0] for name, values in IMPLEMENTED.items()},
        "attention_head_dim": _short(config.heads),  # in diffusers this is the number of heads, in spite of its name
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_width,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_eps": config.norm_eps,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "transformer_layers_per_block": _short(depths),
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "use_linear_projection": config.linear_projection,
    }
    if config.pooled_width:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.time_id_width,
            "projection_class_embeddings_input_dim": config.pooled_width + 6 * config.time_id_width,
        }
    return settings


def _short(numbers: Sequence[int]) -> int | list[int]:
    """One number where all levels have the same."""
    return numbers[0] if len(set(numbers)) == 1 else list(numbers)


def _check_option(options: Mapping[str, Any], name: str, supported: bool, wanted: str) -> None:
    if not supported:
        raise ValueError(f"The U-Net option {name}={options[name]!r} is not supported; {wanted}.")


def _attended_levels(options: Mapping[str, Any]) -> list[bool]:
    """Which resolutions have transformers, finest first."""
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    names = list(options["down_block_types"])
    _check_option(options, "down_block_types", set(names) <= set(kinds), f"a list of {' and '.join(kinds)} is")
    mirrored = [name.replace("Down", "Up") for name in reversed(names)]
    _check_option(options, "up_block_types", list(options["up_block_types"]) == mirrored, f"{mirrored!r} is")
    return [kinds[name] for name in names]


def _depths(options: Mapping[str, Any], attended: list[bool]) -> tuple[int, ...]:
    """Transformer blocks of each resolution. The middle block has as many as the last entry of the option says."""
    name = "transformer_layers_per_block"
    depths = options.get(name, 1)
    depths = [depths] * len(attended) if isinstance(depths, int) else list(depths)
    _check_option(options, name, all(isinstance(depth, int) for depth in depths), "one number for each level is")
    used = tuple(depth if has else 0 for depth, has in zip(depths, attended, strict=True))
    middle = next((depth for depth in reversed(used) if depth), 1)
    _check_option(options, name, depths[-1] == middle, f"{middle} at the last level is")
    return used


def _resnet(torch: str, path: str) -> tuple[Row, ...]:
    return (
        *norm(f"{torch}.norm1", f"{path}/norm_1"),
        *linear(f"{torch}.conv1", f"{path}/conv_1", "conv"),
        *linear(f"{torch}.time_emb_proj", f"{path}/time"),
        *norm(f"{torch}.norm2", f"{path}/norm_2"),
        *linear(f"{torch}.conv2", f"{path}/conv_2", "conv"),
        *linear(f"{torch}.conv_shortcut", f"{path}/shortcut", "conv"),
    )


def _attention(torch: str, path: str) -> tuple[Row, ...]:
    maps = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
    return (
        *(Row(f"{torch}.{theirs}.weight", f"{path}/{ours}/kernel", "linear") for theirs, ours in maps),
        *linear(f"{torch}.to_out.0", f"{path}/out"),
    )


def _stack(torch: str, path: str, projection: str) -> tuple[Row, ...]:
    block, ours = f"{torch}.transformer_blocks.{{n}}", f"{path}/blocks"
    return (
        *norm(f"{torch}.norm", f"{path}/norm"),
        *linear(f"{torch}.proj_in", f"{path}/proj_in", projection),
        *linear(f"{torch}.proj_out", f"{path}/proj_out", projection),
        *(row for number in (1, 2, 3) for row in norm(f"{block}.norm{number}", f"{ours}/norm_{number}")),
        *_attention(f"{block}.attn1", f"{ours}/self_attention"),
        *_attention(f"{block}.attn2", f"{ours}/cross_attention"),
        *linear(f"{block}.ff.net.0.proj", f"{ours}/feed_forward/up"),
        *linear(f"{block}.ff.net.2", f"{ours}/feed_forward/down"),
    )


def _rows(config: UNetConfig) -> Iterator[Row]:
    projection = "linear" if config.linear_projection else "pointwise"
    yield from linear("conv_in", "conv_in", "conv")
    for theirs, ours in (("linear_1", "first"), ("linear_2", "second")):
        yield from linear(f"time_embedding.{theirs}", f"time_embedding/{ours}")
        yield from linear(f"add_embedding.{theirs}", f"added_embedding/{ours}")
    for level in range(config.levels):
        for layer in range(config.layers_per_block):
            yield from _resnet(f"down_blocks.{level}.resnets.{layer}", f"down_{level}/resnet_{layer}")
            yield from _stack(f"down_blocks.{level}.attentions.{layer}", f"down_{level}/attention_{layer}", projection)
        yield from linear(f"down_blocks.{level}.downsamplers.0.conv", f"down_{level}/downsample/conv", "conv")
    yield from _resnet("mid_block.resnets.0", "mid/resnet_0")
    yield from _stack("mid_block.attentions.0", "mid/attention", projection)
    yield from _resnet("mid_block.resnets.1", "mid/resnet_1")
    for number in range(config.levels):
        for layer in range(config.layers_per_block + 1):
            yield from _resnet(f"up_blocks.{number}.resnets.{layer}", f"up_{number}/resnet_{layer}")
            yield from _stack(f"up_blocks.{number}.attentions.{layer}", f"up_{number}/attention_{layer}", projection)
        yield from linear(f"up_blocks.{number}.upsamplers.0.conv", f"up_{number}/upsample/conv", "conv")
    yield from norm("conv_norm_out", "norm_out")
    yield from linear("conv_out", "conv_out", "conv")


def unet_table(config: UNetConfig) -> Table:
    """`UNet2DConditionModel`. Rows of parts that these sizes do not have are never asked for; LoRA is a gap."""
    return Table(tuple(_rows(config)), ours_only=(r".*/lora_[ab]",))
