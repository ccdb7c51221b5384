"""Stories whose pictures become latents once, in memory: for a tiny autoencoder and stories that are drawn, not read.

A story is drawn and encoded when it is first asked for; later epochs cost nothing. Large autoencoders and text encoders
have a cache on disk instead (`cached_stories`).

A panels of a story, S picture side, h x w latents, C latent channels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixelstory_jax.data.pipeline import Source
from pixelstory_jax.models.autoencoder import Autoencoder, AutoencoderConfig, scale_latents, signed_pixels


class EncodedStories:
    """The first `count` stories of a source, over and over, with latents in place of pictures.

    An example has ``latents`` float16 [A, h, w, C], a draw from the autoencoder's distribution that is fixed by (seed,
    index), and the other fields of the source. The autoencoder runs on the host's CPU, out of the way of accelerators.

    Args:
      source: of examples with "images" uint8 [A, S, S, 3].
      config, params: of the autoencoder.
      count: how many stories; four bytes of memory are taken by each number of their latents.
      seed: of the draws, non-negative.

    Raises:
      ValueError: a count or a seed out of range.
    """

    def __init__(self, source: Source, config: AutoencoderConfig, params: Any, count: int, seed: int) -> None:
        if not 1 <= count <= len(source) or seed < 0:
            raise ValueError(f"{count} stories of {len(source)} cannot be encoded with seed {seed}.")
        self.source, self.count, self.seed = source, count, seed
        model, self._cpu = Autoencoder(config), jax.local_devices(backend="cpu")[0]
        self._params = jax.device_put(params, self._cpu)
        self._kept: dict[int, dict[str, np.ndarray]] = {}

        def moments(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            encoded: Any = model.apply({"params": params}, signed_pixels(images), method=Autoencoder.encode)
            mean, logvar = encoded
            return scale_latents(mean, config), scale_latents(jnp.exp(0.5 * logvar), config)

        self._moments = jax.jit(moments)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"story {index} does not exist, there are {len(self)}")
        story = index % self.count
        if story not in self._kept:
            self._kept[story] = self._encode(story)  # threads that meet here write the same
        kept = dict(self._kept[story])
        mean, std = (kept.pop(name).astype(np.float32) for name in ("mean", "std"))
        noise = np.random.default_rng((self.seed, index)).standard_normal(mean.shape, np.float32)
        return {"latents": (mean + std * noise).astype(np.float16), **kept}

    def _encode(self, story: int) -> dict[str, np.ndarray]:
        example = dict(self.source[story])
        mean, std = self._moments(self._params, jax.device_put(example.pop("images"), self._cpu))
        return {"mean": np.asarray(mean, np.float16), "std": np.asarray(std, np.float16), **example}
