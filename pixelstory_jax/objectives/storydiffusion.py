"""Diffusion training on stories: noise prediction for all panels of a story, which share self-attention now and then.

The paper's method needs no training. Networks that are trained here (from scratch or fine-tuned) see stories with and
without sharing, so that they can do both: a story shares with probability `share`, and then its panels see a random
number of anchors, which covers joint generation, banks and replay.

B stories, A panels of a story, T text tokens, S picture side, h x w latents, C latent channels, N tokens at a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec

from pixelstory_jax.inference.noise_schedule import NoiseSchedule, add_noise, snr, training_target
from pixelstory_jax.models.consistent_attention import Sample, Sharing
from pixelstory_jax.models.sizes import check_choice
from pixelstory_jax.models.story_diffusion import StoryDiffusion, StoryDiffusionConfig
from pixelstory_jax.objectives.objective import Batch, Evaluation, Params

TRAINED_UNETS = ("full", "lora")
SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"/blocks/.*(query|key|value|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"/blocks/.*(out|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"text(_2)?/layers/.*(query|key|value|up)/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"text(_2)?/layers/.*(out|down)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"token_embedding$", PartitionSpec("fsdp", None)),
    # Kernels [k, k, in, out] that are cut along `in` as well get wrong gradients from XLA on a mesh of both axes.
    (r"(conv[^/]*|shortcut)/kernel$", PartitionSpec(None, None, None, ("fsdp", "tensor"))),
    (r"kernel$", PartitionSpec("fsdp", "tensor")),
    (r".*", PartitionSpec()),
)


@dataclass(frozen=True)
class DiffusionLoss:
    """What the loss is made of.

    Attributes:
      min_snr: upper bound of the signal-to-noise weight (min-SNR, arXiv 2303.09556, gamma); 0 for the plain loss.
      drop_caption: share of stories that are trained with empty captions, for classifier-free guidance.
      share: share of stories whose panels see each other.
      rate: share of an anchor's tokens that is seen.
      time_spread, time_mean: times are drawn from a logit-normal of these moments (arXiv 2403.03206, section 3.1), on a
        scale from 0 (clean) to 1 (noise); spread 0 for evenly distributed times.
      mixed: share of stories whose panels have times of their own (diffusion forcing, arXiv 2407.01392); the panels of
        the others have one time, as in sampling. A panel that sees a clearer one learns sooner what it is good for.
    """

    min_snr: float = 5.0
    drop_caption: float = 0.1
    share: float = 0.5
    rate: float = 0.5
    time_spread: float = 0.0
    time_mean: float = 0.0
    mixed: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_caption", "share", "rate", "mixed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; a share lies between 0 and 1.")
        if self.time_spread < 0:
            raise ValueError(f"loss.time_spread is {self.time_spread}; 0 (even) or a positive number is needed.")
        if self.min_snr < 0:
            raise ValueError(f"loss.min_snr is {self.min_snr}; 0 (off) or a positive number is needed.")


def snr_weights(schedule: NoiseSchedule, table: jax.Array | np.ndarray, t: jax.Array, bound: float) -> jax.Array:
    """Min-SNR weight of each step, of the shape of t: min(snr, bound) as a loss on x0, for this prediction type."""
    if not bound:
        return jnp.ones(t.shape)
    ratio = snr(table, t)
    weight = jnp.minimum(ratio, bound)
    if schedule.prediction == "epsilon":
        return weight / jnp.maximum(ratio, 1e-8)
    return weight / (ratio + 1) if schedule.prediction == "v_prediction" else weight


def draw_times(rng: jax.Array, stories: int, panels: int, steps: int, options: DiffusionLoss) -> jax.Array:
    """Times int32 [B, A] in [0, steps), see `DiffusionLoss`.

    Those of B stories, and those of all panels where they are mixed, are one from each of equally likely ranges, which
    makes the loss less noisy.
    """

    def spread_out(rng: jax.Array, count: int) -> jax.Array:
        times = (jax.random.uniform(rng) + jnp.arange(count) / count) % 1.0
        if options.time_spread:
            times = jax.nn.sigmoid(options.time_mean + options.time_spread * jax.scipy.special.ndtri(times))
        return jnp.minimum((times * steps).astype(jnp.int32), steps - 1)

    times = jnp.broadcast_to(spread_out(rng, stories)[:, None], (stories, panels))
    panel_rng, order_rng, choice_rng = jax.random.split(jax.random.fold_in(rng, 1), 3)
    own = jax.random.permutation(order_rng, spread_out(panel_rng, stories * panels)).reshape(stories, panels)
    return jnp.where(jax.random.bernoulli(choice_rng, options.mixed, (stories, 1)), own, times)


def random_sharing(
    rng: jax.Array, stories: int, panels: int, grids: tuple[int, ...], share: float, rate: float
) -> Sharing:
    """Sharing of a training batch: which stories share, how many panels are anchors, which tokens are seen."""
    switch_rng, anchor_rng, token_rng = jax.random.split(rng, 3)
    shares = jax.random.bernoulli(switch_rng, share, (stories, 1, 1))
    anchors = jax.random.randint(anchor_rng, (stories, 1, 1), 1, panels + 1)
    sees = shares & (jnp.arange(panels) < anchors) & ~jnp.eye(panels, dtype=bool)  # [B, A, A]
    samples = {}
    for number, grid in enumerate(grids):
        count = max(1, round(rate * grid))
        draws = jax.random.uniform(jax.random.fold_in(token_rng, number), (panels, grid))
        index = jnp.argsort(draws, axis=-1)[:, :count].astype(jnp.int32)
        samples[grid] = Sample(jnp.full(index.shape, rate > 0), index)
    return Sharing(sees, samples)


class StoryDiffusionObjective:
    """Trains the U-Net (and the text encoder of a model made from scratch) of StoryDiffusion.

    A batch has "tokens" (and "tokens_2" for SDXL) int32 [B, A, T] and "images" uint8 [B, A, S, S, 3]; or, where they
    were computed before, "latents" [B, A, h, w, C] with "context" [B, A, T, D] (and "pooled" [B, A, P]).
    """

    name = "storydiffusion"
    sharding_rules = SHARDING_RULES
    next_command = "python -m experiments.story --checkpoint={workdir} --story=examples/moon.txt"

    def __init__(
        self,
        config: StoryDiffusionConfig,
        schedule: NoiseSchedule,
        loss: DiffusionLoss,
        batch_spec: Mapping[str, jax.ShapeDtypeStruct],
        empty: Mapping[str, np.ndarray],
        picture_size: int,
        train_text: bool,
        train_unet: str,
        evaluator: Callable[[Params, int], Evaluation],
        start: Callable[[], Mapping[str, Any]] = dict,
        description: str = "",
        zero_empty: bool = False,
    ) -> None:
        """Args:

        empty: what stands for no caption: ids by encoder name [T], or "context" [T, D] (and "pooled" [P]).
        picture_size: side of a panel in pixels, for time ids and the latent grid.
        train_unet: "full" or "lora".
        zero_empty: whether states of zeros stand for no caption instead (SDXL, as its sampling does).
        """
        self.config, self.schedule, self.options = config, schedule, loss
        self.model = StoryDiffusion(config)
        self.batch_spec = dict(batch_spec)
        self.empty = {name: np.asarray(value) for name, value in empty.items()}
        self.picture_size = picture_size
        self.latent_size = config.latent_size(picture_size, picture_size)
        self.train_text, self.train_unet = train_text, train_unet
        check_choice(self, "train_unet", TRAINED_UNETS)
        self.evaluator, self.start, self.description = evaluator, start, description
        self.zero_empty = zero_empty
        self.table = schedule.alphas_cumprod()

    def init(self, rng: jax.Array) -> Params:
        return self.model.init(rng)

    def starting_weights(self) -> Mapping[str, Any]:
        return self.start()

    def trainable(self, path: str) -> bool:
        part = path.split("/")[0]
        if part == "unet":
            return self.train_unet == "full" or path.endswith(("/lora_a", "/lora_b"))
        return part.startswith("text") and self.train_text

    def latents(self, params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """Clean scaled latents [B, A, h, w, C] of a batch."""
        if "latents" in batch:
            return batch["latents"].astype(jnp.float32)
        stories, panels = batch["images"].shape[:2]
        images = rearrange(batch["images"], "b a h w c -> (b a) h w c")
        noise = jax.random.normal(rng, (len(images), *self.latent_size, self.config.unet.in_channels))
        latents = jax.lax.stop_gradient(self.model.encode_images(params, images, noise))
        return rearrange(latents, "(b a) h w c -> b a h w c", a=panels)

    def text(self, params: Params, batch: Batch, dropped: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Context [B * A, T, D] and pooled vector; captions of stories that are `dropped` (bool [B]) are empty."""
        context, pooled = self._states(params, batch, dropped)
        if self.zero_empty:
            kept = jnp.repeat(~dropped, len(context) // len(dropped))[:, None]
            context = context * kept[..., None]
            pooled = None if pooled is None else pooled * kept
        return context, pooled

    def _states(self, params: Params, batch: Batch, dropped: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """`text`, with the states of the empty caption for stories that are dropped."""

        def with_empty(values: jax.Array, empty: np.ndarray) -> jax.Array:
            values = jnp.where(dropped.reshape(-1, *(1,) * (values.ndim - 1)), empty.astype(values.dtype), values)
            return rearrange(values, "b a ... -> (b a) ...")

        if "context" in batch:
            pooled = with_empty(batch["pooled"], self.empty["pooled"]) if "pooled" in batch else None
            return with_empty(batch["context"], self.empty["context"]), pooled
        fields = {"text": "tokens", "text_2": "tokens_2"}
        tokens = {name: with_empty(batch[fields[name]], self.empty[name]) for name in self.model.encoders}
        context, pooled = self.model.encode_text(params, tokens)
        if not self.train_text:
            context, pooled = jax.lax.stop_gradient((context, pooled))
        return context, pooled

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = dict(zip(("encode", "time", "noise", "drop", "share"), jax.random.split(rng, 5), strict=True))
        clean = self.latents(params, batch, keys["encode"])
        stories, panels = clean.shape[:2]
        dropped = jax.random.bernoulli(keys["drop"], self.options.drop_caption, (stories,))
        context, pooled = self.text(params, batch, dropped)
        added = None
        if pooled is not None:
            side = self.picture_size
            ids = jnp.broadcast_to(jnp.array([side, side, 0, 0, side, side], jnp.float32), (len(pooled), 6))
            added = {"pooled": pooled, "time_ids": ids}

        times = draw_times(keys["time"], stories, panels, self.schedule.train_steps, self.options)
        noise = jax.random.normal(keys["noise"], clean.shape)
        noisy = add_noise(self.table, clean, noise, times)
        target = training_target(self.schedule.prediction, self.table, clean, noise, times)
        grids = self.config.unet.sharing_grids(*self.latent_size)
        sharing = random_sharing(keys["share"], stories, panels, grids, self.options.share, self.options.rate)
        output, _ = self.model.unet.apply(
            {"params": params["unet"]},
            rearrange(noisy, "b a h w c -> (b a) h w c"),
            times.reshape(-1),
            context,
            added,
            sharing,
        )
        error = jnp.square(rearrange(output, "(b a) h w c -> b a h w c", a=panels) - target).mean((2, 3, 4))
        weights = snr_weights(self.schedule, self.table, times, self.options.min_snr)
        weighted, error = (error * weights).mean(), error.mean(1)
        shares = sharing.sees.any((1, 2))
        terms = {
            "error": error.mean(),
            "error_alone": (error * ~shares).sum() / jnp.maximum((~shares).sum(), 1),
            "error_shared": (error * shares).sum() / jnp.maximum(shares.sum(), 1),
        }
        return weighted, terms

    def evaluate(self, params: Params, step: int) -> Evaluation:
        return self.evaluator(params, step)

    @property
    def contents(self) -> dict[str, int]:
        return {"images": next(iter(self.batch_spec.values())).shape[1]}  # the panels of a story

    def describe(self) -> str:
        return self.description
