"""Mapping tables of single files in the original latent-diffusion (LDM) layout, Stable Diffusion 1.5 and SDXL.

U-Net and autoencoder have the tensors of diffusers' networks under other module names, so their tables are those of
diffusers with the modules renamed. Names on the right are facts of released files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pixelstory_jax.interop.autoencoder_table import autoencoder_table
from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, PREFIX
from pixelstory_jax.interop.torch_layout import Layout, Row, Table, linear, norm
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig
from pixelstory_jax.models.unet import UNetConfig

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT = {"sd15": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
TEXT_2 = "conditioner.embedders.1.model."

GAPS = (
    r"model_ema\..*",  # a second, averaged copy of the U-Net under names without dots
    r"(alphas|sqrt_alphas|sqrt_one_minus_alphas|log_one_minus_alphas)_cumprod(_prev)?",
    r"sqrt_recip(m1)?_alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"betas|logvar|lvlb_weights|scale_factor",
    r"denoiser\.(sigmas|log_sigmas)",
    r"v_pred|ztsnr",  # empty tensors that say what the U-Net predicts; `ldm_file` looks at them
    r"first_stage_model\.(loss\..*|model_ema\..*)",
    r"cond_stage_model\.logit_scale|conditioner\.embedders\.1\.model\.(logit_scale|attn_mask)",
)
"""Schedules, averages and the like, which are no parameters of the networks."""

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
_AUTOENCODER_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(table: Table, modules: Mapping[str, str]) -> Table:
    """The same table under other module names: `modules` has one for every row, in part or whole up to a dot."""

    def rename(key: str) -> str:
        module = next(name for name in modules if key.startswith(f"{name}."))
        return modules[module] + key[len(module) :]

    return replace(table, rows=tuple(replace(row, torch=rename(row.torch)) for row in table.rows))


def _inside(theirs: str, ldm: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ldm}.{other}" for name, other in names.items()}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Module of diffusers' U-Net -> module of the original one, which numbers its blocks through all levels."""
    names = dict(_UNET_ENDS)
    for number, place in ((0, 0), (1, 2)):
        names |= _inside(f"mid_block.resnets.{number}", f"middle_block.{place}", _UNET_RESNET)
    place = 1
    for level in range(config.levels):
        block = f"down_blocks.{level}"
        for layer in range(config.layers_per_block):
            names |= _inside(f"{block}.resnets.{layer}", f"input_blocks.{place}.0", _UNET_RESNET)
            names[f"{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        names[f"{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    place = 0
    for number, depth in enumerate(reversed(config.depths)):
        block = f"up_blocks.{number}"
        for layer in range(config.layers_per_block + 1):
            names |= _inside(f"{block}.resnets.{layer}", f"output_blocks.{place}.0", _UNET_RESNET)
            names[f"{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            place += 1
        # Behind the last resnet of its level, and behind the attention where there is one.
        names[f"{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{2 if depth else 1}.conv"
    return names


def ldm_unet_table(config: UNetConfig) -> Table:
    """The U-Net, without the prefix of a file."""
    return renamed(unet_table(config), unet_modules(config))


def autoencoder_modules(config: AutoencoderConfig) -> dict[str, str]:
    """Module of diffusers' autoencoder -> module of the original one, whose decoder counts its levels down."""
    last = len(config.block_channels) - 1
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, blocks, step in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        names |= _inside(half, half, _AUTOENCODER_ENDS)
        for number in (0, 1):
            theirs, ldm = f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}"
            names |= _inside(theirs, ldm, _AUTOENCODER_RESNET)
        names |= _inside(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _AUTOENCODER_ATTENTION)
        for level in range(last + 1):
            theirs = f"{half}.{blocks}_blocks.{level}"
            ldm = f"{half}.{blocks}.{level if half == 'encoder' else last - level}"
            for layer in range(config.layers_per_block + 1):
                names |= _inside(f"{theirs}.resnets.{layer}", f"{ldm}.block.{layer}", _AUTOENCODER_RESNET)
            names[f"{theirs}.{step}rs.0.conv"] = f"{ldm}.{step}.conv"
    return names


def ldm_autoencoder_table(config: AutoencoderConfig) -> Table:
    """The autoencoder, without the prefix of a file."""
    table = renamed(autoencoder_table(config), autoencoder_modules(config))
    # All linear maps are those of the attention, which this layout has as 1 x 1 convolutions.
    rows = (replace(row, layout="pointwise" if row.layout == "linear" else row.layout) for row in table.rows)
    return replace(table, rows=tuple(rows))


def ldm_text_table(has_prefix: bool = True) -> Table:
    """CLIP's text encoder under transformers' names. Its projection, which some files have, is not used.

    Args:
      has_prefix: whether the names begin with `text_model.`, which files of some versions of transformers lack.
    """
    rows = tuple(row for row in CLIP_TEXT.rows if row.torch.startswith(PREFIX))
    table = Table(rows, (*CLIP_TEXT.ignored, r"text_projection\.weight"))
    if has_prefix:
        return table
    bare = tuple(replace(row, torch=row.torch.removeprefix(PREFIX)) for row in rows)
    return Table(bare, (r"embeddings\.position_ids", *table.ignored))


_LAYER = "transformer.resblocks.{n}."
_FUSED = {
    "weight": ("kernel", "(p o) i", "p i o"),
    "bias": ("bias", "(p o)", "p o"),
}


OPEN_CLIP_TEXT = Table(
    rows=(
        Row("token_embedding.weight", "token_embedding"),
        Row("positional_embedding", "position_embedding"),
        Row("text_projection", "projection/kernel"),  # no module but an array, from the width to the projected width
        *norm("ln_final", "final_norm"),
        *norm(f"{_LAYER}ln_1", "layers/attention_norm"),
        *norm(f"{_LAYER}ln_2", "layers/mlp_norm"),
        *linear(f"{_LAYER}mlp.c_fc", "layers/mlp/up"),
        *linear(f"{_LAYER}mlp.c_proj", "layers/mlp/down"),
        *linear(f"{_LAYER}attn.out_proj", "layers/attention/out"),
        *(
            Row(f"{_LAYER}attn.in_proj_{kind}", f"layers/attention/{name}/{leaf}", Layout(theirs, ours, (("p", 3),), n))
            for n, name in enumerate(("query", "key", "value"))
            for kind, (leaf, theirs, ours) in _FUSED.items()
        ),
    )
)
"""OpenCLIP's text transformer, whose queries, keys and values are one tensor."""


def ldm_table(config: StoryDiffusionConfig, has_prefix: bool = True) -> Table:
    """A whole file: SDXL where `config` has a second text encoder, else Stable Diffusion 1.5.

    Args:
      has_prefix: see `ldm_text_table`.
    """
    kind = "sdxl" if config.text_2 else "sd15"
    table = (
        ldm_unet_table(config.unet).prefixed(UNET, "unet/")
        + ldm_autoencoder_table(config.autoencoder).prefixed(AUTOENCODER, "autoencoder/")
        + ldm_text_table(has_prefix).prefixed(TEXT[kind], "text/")
        + Table((), ignored=GAPS)
    )
    return table + OPEN_CLIP_TEXT.prefixed(TEXT_2, "text_2/") if config.text_2 else table
