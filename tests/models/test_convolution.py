"""Convolution, group norm and the steps between resolutions, against torch and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixelstory_jax.models.convolution import BOTTOM_RIGHT, Conv, Downsample, GroupNorm, Upsample

SHAPE = (2, 5, 6, 8)


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_params(module, x) -> dict:
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [drawn(leaf.shape, 1 + number) for number, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, None), (1, 1, None), (3, 2, ((1, 1), (1, 1))), (3, 2, BOTTOM_RIGHT), (5, 1, None)],
)
def test_convolution(kernel, stride, padding):
    torch = pytest.importorskip("torch")
    x, module = drawn(SHAPE), Conv(7, kernel, stride, padding)
    params = random_params(module, x)
    assert params["kernel"].shape == (kernel, kernel, 8, 7)
    (top, bottom), (left, right) = padding or ((kernel // 2,) * 2,) * 2
    padded = torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), (left, right, top, bottom))
    weight = torch.tensor(params["kernel"]).permute(3, 2, 0, 1)
    theirs = torch.nn.functional.conv2d(padded, weight, torch.tensor(params["bias"]), stride)
    ours = module.apply({"params": params}, x)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=5e-5)


def test_a_residual_branch_can_start_as_nothing():
    y, variables = Conv(4, zero_init=True).init_with_output(jax.random.key(0), drawn(SHAPE))
    assert not np.any(y) and set(variables["params"]) == {"kernel", "bias"}
    assert "bias" not in Conv(4, use_bias=False).init(jax.random.key(0), drawn(SHAPE))["params"]


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "faint"])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_group_norm(size, eps):
    """Faint inputs show the eps."""
    torch = pytest.importorskip("torch")
    x, module = size * (drawn(SHAPE) + 0.5), GroupNorm(4, eps)
    params = random_params(module, x)
    theirs = torch.nn.functional.group_norm(
        torch.tensor(x).permute(0, 3, 1, 2), 4, torch.tensor(params["scale"]), torch.tensor(params["bias"]), eps
    )
    np.testing.assert_allclose(module.apply({"params": params}, x), theirs.permute(0, 2, 3, 1), atol=5e-6)


def test_group_norm_of_panels_is_that_of_each():
    """Any number of leading axes; no statistics cross them."""
    x, module = drawn((2, 3, 4, 5, 8)), GroupNorm(2)
    params = random_params(module, x)
    together = module.apply({"params": params}, x)
    alone = module.apply({"params": params}, x[1, 2])
    np.testing.assert_allclose(together[1, 2], alone, atol=1e-6)


def test_group_norm_in_half_precision_computes_in_float32():
    """The mean is far above what float16 can subtract from, and the squares of it overflow."""
    x, module = (drawn(SHAPE) + 300).astype(np.float16), GroupNorm(2)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    y = module.apply({"params": params}, x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, module.apply({"params": params}, x.astype(np.float32)), atol=2e-3)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="8 channels do not split into 3 equal groups"):
        GroupNorm(3).init(jax.random.key(0), drawn(SHAPE))


def test_downsample_by_hand():
    """A kernel that copies its centre: with zeros below and on the right the centres are the odd pixels."""
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    params = {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
    symmetric = Downsample(1).apply({"params": params}, x)
    shifted = Downsample(1, BOTTOM_RIGHT).apply({"params": params}, x)
    np.testing.assert_array_equal(symmetric[0, :, :, 0], [[0, 2], [8, 10]])
    np.testing.assert_array_equal(shifted[0, :, :, 0], [[5, 7], [13, 15]])


def test_upsample_by_hand():
    x = np.array([[1.0, 2], [3, 4]], np.float32).reshape(1, 2, 2, 1)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    params = {"conv": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
    y = Upsample(1).apply({"params": params}, x)
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])
