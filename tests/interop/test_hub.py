from __future__ import annotations

import pytest

from pixelstory_jax.interop.hub import resolve_source, wanted_files
from pixelstory_jax.interop.tensors import WeightsError


def test_one_edition_of_a_pipeline():
    names = [
        *("model_index.json", "sd_xl_base_1.0.safetensors", "README.md", "sd.ckpt"),
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("vae/config.json", "vae/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.bin"),
        *("tokenizer/vocab.json", "tokenizer/merges.txt", "safety_checker/model.safetensors", "unet/model.onnx"),
    ]
    assert set(wanted_files(names)) == {
        *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "vae/diffusion_pytorch_model.bin", "tokenizer/vocab.json", "tokenizer/merges.txt"),
    }


def test_shards_and_variants():
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    assert set(wanted_files([*shards, index, "pytorch_model.bin", "config.json"])) == {*shards, index, "config.json"}
    only = ["model.fp16.safetensors", "config.json", "tokenizer.model"]
    assert set(wanted_files(only)) == set(only)


def test_paths_and_ids(tmp_path, monkeypatch):
    assert resolve_source(str(tmp_path)) == tmp_path
    for text in ("nowhere", "/no/where", "./no/where", "../x/y"):
        with pytest.raises(WeightsError, match=f"There is no file or folder {text}."):
            resolve_source(text)
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match="nor found in its cache") as caught:
        resolve_source("owner/name-of-nothing")
    assert "\n" not in str(caught.value)
