"""Any file or folder of weights as one table of tensors: single files, shards with an index, every container."""

from __future__ import annotations

import os
from pathlib import Path

from pixelstory_jax.interop.safetensors_files import open_safetensors, read_index
from pixelstory_jax.interop.tensors import FileTensor, WeightsError

TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model", "pytorch_lora_weights")


def open_tensor_file(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """The tensors of one file, by its kind: safetensors, or a pickle of torch (read by a restricted unpickler).

    Raises:
      WeightsError: absent, damaged, refused, or of another kind.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        from pixelstory_jax.interop.torch_pickle import open_torch_file

        return open_torch_file(path)
    raise WeightsError(f"{path} is no file of weights: .safetensors, {', '.join(TORCH_SUFFIXES)} were expected.")


def open_tensors(source: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """The tensors of a file, of an index of shards, or of a folder that holds one of them.

    Of a folder the first of these is taken: an index of safetensors shards, a safetensors file, the same as torch
    pickles; names are those of transformers, diffusers and peft, also with a variant (`model.fp16.safetensors`).

    Raises:
      WeightsError: nothing to read, a shard is missing, or the index and the shards disagree.
    """
    path = Path(source)
    if path.is_dir():
        path = _find(path)
    return _open_shards(path) if path.name.endswith(".index.json") else open_tensor_file(path)


def _find(folder: Path) -> Path:
    for kind in ("safetensors", "bin"):
        for pattern in (f"{{}}.{kind}.index*.json", f"{{}}.{kind}", f"{{}}.*.{kind}"):
            for stem in STEMS:
                found = sorted(path for path in folder.glob(pattern.format(stem)) if path.is_file())
                if found:
                    return found[0]
        shards = sorted(path for stem in STEMS for path in folder.glob(f"{stem}*-*-of-*.{kind}"))
        if shards:
            raise WeightsError(f"{folder} has shards ({shards[0].name}, …) but no index (*.index.json) for them.")
    raise WeightsError(
        f"{folder} holds no weights: model.safetensors, diffusion_pytorch_model.safetensors, pytorch_model.bin or an "
        "index of shards was expected."
    )


def _open_shards(index: Path) -> dict[str, FileTensor]:
    places = read_index(index)
    files = sorted(set(places.values()))
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise WeightsError(f"{index.name} in {index.parent} lists {', '.join(absent)}, which is not there.")
    found: dict[str, FileTensor] = {}
    for file in files:
        for name, tensor in open_tensor_file(index.parent / file).items():
            if name in found:
                raise WeightsError(f"Two tensors of the name {name}: in {found[name].file} and in {tensor.file}.")
            found[name] = tensor
    misplaced = [
        f"{name} is not in {file}"
        for name, file in places.items()
        if name not in found or Path(found[name].file).name != file
    ]
    misplaced += [f"{name} in {Path(found[name].file).name} is not listed" for name in found.keys() - places.keys()]
    if misplaced:
        shown = "; ".join(sorted(misplaced)[:5]) + (f"; and {len(misplaced) - 5} more" if len(misplaced) > 5 else "")
        raise WeightsError(f"{index} does not describe its shards: {shown}.")
    return found
