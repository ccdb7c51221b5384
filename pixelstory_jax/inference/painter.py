"""From prompts to pictures: tokens, text states, the compiled denoising loop, and decoding.

G stories, A panels, H x W pixels, h x w latents, C latent channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from pixelstory_jax.data.clip_tokenizer import ClipTokenizer
from pixelstory_jax.data.sources import story_tokenizers
from pixelstory_jax.inference import schedulers
from pixelstory_jax.inference.diffusion import Denoised, TextStates, broadcast_text, denoise
from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.models.autoencoder import byte_pixels
from pixelstory_jax.models.consistent_attention import Sharing
from pixelstory_jax.models.partitioning import constrain
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.models.story_diffusion import Params, StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.models.unet import FreeU

_DECODED_AT_ONCE = 128 * 128  # latents of a device: one picture of SDXL, a hundred tiny ones
_BANK_AXES = (None, None, "data")  # steps, blocks, groups, ...: each half of guidance reads its own


@dataclass(frozen=True)
class PaintOptions:
    """How pictures are sampled.

    Attributes:
      steps: denoising steps. guidance: classifier-free guidance; 1 is none. guidance_rescale: arXiv 2305.08891, 3.4.
      guide_sharing: whether guidance counts sharing too: the half without captions then does not share.
      freeu: whether the first two up blocks are re-weighted, as the released apps always do.
      height, width: of a picture in pixels.
    """

    steps: int = 20
    guidance: float = 3.0
    guidance_rescale: float = 0.0
    guide_sharing: bool = False
    freeu: bool = False
    height: int = 96
    width: int = 96

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; at least 1 is needed.")


@dataclass(frozen=True)
class Memory:
    """Bytes that one compiled call takes: arguments (weights included), results, and what it needs in between.

    As the compiler plans it; what its libraries for CPUs take beside that for a moment is not known.
    """

    arguments: int
    results: int
    between: int

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.between

    @classmethod
    def of(cls, compiled: Any) -> Memory:
        analysis = compiled.memory_analysis()
        return cls(
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
            analysis.temp_size_in_bytes,
        )


def story_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """A mesh for painting stories: the two halves of guidance lie over `data`, panels over `fsdp`.

    So each device works on panels of one half, and needs the sampled tokens of that half only. None for one device; of
    an odd number the last one is left out.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < 2:
        return None
    shape = (2, len(devices) // 2)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[: 2 * shape[1]])


class Painter:
    """A model with its weights, tokenizers and sampler.

    Args:
      tokenizers: by encoder name.
      zero_negative: an absent negative prompt is zeros (SDXL) rather than the states of an empty text.
      mesh: of `story_mesh`, over which panels are spread where their number divides; weights are on every device.
        None: the mesh that is set, if any, with the weights as they are.
    """

    def __init__(
        self,
        model: StoryDiffusion,
        params: Params,
        tokenizers: Mapping[str, ClipTokenizer],
        sampler: schedulers.SamplerConfig,
        zero_negative: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self.model, self._own_mesh = model, mesh
        self.params = params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self.tokenizers, self.sampler, self.zero_negative = dict(tokenizers), sampler, zero_negative
        self._encode = jax.jit(model.encode_text)
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], params: Params, mesh: Mesh | None = None) -> Painter:
        """From the sections of a config of StoryDiffusion, and weights.

        Raises:
          ValueError: sections that do not fit together.
        """
        settings = ConfigDict(config)
        model = StoryDiffusion(sizes_from_config(StoryDiffusionConfig, settings.model))
        tokenizers = story_tokenizers(settings)
        for name, tokenizer in tokenizers.items():
            if tokenizer.vocab_size > settings.model[name].vocab:
                raise ValueError(
                    f"The tokenizer has {tokenizer.vocab_size} ids, model.{name}.vocab is {settings.model[name].vocab}."
                )
        sampler = schedulers.SamplerConfig(schedule=NoiseSchedule(**settings.schedule), **settings.sampler)
        return cls(model, params, tokenizers, sampler, settings.zero_negative, mesh)

    @property
    def mesh(self) -> Mesh | None:
        """The painter's own mesh, or else the one that is set (a trainer's, when it evaluates); None for one device."""
        mesh = self._own_mesh or jax.sharding.get_mesh()
        return mesh if mesh.size > 1 else None

    @property
    def panels_over(self) -> int:
        """Devices that panels are spread over; calls of a multiple of so many panels use them all."""
        return 1 if self.mesh is None else self.mesh.shape["fsdp"]

    def _sharding(self, *axes: str | None) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    def _placed(self, tree: Any, *axes: str | None) -> Any:
        """Arrays, or shapes in their place, on the mesh: whole, but for dimensions that lie over mesh axes."""
        sharding = self._sharding(*axes)
        if sharding is None:
            return tree

        def place(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return jax.device_put(leaf, sharding)

        return jax.tree.map(place, tree)

    def _compile(self, function: Any, arguments: tuple[Any, ...], out: Any) -> Any:
        """Compiled; with a mesh for that mesh, and results with the shardings `out`."""
        if self.mesh is None:
            return jax.jit(function).lower(*arguments).compile()
        with jax.sharding.set_mesh(self.mesh):
            return jax.jit(function, out_shardings=out).lower(*arguments).compile()

    def encode(self, prompts: Sequence[str], options: PaintOptions) -> TextStates:
        """Text states of prompts, [n, ...]."""
        tokens = {
            name: jnp.asarray(np.stack([tokenizer.encode(prompt) for prompt in prompts]))
            for name, tokenizer in self.tokenizers.items()
        }
        context, pooled = self._encode(self.params, tokens)
        if pooled is None:
            return TextStates(context)
        height, width = options.height, options.width
        ids = jnp.tile(jnp.array([height, width, 0, 0, height, width], jnp.float32), (len(prompts), 1))
        return TextStates(context, pooled, ids)

    def encode_negative(self, prompt: str | None, options: PaintOptions) -> TextStates:
        """Text states of one negative prompt, without leading axes; None for no negative prompt."""
        states = jax.tree.map(lambda x: x[0], self.encode([prompt or ""], options))
        if prompt is None and self.zero_negative:
            pooled = None if states.pooled is None else jnp.zeros_like(states.pooled)
            states = TextStates(jnp.zeros_like(states.context), pooled, states.time_ids)
        return states

    def noise(self, seeds: Sequence[int | tuple[int, ...]], options: PaintOptions) -> jax.Array:
        """Standard normal latents [n, h, w, C], each a function of its own seed on any machine."""
        shape = (
            *self.model.config.latent_size(options.height, options.width),
            self.model.config.unet.in_channels,
        )
        return jnp.asarray(np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds]))

    def paint(
        self,
        noise: jax.Array,
        positive: TextStates,
        negative: TextStates,
        options: PaintOptions,
        sharing: Sharing | None = None,
        with_trace: bool = False,
    ) -> Denoised:
        """Denoises stories.

        Args:
          noise: standard normal [G, A, h, w, C].
          positive: text states [G, A, ...]. negative: of one prompt, without leading axes.
          sharing: of `sharing.share_steps`; None for independent pictures.
        """
        call, arguments = self.compiled(noise, positive, negative, options, sharing, with_trace)
        return call(*arguments)

    def memory(
        self,
        noise: jax.Array,
        positive: TextStates,
        negative: TextStates,
        options: PaintOptions,
        sharing: Sharing | None = None,
    ) -> Memory:
        """What `paint` with these arguments will take, from the compiled program, before it runs."""
        return Memory.of(self.compiled(noise, positive, negative, options, sharing)[0])

    def compiled(
        self,
        noise: jax.Array,
        positive: TextStates,
        negative: TextStates,
        options: PaintOptions,
        sharing: Sharing | None = None,
        with_trace: bool = False,
    ) -> tuple[Any, tuple[Any, ...]]:
        """The compiled denoising loop and what it is called with. A bank may be given as shapes only."""
        freeu = FreeU() if options.freeu else None

        def run(
            params: Params, rows: Any, x: Any, positive: Any, negative: Any, guidance: Any, sharing: Any
        ) -> Denoised:
            return denoise(
                self.model.unet,
                params,
                rows,
                x,
                positive,
                broadcast_text(negative, *x.shape[:2]),
                guidance,
                sharing,
                freeu,
                options.guidance_rescale,
                options.guide_sharing,
                with_trace,
            )

        rows, init_sigma = schedulers.plan(self.sampler, options.steps)
        guidance = jnp.float32(options.guidance)
        if sharing is not None:
            bank = self._placed(sharing.bank, *_BANK_AXES)
            sharing = dataclasses.replace(self._placed(dataclasses.replace(sharing, bank=None)), bank=bank)
        others = self._placed((rows, noise * init_sigma, positive, negative, guidance))
        arguments = (self.params["unet"], *others, sharing)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        key = (structure, shapes, options.freeu, options.guidance_rescale, options.guide_sharing, with_trace)
        if key not in self._compiled:
            out = self._sharding(), self._sharding(*_BANK_AXES), self._sharding()
            self._compiled[key] = self._compile(run, arguments, Denoised._make(out))
        return self._compiled[key], arguments

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [n, h, w, C] to pictures [n, H, W, 3] in about [-1, 1], a few at a time to save memory."""
        size, call = self.compiled_decoder(latents)
        pieces = []
        for start in range(0, len(latents), size):
            piece = latents[start : start + size]
            filled = jnp.pad(piece, ((0, size - len(piece)), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
            pieces.append(call(self.params["autoencoder"], self._placed(filled))[: len(piece)])
        return jnp.concatenate(pieces)

    def compiled_decoder(self, latents: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, Any]:
        """How many of the latents [n, h, w, C] are decoded in one call, and the compiled call."""
        count, height, width, channels = latents.shape
        devices = 1 if self.mesh is None else self.mesh.size
        size = devices * min(-(-count // devices), max(1, _DECODED_AT_ONCE // (height * width)))
        shape = jax.ShapeDtypeStruct((size, height, width, channels), latents.dtype)
        if shape not in self._compiled:

            def run(autoencoder: Params, latents: jax.Array) -> jax.Array:
                return self.model.decode_latents({"autoencoder": autoencoder}, constrain(latents, "batch"))

            arguments = (self.params["autoencoder"], self._placed(shape))
            self._compiled[shape] = self._compile(run, arguments, self._sharding())
        return size, self._compiled[shape]

    def pictures(self, latents: jax.Array) -> np.ndarray:
        """Latents [n, h, w, C] to uint8 [n, H, W, 3]."""
        return np.asarray(byte_pixels(self.decode(latents)))
