"""The parts that convolutional networks share: convolution, group norm, and the steps between resolutions.

Letters: B batch (any leading axes for the norm), H, W height and width, C, D channels, G groups.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from pixelstory_jax.models.layers import kernel_init
from pixelstory_jax.models.partitioning import constrain

Padding = tuple[tuple[int, int], tuple[int, int]]
SYMMETRIC: Padding = ((1, 1), (1, 1))
BOTTOM_RIGHT: Padding = ((0, 1), (0, 1))


class Conv(nn.Module):
    """A square convolution: [B, H, W, C] to [B, H', W', D], kernel [k, k, C, D].

    Attributes:
      features: channels of the result.
      kernel: side of the kernel in pixels.
      stride: step in pixels, the same along both axes.
      padding: zeros ((top, bottom), (left, right)); None for (kernel - 1) / 2 on every side, which keeps the size of
        an odd kernel at stride 1.
      use_bias: whether there is a bias.
      dtype: compute dtype; parameters are float32.
      zero_init: the kernel starts at zero, so that a residual branch starts as nothing.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    padding: Padding | None = None
    use_bias: bool = True
    dtype: Any = jnp.float32
    zero_init: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.zero_init else kernel_init
        kernel = self.param("kernel", init, (self.kernel, self.kernel, x.shape[-1], self.features))
        half = (self.kernel - 1) // 2
        # A kernel that lies in parts on many chips is gathered, in the compute dtype: it is far smaller than the
        # pictures, which the compiler would send around in its place.
        gathered = constrain(kernel.astype(self.dtype), None, None, None, "tensor")
        y = jax.lax.conv_general_dilated(
            constrain(x.astype(self.dtype), "batch"),
            gathered,
            window_strides=(self.stride, self.stride),
            padding=self.padding or ((half, half), (half, half)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class GroupNorm(nn.Module):
    """Normalisation over height, width and the channels of a group, with scale and bias per channel, in float32.

    The input is [..., H, W, C]; the result has its shape and dtype.

    Attributes:
      groups: a divisor of C; a group is C / groups neighbouring channels.
      eps: added to the variance.
    """

    groups: int = 32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not split into {self.groups} equal groups.")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(jnp.float32)
        wide = wide - self._group_mean(wide)
        spread = self._group_mean(jnp.square(wide))
        return (wide * (jax.lax.rsqrt(spread + self.eps) * scale) + bias).astype(x.dtype)

    def _group_mean(self, x: jax.Array) -> jax.Array:
        """Means over H, W and the channels of a group, [..., H, W, C] to [..., 1, 1, C].

        The mean over the positions comes first: that way no large array is split by groups, which takes a CPU four
        times as long.
        """
        grouped = rearrange(x.mean((-3, -2), keepdims=True), "... (g c) -> ... g c", g=self.groups)
        means = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
        return rearrange(means, "... g c -> ... (g c)")


class Downsample(nn.Module):
    """Half the height and width by a convolution of stride 2.

    Attributes:
      padding: SYMMETRIC (the UNet's) or BOTTOM_RIGHT (the autoencoder's; symmetric zeros shift the picture).
    """

    features: int
    padding: Padding = SYMMETRIC
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Conv(self.features, stride=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Twice the height and width, every pixel repeated, then a convolution.

    `size` is (height, width) of the result where the smaller grid came from an odd one: the nearest pixel is taken.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        height, width = x.shape[-3:-1]
        if size is None or size == (2 * height, 2 * width):
            x = jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
        else:
            rows, columns = (np.arange(new) * old // new for new, old in zip(size, (height, width), strict=True))
            x = jnp.take(jnp.take(x, rows, axis=-3), columns, axis=-2)
        return Conv(self.features, dtype=self.dtype, name="conv")(x)
