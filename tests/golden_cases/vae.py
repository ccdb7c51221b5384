"""vae.npz: the autoencoder's distribution, a draw from it and decoded pictures; two of its modules on faint inputs."""

from __future__ import annotations

import jax
import numpy as np
from einops import rearrange

from pixelstory_jax.interop.autoencoder_table import autoencoder_config, read_autoencoder
from pixelstory_jax.models.autoencoder import Autoencoder, ResidualBlock, SpatialAttention, posterior_sample
from tests.golden_cases.fixture import Fixture


def channels_last(x: np.ndarray) -> np.ndarray:
    return rearrange(x, "b c h w -> b h w c")


def channels_first(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b h w c -> b c h w")


def outputs(fixture: Fixture) -> dict[str, np.ndarray]:
    config = autoencoder_config(fixture.meta["config"])
    model = Autoencoder(config)
    params = read_autoencoder(config, fixture.weights)
    results = {}
    for size in sorted({name.split("/")[0] for name in fixture.inputs} - {"faint"}):
        image, latent, noise = (
            channels_last(fixture.inputs[f"{size}/{part}"]) for part in ("image", "latent", "noise")
        )
        mean, logvar = jax.jit(lambda x: model.apply({"params": params}, x, method=Autoencoder.encode))(image)
        decoded = jax.jit(lambda x: model.apply({"params": params}, x, method=Autoencoder.decode))(latent)
        parts = {"mean": mean, "logvar": logvar, "decoded": decoded}
        parts["posterior_sample"] = posterior_sample(mean, logvar, noise)
        results |= {f"{size}/{part}": channels_first(value) for part, value in parts.items()}
    attention = SpatialAttention(config)
    resnet = ResidualBlock(config, config.block_channels[-1])
    for name, module, block in (
        ("attentions", attention, params["encoder"]["middle"]["attention"]),
        ("resnets", resnet, params["decoder"]["middle"]["resnet_0"]),
    ):
        faint = channels_last(fixture.inputs[f"faint/{name}"])
        results[f"faint/{name}"] = channels_first(module.apply({"params": block}, faint))
    return results
