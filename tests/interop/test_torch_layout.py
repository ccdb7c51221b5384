from __future__ import annotations

import jax
import numpy as np
import pytest

from pixelstory_jax.interop.safetensors_files import read_safetensors, write_safetensors
from pixelstory_jax.interop.tables import CLIP_VISION, CLIP_VISION_FEATURES, pixellm
from pixelstory_jax.interop.torch_layout import (
    LAYOUTS,
    Row,
    Table,
    WeightsError,
    read_torch_tensors,
    to_torch_tensors,
)
from pixelstory_jax.models.clip_vision import ClipVision, ClipVisionConfig
from pixelstory_jax.models.paths import flatten, unflatten
from tests.models.small import random_like, small_model

TABLE = Table(
    rows=(Row("norm.weight", "norm/scale"), Row("blocks.{n}.fc.weight", "layers/fc/kernel", "linear")),
    ignored=(r"blocks\.\d+\.inv_freq",),
    ours_only=(r"layers/.*/lora_[ab]",),
)
PARAMS = {
    "norm": {"scale": np.arange(3, dtype=np.float32)},
    "layers": {"fc": {"kernel": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "lora_a": np.zeros((2, 2, 1))}},
}
TENSORS = {
    "norm.weight": np.arange(3, dtype=np.float32),
    "blocks.0.fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "blocks.1.fc.weight": np.arange(6, 12, dtype=np.float32).reshape(2, 3).T,
}


def assert_equal_trees(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_layers_are_stacked_and_unstacked():
    written = to_torch_tensors(TABLE, PARAMS)
    assert_equal_trees(written, TENSORS)
    read = read_torch_tensors(TABLE, {**TENSORS, "blocks.0.inv_freq": np.zeros(4)}, PARAMS)
    assert "lora_a" not in read["layers"]["fc"]
    np.testing.assert_array_equal(read["layers"]["fc"]["kernel"], PARAMS["layers"]["fc"]["kernel"])


def test_all_that_does_not_fit_is_listed_at_once():
    tensors = {**TENSORS, "norm.weight": np.zeros(4), "blocks.2.fc.weight": np.zeros((3, 2)), "other": np.zeros(1)}
    del tensors["blocks.1.fc.weight"]
    with pytest.raises(WeightsError) as caught:
        read_torch_tensors(TABLE, tensors, PARAMS)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: blocks.1.fc.weight [3, 2]",
        "  mis-shaped: norm.weight is [4], expected [3]",
        "  unexpected: blocks.2.fc.weight [3, 2]",
        "  unexpected: other [1]",
    ]


def test_parameter_without_a_row_is_an_error():
    with pytest.raises(WeightsError, match="extra/bias"):
        to_torch_tensors(TABLE, {**PARAMS, "extra": {"bias": np.zeros(1)}})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_inverses(layout):
    shape = {"linear": (2, 3), "lead_linear": (2, 3), "conv": (2, 3, 4, 5), "deconv": (2, 3, 4, 5)}.get(layout, (1, 3))
    shape = {"pointwise": (2, 3, 1, 1), "lead": (3,)}.get(layout, shape)
    x = np.random.default_rng(0).random(shape)
    how = LAYOUTS[layout]
    np.testing.assert_array_equal(how.to_torch(how.to_ours(x)), x)
    assert how.torch_shape(how.to_ours(x).shape) == x.shape


@pytest.mark.parametrize("mode", ["paper", "faithful"])
def test_pixellm_round_trip(mode):
    _, params = small_model(mode=mode)
    table = pixellm(tower=True)
    tensors = to_torch_tensors(table, params)
    assert tensors["lm_head.weight"].shape == (50, 16)
    back = read_torch_tensors(table, tensors, params)
    fusion = ("token_weights", "scale_weights")
    assert_equal_trees(back, {name: value for name, value in params.items() if name not in fusion})


def test_a_shorter_tower_skips_the_later_layers():
    pixels = np.zeros((1, 16, 16, 3), np.float32)

    def shapes(layers, final):
        sizes = {"canvas": 16, "patch_size": 8, "width": 8, "heads": 2, "mlp_width": 8}
        model = ClipVision(ClipVisionConfig(layers=layers, has_final_norm=final, **sizes))
        return jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, None, (layers,)))["params"]

    whole = to_torch_tensors(CLIP_VISION, random_like(shapes(3, True)))
    short = read_torch_tensors(CLIP_VISION_FEATURES, whole, shapes(2, False))
    assert short["layers"]["mlp"]["up"]["kernel"].shape == (2, 8, 8)
    with pytest.raises(WeightsError, match="unexpected: vision_model.encoder.layers.2"):
        read_torch_tensors(CLIP_VISION, whole, shapes(2, True))


def test_flatten_and_unflatten():
    flat = flatten(PARAMS)
    assert set(flat) == {"norm/scale", "layers/fc/kernel", "layers/fc/lora_a"}
    assert_equal_trees(unflatten(flat), PARAMS)


def test_safetensors_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, {name: np.asfortranarray(value) for name, value in TENSORS.items()}, {"step": "7"})
    tensors, metadata = read_safetensors(path)
    assert_equal_trees(tensors, TENSORS)
    assert metadata == {"step": "7"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        read_safetensors(path)
    with pytest.raises(WeightsError, match="no such file"):
        read_safetensors(tmp_path / "absent.safetensors")
