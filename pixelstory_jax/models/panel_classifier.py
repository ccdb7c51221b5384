"""What a panel shows: a small convolutional network that tells character, pose and place of generated panels.

It is a measuring instrument, not part of StoryDiffusion. Where in the picture something is seen does not matter to it:
the last map is pooled over all positions. The mean tells the place, the maximum finds the character.

Letters: B panels, S side in pixels, h, w height and width of a map, C channels, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from pixelstory_jax.models.convolution import Conv, Downsample, GroupNorm
from pixelstory_jax.models.layers import Linear
from pixelstory_jax.models.sizes import check_sizes

FOLD = 2  # neighbouring pixels along each axis that become channels: 3 channels alone make a slow convolution


@dataclass(frozen=True)
class PanelClassifierConfig:
    """Sizes of a panel classifier.

    Attributes:
      characters, poses, places: number of classes of each head.
      channels: per level; the first works at half of the panel's side, each further one at half of the one before.
      features: F, the numbers that all heads read.
      groups: of the group norms; a divisor of every entry of `channels`.
    """

    characters: int
    poses: int
    places: int
    channels: tuple[int, ...] = (32, 48, 80)
    features: int = 64
    groups: int = 8

    def __post_init__(self) -> None:
        check_sizes(self, "characters", "poses", "places", "features", "groups")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels is {self.channels}; at least one level of at least 1 is needed.")
        uneven = [channels for channels in self.channels if channels % self.groups]
        if uneven:
            raise ValueError(f"channels {uneven} are not multiples of groups {self.groups}.")

    @property
    def reduction(self) -> int:
        """Pixels along the side of one position of the last map."""
        return FOLD * 2 ** (len(self.channels) - 1)


class PanelReading(NamedTuple):
    """Logits [B, classes] of the three heads, and the features [B, F] that they read; float32."""

    character: jax.Array
    pose: jax.Array
    place: jax.Array
    features: jax.Array


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, h, w, C] to the same."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x
        for number in (1, 2):
            hidden = jax.nn.silu(GroupNorm(self.groups, name=f"norm_{number}")(hidden))
            hidden = Conv(x.shape[-1], name=f"conv_{number}")(hidden)
        return x + hidden


class PanelClassifier(nn.Module):
    """Panels [B, S, S, 3] in [-1, 1] (`signed_pixels` of the autoencoder) to a `PanelReading`."""

    config: PanelClassifierConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> PanelReading:
        """Raises ValueError where the sides are not multiples of `config.reduction` or there are not three channels."""
        config = self.config
        side = config.reduction
        if images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] % side or images.shape[2] % side:
            raise ValueError(
                f"Panels of shape {images.shape}; expected [B, S, S, 3] with sides in multiples of {side}."
            )
        x = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=FOLD, q=FOLD)
        x = Conv(config.channels[0], name="conv_in")(x)
        for level, channels in enumerate(config.channels):
            if level:
                x = Downsample(channels, name=f"level_{level}_downsample")(x)
            x = ResidualBlock(config.groups, name=f"level_{level}_resnet")(x)
        x = jax.nn.silu(GroupNorm(config.groups, name="norm_out")(x))
        pooled: Any = [reduce(x, "b h w c -> b c", how) for how in ("mean", "max")]
        features = jax.nn.silu(Linear(config.features, name="features")(jnp.concatenate(pooled, axis=-1)))
        classes = {"character": config.characters, "pose": config.poses, "place": config.places}
        logits = {head: Linear(count, name=head)(features) for head, count in classes.items()}
        return PanelReading(**logits, features=features)
