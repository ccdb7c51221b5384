"""Rows of the U-Net and its parts, of the decoder of pictures, and of consistent self-attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.benchmarks.language_rows import inference, normal, wanted_of
from experiments.benchmarks.row import Row, Side
from pixelstory_jax.interop.torch_layout import Table
from pixelstory_jax.models.autoencoder import AutoencoderConfig
from pixelstory_jax.models.unet import UNetConfig

DIFFUSERS = ("experiments.benchmarks.torch_diffusion",)
TEXT_TOKENS = 77
PANEL_TOKENS, PANEL_WIDTH, ANCHORS, RATE = 576, 640, 4, 0.5  # SDXL's layer at 24 x 24 tokens


def diffusion_rows(quick: bool) -> list[Row]:
    """All rows of this file but the one of full size."""
    return [*block_rows(quick), *unet_rows(quick), vae_row(quick), *consistent_rows(quick)]


# Blocks


def block_rows(quick: bool) -> list[Row]:
    sd15, sdxl, side = UNetConfig.sd15(), UNetConfig.sdxl(), 64
    if quick:
        small: dict[str, Any] = {"channels": (32, 64), "heads": (2, 2), "groups": 8, "context_width": 24}
        sd15, sdxl = UNetConfig.sd15(**small, depths=(1, 0)), UNetConfig.sdxl(**small, depths=(0, 1))
        side = 16
    return [
        block_row("SD 1.5 block, 64 x 64 of 320", sd15, "down_blocks.0.", "down_0/", side, images=2),
        block_row("SDXL block, 32 x 32 of 640", sdxl, "down_blocks.1.", "down_1/", side // 2, images=2),
        block_row("SDXL middle block, 16 x 16 of 1280", sdxl, "mid_block.", "mid/", side // 4, images=1),
    ]


def block_row(name: str, config: UNetConfig, theirs: str, path: str, side: int, images: int) -> Row:
    """One block of a U-Net alone: `theirs` and `path` are the prefixes of its parameters."""
    level = int(path[5]) if path.startswith("down") else config.levels - 1
    incoming = config.channels[max(level - 1, 0)] if path.startswith("down") else config.channels[-1]

    def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        context = normal(images, TEXT_TOKENS, config.context_width, seed=2)
        return normal(images, side, side, incoming), normal(images, config.time_width, seed=1), context

    def ours() -> Side:
        import jax
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.interop.unet_table import unet_table
        from pixelstory_jax.models.unet import DownBlock, MidBlock

        block: Any = DownBlock(config, level) if path.startswith("down") else MidBlock(config)
        arrays = [jnp.asarray(array) for array in inputs()]
        shapes = jax.eval_shape(block.init, jax.random.key(0), *arrays)["params"]
        params = our_params(part_of(unet_table(config), theirs, path), shapes, prefix=theirs)
        return our_side(lambda params, *inputs: block.apply({"params": params}, *inputs), params, *arrays)

    def torch() -> Side:
        from torch import tensor

        from experiments.benchmarks.torch_diffusion import channels_last, down_or_middle

        block = down_or_middle(config, theirs)
        x, time, context = map(tensor, inputs())
        x = x.permute(0, 3, 1, 2).contiguous()
        return inference(lambda: channels_last(block(x, time, encoder_hidden_states=context)))

    return Row(name, ours, torch, **wanted_of("float32"), libraries=DIFFUSERS, seconds=18)


def part_of(table: Table, torch: str, path: str) -> Table:
    """The rows of one part, without the prefixes of its tensors and parameters."""
    rows = (row for row in table.rows if row.torch.startswith(torch) and row.path.startswith(path))
    return Table(tuple(type(row)(row.torch[len(torch) :], row.path[len(path) :], row.layout) for row in rows))


# Whole U-Nets


def unet_rows(quick: bool) -> list[Row]:
    middle = UNetConfig(channels=(128, 256, 512), depths=(0, 1, 2), heads=(2, 4, 8), context_width=768, pooled_width=0)
    return [
        unet_row("tiny U-Net, 24 x 24", UNetConfig.tiny(), 24, 2 if quick else 16),
        unet_row("mid-size U-Net, 48 x 48", UNetConfig.tiny() if quick else middle, 8 if quick else 48, 2),
    ]


def full_unet_row(quick: bool) -> Row:
    """SDXL's U-Net itself. 2.57 billion parameters, so one side has to go before the other comes."""
    config, side = (UNetConfig.tiny(), 8) if quick else (UNetConfig.sdxl(), 64)
    return unet_row("SDXL U-Net, full size, 64 x 64", config, side, 2, full=True)


def unet_row(name: str, config: UNetConfig, side: int, images: int, full: bool = False) -> Row:
    latents = normal(images, side, side, config.in_channels)
    times = np.linspace(1, 981, images).astype(np.float32)
    context = normal(images, TEXT_TOKENS, config.context_width, seed=1)
    pooled = normal(images, config.pooled_width, seed=2)
    time_ids = np.tile(np.array([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], np.float32), (images, 1))

    def ours() -> Side:
        import jax
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.interop.unet_table import unet_table
        from pixelstory_jax.models.unet import UNet

        added = {"pooled": jnp.asarray(pooled), "time_ids": jnp.asarray(time_ids)} if config.pooled_width else None
        inputs = [*map(jnp.asarray, (latents, times, context)), added]
        shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)["params"]
        params = our_params(unet_table(config), shapes)

        def predict(params: Any, *inputs: Any) -> Any:
            return UNet(config).apply({"params": params}, *inputs)[0]

        return our_side(predict, params, *inputs)

    def torch() -> Side:
        from torch import tensor

        from experiments.benchmarks.torch_diffusion import channels_last, unet

        network = unet(config)
        inputs = tensor(latents).permute(0, 3, 1, 2).contiguous(), tensor(times), tensor(context)
        added = {"text_embeds": tensor(pooled), "time_ids": tensor(time_ids)} if config.pooled_width else None
        return inference(lambda: channels_last(network(*inputs, added_cond_kwargs=added).sample))

    wanted = wanted_of("float32") if not full else {"target": 1.0}
    seconds = 240 if full else 20
    return Row(name, ours, torch, **wanted, libraries=DIFFUSERS, seconds=seconds, full=full)


# Pictures


def vae_row(quick: bool) -> Row:
    config, side = (AutoencoderConfig.tiny(), 8) if quick else (AutoencoderConfig.sd15(), 32)
    shape = (1, side, side, config.latent_channels)

    def ours() -> Side:
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.interop.autoencoder_table import autoencoder_shapes, autoencoder_table
        from pixelstory_jax.models.autoencoder import Autoencoder

        params = our_params(autoencoder_table(config), autoencoder_shapes(config))
        params = {name: params[name] for name in ("decoder", "from_latents")}

        def decode(params: Any, latents: Any) -> Any:
            return Autoencoder(config).apply({"params": params}, latents, method=Autoencoder.decode)

        return our_side(decode, params, jnp.asarray(normal(*shape)))

    def torch() -> Side:
        from torch import tensor

        from experiments.benchmarks.torch_diffusion import autoencoder, channels_last

        network, inputs = autoencoder(config), tensor(normal(*shape)).permute(0, 3, 1, 2).contiguous()
        return inference(lambda: channels_last(network.decode(inputs).sample))

    return Row("VAE decode, 256 px", ours, torch, **wanted_of("float32"), libraries=DIFFUSERS, seconds=35)


# Consistent self-attention


def consistent_rows(quick: bool) -> list[Row]:
    return [consistent_row(panels, *((64, 32) if quick else (PANEL_TOKENS, PANEL_WIDTH))) for panels in (4, 8, 16)]


def consistent_row(panels: int, tokens: int, width: int) -> Row:
    """One layer over a story of which the first panels are anchors, both halves of guidance, half of the tokens seen.

    PyTorch does what the released app does: one call for the anchors under a mask, then a call for every later panel
    over all tokens of all anchors, unseen ones masked. Ours: one call for the anchors, which keeps the tokens that are
    seen, and one for all later panels.
    """
    heads = max(width // 64, 1)
    shape = (2, panels, tokens, width)
    draws = np.random.default_rng(0).random((ANCHORS, tokens), np.float32)

    def ours() -> Side:
        import jax
        import jax.numpy as jnp

        from experiments.benchmarks.random_weights import our_params
        from experiments.benchmarks.work import our_side
        from pixelstory_jax.inference.sharing import sample_tokens
        from pixelstory_jax.interop.torch_layout import Row as TableRow
        from pixelstory_jax.interop.torch_layout import linear
        from pixelstory_jax.models.consistent_attention import SelfAttention, Sharing, see_each_other

        layer, later = SelfAttention(width, heads), panels - ANCHORS
        names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
        rows = [TableRow(f"{theirs}.weight", f"{ours}/kernel", "linear") for theirs, ours in names]
        table = Table((*rows, *linear("to_out", "out")))
        shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, tokens, width)))["params"]
        samples = {tokens: jax.tree.map(jnp.asarray, sample_tokens(draws, RATE, "gathered"))}
        readers = jnp.ones((1, later, ANCHORS), bool)

        def call(params: Any, x: Any, sharing: Any, bank: Any = None) -> Any:
            flat = x.reshape(-1, tokens, width)
            out, kept = layer.apply({"params": params}, flat, sharing, jnp.bool_(True), bank)  # type: ignore[misc]
            return out.reshape(x.shape), kept

        def story(params: Any, x: Any) -> Any:
            first, bank = call(params, x[:, :ANCHORS], Sharing(see_each_other(ANCHORS), samples, store=later > 0))
            if not later:
                return first
            rest, _ = call(params, x[:, ANCHORS:], Sharing(readers, samples), bank)
            return jnp.concatenate([first, rest], axis=1)

        return our_side(story, our_params(table, shapes), jnp.asarray(normal(*shape)))

    def torch() -> Side:
        from experiments.benchmarks.torch_diffusion import released_story

        return inference(released_story(normal(*shape), draws, RATE, heads))

    return Row(f"consistent attention, {panels} panels", ours, torch, target=2.0, libraries=DIFFUSERS, seconds=12)
