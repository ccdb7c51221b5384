"""U-Nets with weights in a folder: sdxl_unet, sd15_unet and their runs with consistent self-attention."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.interop.safetensors_files import read_safetensors
from pixelstory_jax.interop.torch_layout import read_torch_tensors
from pixelstory_jax.interop.unet_table import config_from_diffusers, unet_table
from pixelstory_jax.models.consistent_attention import Sample, Sharing, see_each_other
from pixelstory_jax.models.unet import FreeU, Resnet, TransformerStack, UNet, UNetConfig
from tests.golden_cases.fixture import Fixture


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.asarray(rearrange(x, "b c h w -> b h w c"))


def nchw(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(rearrange(np.asarray(x), "b h w c -> b c h w"))


def load_unet(folder) -> tuple[UNetConfig, dict[str, Any]]:
    """Config and parameters of a diffusers folder."""
    config = config_from_diffusers(json.loads((folder / "config.json").read_text()))
    tensors, _ = read_safetensors(folder / "diffusion_pytorch_model.safetensors")
    return config, read_torch_tensors(unet_table(config), tensors, unet_shapes(config))


def unet_shapes(config: UNetConfig) -> dict[str, Any]:
    """Shapes of the parameters."""
    side = 2 ** (config.levels - 1)
    latents = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((1, 2, config.context_width), jnp.float32)
    added = None
    if config.pooled_width:
        added = {
            "pooled": jax.ShapeDtypeStruct((1, config.pooled_width), jnp.float32),
            "time_ids": jax.ShapeDtypeStruct((1, 6), jnp.float32),
        }
    return jax.eval_shape(UNet(config).init, jax.random.key(0), latents, jnp.float32(0), context, added)["params"]


def inputs_at(fixture: Fixture, prefix: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray] | None]:
    """Latents (NHWC), context and added conditions under in/`prefix`/."""
    get = fixture.inputs
    added = None
    if f"{prefix}/text_embeds" in get:
        added = {"pooled": get[f"{prefix}/text_embeds"], "time_ids": get[f"{prefix}/time_ids"]}
    return nhwc(get[f"{prefix}/sample"]), get[f"{prefix}/encoder_hidden_states"], added


PROBES = {"add_embedding": "added_embedding", "mid_block": "mid"}


def probed_module(name: str) -> str:
    """Our name of a probed torch module: down_blocks.1 -> down_1."""
    for torch, ours in (("down_blocks.", "down_"), ("up_blocks.", "up_")):
        if name.startswith(torch):
            return ours + name.removeprefix(torch)
    return PROBES.get(name, name)


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    """sdxl_unet, sd15_unet."""
    config, params = load_unet(fixture.folder)
    model = UNet(config)

    @jax.jit
    def plain(latents, times, context, added):
        (out, _), state = model.apply(
            {"params": params}, latents, times, context, added, capture_intermediates=True, mutable=["intermediates"]
        )
        return out, state["intermediates"]

    @jax.jit
    def with_freeu(latents, times, context, added):
        return model.apply({"params": params}, latents, times, context, added, freeu=FreeU())[0]

    results = {}
    for name in fixture.expected:
        if name.startswith("faint/"):
            continue
        size, time, *rest = name.split("/")
        latents, context, added = inputs_at(fixture, size)
        times = fixture.inputs[f"{size}/timesteps_batch"] if time == "tbatch" else np.float32(time.removeprefix("t"))
        if rest == ["sample_freeu"]:
            results[name] = nchw(with_freeu(latents, times, context, added))
            continue
        out, states = plain(latents, np.float32(times), context, added)
        if rest == ["sample"]:
            results[name] = nchw(out)
        else:
            value = states[probed_module(rest[1])]["__call__"][0]
            value = value[0] if isinstance(value, tuple) else value
            results[name] = nchw(value) if value.ndim == 4 else np.asarray(value)
    level = 1  # the faint inputs are for down_blocks.1
    part, faint = params["down_1"], {k.removeprefix("faint/"): v for k, v in fixture.inputs.items() if "faint/" in k}
    stack = TransformerStack(config, config.channels[level], config.heads[level], config.depths[level])
    results["faint/attentions"] = nchw(
        stack.apply(
            {"params": part["attention_0"]},
            nhwc(faint["attentions/hidden_states"]),
            faint["attentions/encoder_hidden_states"],
        )[0]
    )
    resnet = Resnet(config, config.channels[level])
    results["faint/resnets"] = nchw(
        resnet.apply({"params": part["resnet_0"]}, nhwc(faint["resnets/hidden_states"]), faint["resnets/temb"])
    )
    return results


def samples(fixture: Fixture, step: int, anchors: int, rows: str = "write") -> dict[int, Sample]:
    """The recorded sample of a step for each grid: from index lists, or from the columns of the boolean masks."""
    found: dict[int, Sample] = {}
    grids = {int(n.split("tokens")[1].split("/")[0]) for n in fixture.inputs if f"/step{step}/tokens" in n}
    for tokens in grids:
        index = f"index/step{step}/tokens{tokens}/"
        if f"{index}0" in fixture.inputs:
            lists = fixture.numbered(index)[:anchors]
            longest = max(1, max(map(len, lists)))
            padded = np.array([np.pad(row, (0, longest - len(row))) for row in lists], np.int32)
            valid = np.array([np.arange(longest) < len(row) for row in lists])
            found[tokens] = Sample(jnp.asarray(valid), jnp.asarray(padded))
        else:
            mask = fixture.inputs[f"mask/step{step}/tokens{tokens}"]
            found[tokens] = Sample(jnp.asarray(mask[-1, : anchors * tokens].reshape(anchors, tokens)))
    return found


def consistent(fixture: Fixture) -> dict[str, np.ndarray]:
    """sdxl_unet_consistent_mask, sdxl_unet_consistent_index, sd15_unet_consistent_mask."""
    config, params = load_unet(fixture.folder)
    model, anchors = UNet(config), fixture.meta["id_length"]
    write, read = inputs_at(fixture, "write"), inputs_at(fixture, "read")

    @jax.jit
    def run(inputs, time, sharing):
        latents, context, added = inputs
        return model.apply({"params": params}, latents, time, context, added, sharing)

    results = {}
    for step, time in enumerate(fixture.meta["timesteps"]):
        gates = jnp.asarray(fixture.inputs["use_consistent"][step])
        sample = samples(fixture, step, anchors)
        writing = Sharing(see_each_other(anchors), sample, gates, store=True)
        out, bank = run(write, np.float32(time), writing)
        results[f"write/step{step}"] = nchw(out)
        out, _ = run(read, np.float32(time), Sharing(jnp.ones((1, 1, anchors), bool), sample, gates, bank))
        results[f"read/step{step}"] = nchw(out)
    return results
