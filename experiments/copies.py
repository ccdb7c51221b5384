"""Copies of a trained PixelLM on the devices of this process, each of which answers questions of its own."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pixelstory_jax.data.conversations import Turn
from pixelstory_jax.evaluation.benchmark_records import Answerer
from pixelstory_jax.inference.answers import RawAnswer
from pixelstory_jax.inference.segmenter import Segmenter, TokensOf, TrainedModel, target_tokens
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.objectives.pixellm import SHARDING_RULES
from pixelstory_jax.training.sharding import build_mesh, partition


def copies_on_devices(trained: TrainedModel, max_new_tokens: int, devices_per_copy: int) -> list[Answerer]:
    """One copy for every `devices_per_copy` local devices.

    On one device each, all copies give the same answers to the bit. Over several devices the parameters of a copy are
    cut up, and sums are taken in another order.

    Raises:
      ValueError: the local devices cannot be divided so.
    """
    devices = jax.local_devices()
    if devices_per_copy < 1 or len(devices) % devices_per_copy:
        raise ValueError(f"--devices_per_copy={devices_per_copy} does not divide the {len(devices)} local devices.")
    groups = [devices[start : start + devices_per_copy] for start in range(0, len(devices), devices_per_copy)]
    return [_copy(trained, max_new_tokens, group) for group in groups]


def _copy(trained: TrainedModel, max_new_tokens: int, devices: Sequence[jax.Device]) -> Answerer:
    style = trained.settings.data.style
    if len(devices) == 1:
        params = jax.device_put(dict(trained.params), devices[0])
        return Segmenter(trained.config, params, trained.tokenizer, style, max_new_tokens)
    mesh = build_mesh({"fsdp": -1}, devices)
    placed = {
        path: jax.device_put(array, NamedSharding(mesh, partition(path, array.shape, SHARDING_RULES, mesh)))
        for path, array in flatten(trained.params).items()
    }
    segmenter = Segmenter(trained.config, unflatten(placed), trained.tokenizer, style, max_new_tokens)
    return _OverDevices(segmenter, mesh)


class _OverDevices:
    """A segmenter whose parameters lie on a mesh, which is put in force in whatever thread it answers."""

    def __init__(self, segmenter: Segmenter, mesh: Mesh) -> None:
        self.segmenter, self.mesh = segmenter, mesh

    def fits(self, conversation: Sequence[Turn]) -> bool:
        return self.segmenter.fits(conversation)

    def ask_raw(
        self,
        images: Sequence[np.ndarray],
        conversations: Sequence[Sequence[Turn]],
        tokens_of: TokensOf = target_tokens,
    ) -> list[RawAnswer]:
        with jax.sharding.set_mesh(self.mesh):
            return self.segmenter.ask_raw(images, conversations, tokens_of)

    def point_raw(self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]]) -> list[RawAnswer]:
        with jax.sharding.set_mesh(self.mesh):
            return self.segmenter.point_raw(images, conversations)
