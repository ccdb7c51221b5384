"""Folders of weights that are written one parameter at a time: files, dtypes, shared tensors, what is refused."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pixelstory_jax.interop import torch_layout
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import LazyArray, WeightsError
from pixelstory_jax.interop.torch_folder import TorchPart, TorchWriter
from pixelstory_jax.interop.torch_layout import Row, Table

TOWER = Table(
    (
        Row("blocks.{n}.fc.weight", "layers/kernel", "linear"),
        Row("norm.scale", "norm/scale"),
        Row("temperature", "temperature"),
        Row("seen", "seen"),
    ),
    ours_only=(r".*/lora_[ab]",),
)
LANGUAGE = Table((Row("embed.weight", "embedding"), Row("embed.weight", "head/kernel", "linear")))
PARTS = (TorchPart("", "model", LANGUAGE), TorchPart("tower", "diffusion_pytorch_model", TOWER, "tower/"))
RNG = np.random.default_rng(0)
EMBEDDING = RNG.standard_normal((5, 2)).astype(np.float32)
PARAMS: dict[str, Any] = {
    "tower/layers/kernel": RNG.standard_normal((3, 2, 4)).astype(np.float32),
    "tower/norm/scale": RNG.standard_normal(2).astype(np.float32),
    "tower/temperature": np.float32(4.5)[...],
    "tower/seen": np.int64(7)[...],
    "tower/layers/lora_a": np.zeros((3, 2, 1), np.float32),
    "embedding": EMBEDDING,
    "head/kernel": EMBEDDING.T,
}


def write_all(folder, params=PARAMS, announced=PARAMS, parts=PARTS, **options) -> None:
    with TorchWriter(folder, parts, announced, **options) as writer:
        for path, value in params.items():
            writer.write(path, value)


def read(folder) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in open_tensors(folder).items()}


@pytest.mark.parametrize("shard", [1, 50, 10**9])
def test_every_tensor_is_in_its_file(tmp_path, shard):
    """In the dtypes of the parameters, whatever the order and the size of shards."""
    write_all(tmp_path, dict(reversed(PARAMS.items())), max_shard_size=shard)
    assert (tmp_path / "tower" / "diffusion_pytorch_model.safetensors.index.json").exists() == (shard < 10**9)
    tower = read(tmp_path / "tower")
    assert tower.keys() == {*(f"blocks.{n}.fc.weight" for n in range(3)), "norm.scale", "temperature", "seen"}
    for number in range(3):
        np.testing.assert_array_equal(tower[f"blocks.{number}.fc.weight"], PARAMS["tower/layers/kernel"][number].T)
    assert (tower["temperature"].shape, tower["temperature"], tower["seen"]) == ((), 4.5, 7)
    language = read(tmp_path)
    assert language.keys() == {"embed.weight"}
    np.testing.assert_array_equal(language["embed.weight"], EMBEDDING)


def test_dtypes_by_name(tmp_path):
    """Some tensors of a bfloat16 file stay float32, and integers stay integers."""
    write_all(tmp_path, dtypes=lambda key: None if "norm" in key else ml_dtypes.bfloat16)
    tower = read(tmp_path / "tower")
    kinds = {name: str(value.dtype) for name, value in tower.items() if "blocks.1" not in name and ".2" not in name}
    assert kinds == {
        "blocks.0.fc.weight": "bfloat16",
        "norm.scale": "float32",
        "temperature": "bfloat16",
        "seen": "int64",
    }
    expected = PARAMS["tower/layers/kernel"][2].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tower["blocks.2.fc.weight"], expected)


def test_arrays_of_jax_and_lazy_ones(tmp_path, monkeypatch):
    """A stack is read in pieces of bounded size."""
    monkeypatch.setattr(torch_layout, "READ_AT_ONCE", 64)  # two layers
    kernel, asked = PARAMS["tower/layers/kernel"], []

    def part(index):
        asked.append(index[0])
        return kernel[index]

    lazy = LazyArray(kernel.shape, kernel.dtype, part)
    params = {**PARAMS, "tower/layers/kernel": lazy, "embedding": jnp.asarray(EMBEDDING)}
    write_all(tmp_path / "lazy", params, params)
    write_all(tmp_path / "plain")
    assert asked == [slice(0, 2), slice(2, 4)]
    for file in ("model.safetensors", "tower/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "lazy" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_progress(tmp_path):
    done = []
    writer = TorchWriter(tmp_path, PARTS, PARAMS, lambda key: np.float16, progress=lambda *tensor: done.append(tensor))
    with writer:
        for path, value in PARAMS.items():
            writer.write(path, value)
    assert [key for key, _ in done].count("embed.weight") == 1 and len(done) == 7
    assert sum(size for _, size in done) == writer.size == 2 * (24 + 2 + 1 + 10) + 8


def changed(path: str, value: Any) -> dict[str, Any]:
    return {**PARAMS, path: value}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (changed("head/kernel", -EMBEDDING.T), "head/kernel and another parameter are one tensor .*embed.weight, but"),
        ({path: PARAMS[path] for path in PARAMS if path != "tower/seen"}, "never written:\n  tower/seen$"),
        ({path: PARAMS[path] for path in PARAMS if path != "head/kernel"}, "never written:\n  head/kernel$"),
        (changed("tower/other", EMBEDDING), "tower/other was not announced"),
        (changed("tower/norm/scale", np.zeros(3, np.float32)), r"norm.scale is float32\[3\], not what was announced"),
        (changed("tower/layers/kernel", np.zeros((4, 2, 4), np.float32)), r"shape \[4, 2, 4\], which was not"),
        (changed("tower/norm/scale", np.full(2, 1e6, np.float32)), "norm.scale has numbers up to 1e.06, which float16"),
    ],
)
def test_what_is_refused(tmp_path, params, message):
    half = (lambda key: np.float16) if "float16" in message else None
    with pytest.raises(WeightsError, match=message):
        write_all(tmp_path, params, dtypes=half)


def test_parameters_without_a_place(tmp_path):
    with pytest.raises(WeightsError, match="names no tensor for these parameters:\n  other"):
        TorchWriter(tmp_path, PARTS, changed("tower/other", EMBEDDING))
    with pytest.raises(WeightsError, match="belong to no part of the folder:\n  embedding\n  head/kernel"):
        TorchWriter(tmp_path, PARTS[1:], PARAMS)
    with pytest.raises(WeightsError, match=r"embed.weight is \[5, 2\] by one parameter and \[6, 2\] by head/kernel"):
        TorchWriter(tmp_path, PARTS, changed("head/kernel", np.zeros((2, 6), np.float32)))
