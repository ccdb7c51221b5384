"""The small parts that every network shares: linear maps (with LoRA), norms, remat policies, torch's initialisers."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixelstory_jax.models.partitioning import target_device
from pixelstory_jax.models.splash_attention import ATTENTION


def _no_wider(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A matrix product with weights whose result is no wider than its input."""
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)
    return bool(is_product and arguments[1].shape[-1] <= arguments[0].shape[-1])


# What a layer keeps of its forward pass; the rest is computed a second time in the backward pass. In brackets, for
# LLaMA 7B at 1,000 tokens: bytes a token and layer in bfloat16, and forward operations that are done twice.
_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION)
_either = jax.checkpoint_policies.save_from_both_policies
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    # Its input alone (8 kB, 100 %): the least memory, and a third more operations than there need be.
    "full": jax.checkpoint_policies.nothing_saveable,
    # And results of attention (16 kB, 98 %). Of a layer of SDXL with 4,096 tokens they are 41 % of the operations.
    "attention": _attention,
    # And products no wider than their input, which spares all but the MLP's first (57 kB, 44 %).
    "narrow": _either(_no_wider, _attention),
    # And all other products with weights (101 kB, 0 %); norms and activations are cheap.
    "dots": _either(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _attention),
}
REMATS = ("none", *REMAT_POLICIES)

Initializer = Callable[..., jax.Array]
embedding_init = nn.initializers.normal(0.02)
kernel_init = nn.initializers.lecun_normal()


def torch_uniform(fan_in: int) -> Initializer:
    """Torch's default for linear and convolution weights and biases: uniform within 1 / sqrt(fan_in)."""

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return init


_REMATERIALISE = contextvars.ContextVar("rematerialise", default=True)


@contextlib.contextmanager
def without_rematerialisation() -> Iterator[None]:
    """What is traced within recomputes nothing in its backward pass, whatever the sizes say: for counting work."""
    token = _REMATERIALISE.set(False)
    try:
        yield
    finally:
        _REMATERIALISE.reset(token)


def rematerialised(method: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`method` as it is ("none"), or recomputed in the backward pass but for what one of `REMAT_POLICIES` keeps."""
    if remat == "none" or not _REMATERIALISE.get():
        return method
    return nn.remat(method, policy=REMAT_POLICIES[remat], prevent_cse=False)


def times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, [..., D] by [D, F] of one dtype, summed in float32.

    On a CPU a product of bfloat16 is asked for in float32 and rounded afterwards, which is what an accelerator does by
    itself: for a result in bfloat16, XLA would turn the operands into float32 first, kernels of all layers included.
    """
    return _bfloat16_times(x, kernel) if x.dtype == jnp.bfloat16 and target_device() == "cpu" else x @ kernel


def wide_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel as `times`, but the result stays in float32."""
    if x.size == x.shape[-1] and x.dtype == jnp.bfloat16 and target_device() == "cpu":
        # For two rows of bfloat16 XLA has a fast product; for one it takes three times as long as for two.
        two = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
        return wide_times(two, kernel)[:1].reshape(*x.shape[:-1], -1)
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _rounded_product(first: jax.Array, second: jax.Array) -> jax.Array:
    return wide_times(first, second).astype(first.dtype)


@jax.custom_vjp
def _bfloat16_times(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _rounded_product(x, kernel)


def _bfloat16_times_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_product(x, kernel), (x, kernel)


def _bfloat16_times_backward(kept: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both products in bfloat16 too: differentiated, the forward one would hand on gradients in float32."""
    x, kernel = kept
    rows = x.reshape(-1, x.shape[-1])
    return _rounded_product(d_y, kernel.T), _rounded_product(rows.T, d_y.reshape(-1, d_y.shape[-1]))


_bfloat16_times.defvjp(_bfloat16_times_forward, _bfloat16_times_backward)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution's cumulative function, written with erf as in PyTorch.

    JAX writes it with erfc, which keeps more digits of results below 1e-5 and takes three times as long on a CPU.
    """
    wide = x.astype(jnp.float32)  # a bfloat16 loses most of 1 + erf where erf is near -1
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class Linear(nn.Module):
    """y = x W + b, with an optional low-rank addition (LoRA, arXiv 2106.09685): + (alpha / rank) (drop(x) A) B.

    Attributes:
      features: width of the result.
      use_bias: whether there is a bias.
      dtype: compute dtype; parameters are float32.
      torch_init: weight and bias by torch's default rather than variance 1 / fan_in and zero.
      lora_rank: 0 for none. A starts by torch's kaiming uniform, B at zero.
      lora_alpha: scale of the addition times the rank.
      lora_dropout: share of the inputs of A that is dropped when a key is given.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    torch_init: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_rng: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        init = torch_uniform(width) if self.torch_init else kernel_init
        kernel = self.param("kernel", init, (width, self.features))
        x = x.astype(self.dtype)
        y = times(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias_init = torch_uniform(width) if self.torch_init else nn.initializers.zeros
            y = y + self.param("bias", bias_init, (self.features,)).astype(self.dtype)
        if self.lora_rank:
            lora_a = self.param("lora_a", torch_uniform(width), (width, self.lora_rank))
            lora_b = self.param("lora_b", nn.initializers.zeros, (self.lora_rank, self.features))
            if dropout_rng is not None and self.lora_dropout > 0:
                keep = jax.random.bernoulli(dropout_rng, 1 - self.lora_dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora_dropout), 0)
            scale = self.lora_alpha / self.lora_rank
            y = y + times(times(x, lora_a.astype(self.dtype)), lora_b.astype(self.dtype)) * scale
        return y


class LayerNorm(nn.Module):
    """Normalisation over the last axis with scale and bias, in float32; the result has the dtype of the input."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32; the result has the dtype of the input."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)
