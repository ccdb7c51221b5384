"""Diffusion in PyTorch, to compare with: networks of diffusers, and self-attention as the released app shares it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from experiments.benchmarks.random_weights import draw_tensor, fill_module
from pixelstory_jax.inference.sharing import sample_tokens
from pixelstory_jax.interop.autoencoder_table import autoencoder_settings
from pixelstory_jax.interop.unet_table import unet_settings
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.unet import UNetConfig


def unet(config: UNetConfig) -> Any:
    """UNet2DConditionModel of these sizes, filled."""
    with torch.device("meta"):  # what would be drawn here is drawn by `fill_module`
        network = UNet2DConditionModel.from_config(unet_settings(config))
    return fill_module(network.to_empty(device="cpu"))


def down_or_middle(config: UNetConfig, prefix: str) -> nn.Module:
    """One block of it: `prefix` is "mid_block." or "down_blocks.N."."""
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(unet_settings(config))
    block = network.get_submodule(prefix.rstrip("."))
    return fill_module(block.to_empty(device="cpu"), prefix=prefix)


def autoencoder(config: AutoencoderConfig) -> Any:
    """AutoencoderKL of these sizes, filled."""
    with torch.device("meta"):
        network = AutoencoderKL.from_config(autoencoder_settings(config))
    return fill_module(network.to_empty(device="cpu"))


def channels_last(output: Any) -> Any:
    """Every [B, C, H, W] of an output as [B, H, W, C]."""
    if isinstance(output, Tensor):
        return output.permute(0, 2, 3, 1)
    return tuple(map(channels_last, output))


def released_story(x: np.ndarray, draws: np.ndarray, rate: float, heads: int) -> Callable[[], Tensor]:
    """A pass of [2, A, N, C] through one layer as the released app has it; the first len(draws) panels are anchors."""
    panels, tokens, width = x.shape[1:]
    anchors, story = len(draws), torch.tensor(x)
    names = [f"{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out")]
    query, key, value, out = (torch.tensor(draw_tensor(name, (width, width))) for name in names)
    bias = torch.tensor(draw_tensor("to_out.bias", (width,)))
    sample = sample_tokens(draws, rate, "gathered")
    seen = torch.zeros(anchors + 1, tokens, dtype=torch.bool)
    seen[:anchors].scatter_(1, torch.tensor(np.asarray(sample.index), dtype=torch.long), True)
    mask = seen.flatten().expand((anchors + 1) * tokens, -1).clone()
    for number in range(anchors + 1):
        own = slice(number * tokens, (number + 1) * tokens)
        mask[own, own] = True

    def attend(queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (
            linear(y, matrix).unflatten(-1, (heads, -1)).transpose(1, 2)
            for y, matrix in ((queries, query), (keys, key), (keys, value))
        )
        attended = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return linear(attended.transpose(1, 2).flatten(2), out, bias)

    def run() -> Tensor:
        bank, edge = story[:, :anchors].flatten(1, 2), anchors * tokens
        done = [attend(bank, bank, mask[:edge, :edge])]
        for number in range(anchors, panels):
            own = story[:, number]
            done.append(attend(own, torch.cat([bank, own], 1), mask[edge:]))
        return torch.cat(done, 1).unflatten(1, (panels, tokens))

    return run
