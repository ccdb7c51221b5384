"""Low-rank additions (LoRA, arXiv 2106.09685) in files of peft, diffusers and kohya, merged into parameters.

A linear map W [O, I] becomes W + scale * alpha / R * B A with A [R, I] and B [O, R], of rank R; with rank-stabilised
scaling alpha / sqrt(R). Of a convolution, A has the kernel and B is 1 x 1. Files name A lora_A, lora_down or
lora.down, and B lora_B, lora_up or lora.up. What they call the modules follows from the rows of a mapping table.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from pixelstory_jax.interop.clip_text_table import CLIP_TEXT, PREFIX
from pixelstory_jax.interop.ldm_tables import ldm_unet_table
from pixelstory_jax.interop.lora_params import DIFFUSERS, PEFT, as_lazy
from pixelstory_jax.interop.settings import check_known, read_json
from pixelstory_jax.interop.tensor_files import open_tensors
from pixelstory_jax.interop.tensors import FileTensor, LazyArray, LazyParams, TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import STACK, Row, Table
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig

Tables = Mapping[str, Table | Sequence[Table]]
KOHYA = {"unet/": ("lora_unet_",), "text/": ("lora_te_", "lora_te1_"), "text_2/": ("lora_te2_",)}
METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of peft, in the header of its files
ONLY = "; only plain low-rank additions (LoRA) to linear maps and convolutions can be read"

_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up))(?:\.[^.]+)?\.weight")
_DOWN = ("lora_A", "down")
_REFUSED = {
    r"\.lora_mid\.": "is of a LoCon with a middle part",
    r"\.hada_\w+$": "is of a LoHa",
    r"\.lokr_\w+$": "is of a LoKr",
    r"\.(dora_scale|lora_magnitude_vector)\b": "is of a DoRA",
    r"\.lora_embedding_[AB]\b": "is an addition to an embedding",
    r"\.(bias|diff_b)$": "is an addition to a bias",
    r"\.diff$": "is the difference of a whole tensor",
}
_KNOWN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")  # such adapters belong to other base weights than the released


def open_lora(source: str | os.PathLike[str]) -> tuple[dict[str, FileTensor], dict[str, Any] | None]:
    """The tensors of a LoRA, not read yet, and its settings.

    Args:
      source: a file, or a folder with adapter_model.safetensors (peft) or pytorch_lora_weights.safetensors (diffusers).

    Returns:
      Tensors, and the adapter_config.json beside them or what diffusers wrote into the file; None if there is neither.

    Raises:
      WeightsError: nothing to read, or damaged.
    """
    tensors, place = open_tensors(source), Path(source)
    file = Path(next((tensor.file for tensor in tensors.values()), source))
    config = (place if place.is_dir() else place.parent) / "adapter_config.json"
    if config.is_file() and (place.is_dir() or file.name.startswith("adapter_model")):
        return tensors, read_json(config)
    return tensors, _written_settings(file) if file.suffix == ".safetensors" else None


def _written_settings(file: Path) -> dict[str, Any] | None:
    """What diffusers wrote into the header of a file, each setting under the name of its network and a dot."""
    with safe_open(file, framework="np") as opened:
        written = (opened.metadata() or {}).get(METADATA)
    try:
        settings = json.loads(written or "null")
    except ValueError as error:
        raise WeightsError(f"{file}: its {METADATA} is not JSON ({error}).") from error
    return settings if isinstance(settings, dict) else None


def story_tables(config: StoryDiffusionConfig) -> dict[str, Table | Sequence[Table]]:
    """For `merge_lora`: the networks of a story model that files have additions for."""
    tables: dict[str, Table | Sequence[Table]] = {
        "unet/": (unet_table(config.unet), ldm_unet_table(config.unet)),
        "text/": CLIP_TEXT,
    }
    return tables | {"text_2/": CLIP_TEXT} if config.text_2 else tables


@dataclass(frozen=True)
class _Target:
    """A weight of torch inside a parameter of ours."""

    path: str
    layer: int  # on the first axis of a stacked parameter, else 0
    row: Row
    shape: tuple[int, ...]  # in torch
    name: str  # of its module as the settings of peft have it


@dataclass(frozen=True)
class _Addition:
    """alpha / R * B A for one weight."""

    target: _Target
    down: FileTensor | np.ndarray
    up: FileTensor | np.ndarray
    alpha: Any  # a number, or a tensor that holds one
    stabilised: bool = False

    def read(self) -> np.ndarray:
        """In our layout, float32."""
        down, up = (np.asarray(part, np.float32) for part in (self.down, self.up))
        rank = len(down)
        product = up.reshape(-1, rank) @ down.reshape(rank, -1)
        factor = np.asarray(self.alpha, np.float32).item() / (math.sqrt(rank) if self.stabilised else rank)
        return self.target.row.how.to_ours(product.reshape(self.target.shape) * np.float32(factor))


def merge_lora(
    params: Mapping[str, Any],
    tables: Tables,
    tensors: TensorMap,
    scale: float = 1.0,
    settings: Mapping[str, Any] | None = None,
) -> LazyParams:
    """The parameters with the additions of a file, which are computed when a parameter is asked for.

    Args:
      params: LazyArrays or arrays by slash path.
      tables: start of paths ("unet/", "llama/", "" for all) -> mapping table of that network, or several where files
        differ in what they call its modules. `story_tables` has those of story models.
      tensors: of the LoRA, in the names of peft, diffusers or kohya.
      scale: strength of the additions.
      settings: see `open_lora`; without them alpha is in the file, or the rank.

    Raises:
      WeightsError: additions of another kind, or tensors that do not fit; all of these at once.
    """
    _refuse(tensors, settings or {})
    targets = _targets(params, tables)
    problems: list[str] = []
    additions: dict[str, dict[int, _Addition]] = {}
    for module, parts in _modules(tensors, problems).items():
        found = targets.get(module, {})
        addition = _addition(module, parts, tensors, list(found.values()), settings or {}, problems)
        if addition is None:
            continue
        layers = additions.setdefault(addition.target.path, {})
        if addition.target.layer in layers:
            problems.append(f"twice: {module}, under another name")
        layers[addition.target.layer] = addition
    if problems:
        raise WeightsError("These tensors of the LoRA do not fit:" + "".join(f"\n  {line}" for line in problems))
    return {
        path: _merged(as_lazy(value), additions[path], scale) if path in additions else value
        for path, value in params.items()
    }


def _refuse(tensors: TensorMap, settings: Mapping[str, Any]) -> None:
    for key in tensors:
        for pattern, what in _REFUSED.items():
            if re.search(pattern, key):
                raise WeightsError(f"{key} {what}{ONLY}.")
    check_known(settings, _KNOWN_SETTINGS, "LoRA")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise WeightsError(
            f"The LoRA has init_lora_weights={start!r}, which changes the base weights; let peft convert it to a plain "
            "LoRA (path_initial_model_for_weight_conversion)."
        )


def _modules(tensors: TensorMap, problems: list[str]) -> dict[str, dict[str, str]]:
    """Module as the file names it -> "down", "up" and "alpha" -> key."""
    modules: dict[str, dict[str, str]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match:
            module, part = match[1], "down" if match[2].endswith(_DOWN) else "up"
        elif key.endswith(".alpha"):
            module, part = key.removesuffix(".alpha"), "alpha"
        else:
            problems.append(f"unused: {key} {list(value.shape)}")
            continue
        parts = modules.setdefault(module, {})
        if part in parts:
            problems.append(f"twice: {parts[part]} and {key}")
        parts[part] = key
    return modules


def _targets(params: Mapping[str, Any], tables: Tables) -> dict[str, dict[tuple[str, int], _Target]]:
    """Every name that a file may have for a module -> what it means; more than one if the name is ambiguous."""
    targets: dict[str, dict[tuple[str, int], _Target]] = {}
    for start, given in tables.items():
        for table in (given,) if isinstance(given, Table) else given:
            for row in table.rows:
                path = start + row.path
                # Norms and embeddings, the same on both sides, have no such additions.
                if path not in params or row.layout == "same" or not row.torch.endswith(".weight"):
                    continue
                shape = row.torch_shape(tuple(params[path].shape))
                for layer, key in enumerate(row.keys(tuple(params[path].shape))):
                    target = _Target(path, layer, row, shape, key.removesuffix(".weight"))
                    for name in _names(start, target.name):
                        targets.setdefault(name, {})[path, layer] = target
    return targets


def _names(start: str, module: str) -> Iterator[str]:
    for name in {module, module.removeprefix(PREFIX)}:  # the newest transformers has no such prefix
        yield name
        yield PEFT + name
        if start in DIFFUSERS:
            yield DIFFUSERS[start] + name
            yield from (prefix + name.replace(".", "_") for prefix in KOHYA[start])


def _addition(
    module: str,
    parts: Mapping[str, str],
    tensors: TensorMap,
    targets: Sequence[_Target],
    settings: Mapping[str, Any],
    problems: list[str],
) -> _Addition | None:
    """The addition of one module; None, and a line in `problems`, where it does not fit."""
    if not targets:
        problems.extend(f"unused: {key} {list(tensors[key].shape)}" for key in parts.values())
        return None
    if len(targets) > 1:
        problems.append(f"ambiguous: {module} may be {' or '.join(target.path for target in targets)}")
        return None
    if not {"down", "up"} <= parts.keys():
        problems.extend(f"half of a pair: {key}" for key in parts.values())
        return None
    target, down, up = targets[0], tensors[parts["down"]], tensors[parts["up"]]
    rank, alpha, stabilised = _scaling(target, settings, down.shape[0])
    wrong = _misfits(target.shape, parts, tensors, rank)
    problems.extend(wrong)
    if wrong:
        return None
    if "alpha" in parts:
        return _Addition(target, down, up, tensors[parts["alpha"]])
    return _Addition(target, down, up, alpha, stabilised)


def _misfits(shape: tuple[int, ...], parts: Mapping[str, str], tensors: TensorMap, rank: int) -> list[str]:
    """What is wrong with the shapes for a weight of this shape. Kernels of 1 x 1 may be written as matrices."""
    expected = {"down": (rank, *shape[1:]), "up": (shape[0], rank)}
    wrong = []
    for part, wanted in expected.items():
        found = tuple(tensors[parts[part]].shape)
        if _bare(found) != _bare(wanted):
            wrong.append(f"mis-shaped: {parts[part]} is {list(found)}, expected {list(wanted)}")
    if "alpha" in parts and math.prod(tensors[parts["alpha"]].shape) != 1:
        wrong.append(f"mis-shaped: {parts['alpha']} is {list(tensors[parts['alpha']].shape)}, expected one number")
    return wrong


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *(size for size in shape[2:] if size != 1))


def _scaling(target: _Target, settings: Mapping[str, Any], rank: int) -> tuple[int, float, bool]:
    """Rank, alpha and whether it is rank-stabilised, as the settings have them for a module; else alpha is the rank."""
    start = next((prefix for path, prefix in DIFFUSERS.items() if target.path.startswith(path)), "")
    own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)} or settings

    def named(patterns: str, default: str, fallback: float) -> Any:
        for pattern, value in (own.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", target.name):  # as peft matches them
                return value
        return own.get(default, fallback)

    wanted = named("rank_pattern", "r", rank)
    return wanted, named("alpha_pattern", "lora_alpha", wanted), bool(own.get("use_rslora"))


def _merged(base: LazyArray, layers: Mapping[int, _Addition], scale: float) -> LazyArray:
    """Sums in float32, one layer after another, in the dtype of the parameter; only of layers that are asked for."""
    stacked = STACK in next(iter(layers.values())).target.row.torch

    def part(index: tuple[slice, ...]) -> np.ndarray:
        value = np.array(base[index])
        numbers = range(base.shape[0])[index[0]] if stacked else (0,)
        inside = index[1:] if stacked else index
        for place, layer in enumerate(numbers):
            if layer in layers:
                old = value[place] if stacked else value
                old[...] = old.astype(np.float32) + np.float32(scale) * layers[layer].read()[inside]
        return value

    return LazyArray(base.shape, base.dtype, part)
