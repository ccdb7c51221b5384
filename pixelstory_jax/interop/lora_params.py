"""Low-rank additions of our own networks (`layers.Linear`: lora_a [I, R], lora_b [R, O]), merged or given to peft.

I and O widths of a linear map, R rank; the first axis of a stack is that of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pixelstory_jax.interop.tensors import FileTensor, LazyArray, WeightsError
from pixelstory_jax.interop.torch_layout import STACK, Row, Table

PEFT = "base_model.model."
DIFFUSERS = {"unet/": "unet.", "text/": "text_encoder.", "text_2/": "text_encoder_2."}


def as_lazy(value: Any) -> LazyArray:
    """A parameter that may be there already as one that is asked for."""
    if isinstance(value, LazyArray):
        return value
    return LazyArray(tuple(value.shape), np.dtype(value.dtype), lambda index: np.asarray(value[index]))


def merge_own(params: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """The parameters of a network of ours with its own low-rank additions merged, which are left out.

    Args:
      params: LazyArrays or arrays by slash path, with X/lora_a [.., I, R] and X/lora_b [.., R, O] beside X/kernel
        [.., I, O]; the first axis of a stack is that of its layers.
      alpha: of the network's config (`llama.lora.alpha`, `unet.lora_alpha`).

    Returns:
      The same, where a merged kernel is a LazyArray of its old dtype.

    Raises:
      WeightsError: an addition without its other half or its kernel.
    """
    places = _places(params)
    merged = {path: value for path, value in params.items() if path.rpartition("/")[2] not in ("lora_a", "lora_b")}
    for place in places:
        kernel, lora_a, lora_b = (as_lazy(params[f"{place}/{leaf}"]) for leaf in ("kernel", "lora_a", "lora_b"))
        merged[f"{place}/kernel"] = _merged(kernel, lora_a, lora_b, alpha)
    return merged


def _places(params: Mapping[str, Any]) -> list[str]:
    leaves = ("lora_a", "lora_b", "kernel")
    places = list(dict.fromkeys(path.rpartition("/")[0] for path in params if path.endswith(("/lora_a", "/lora_b"))))
    missing = [f"{place}/{leaf}" for place in places for leaf in leaves if f"{place}/{leaf}" not in params]
    if missing:
        raise WeightsError("These parameters are missing:" + "".join(f"\n  {path}" for path in missing))
    return places


def _merged(kernel: LazyArray, lora_a: LazyArray, lora_b: LazyArray, alpha: float) -> LazyArray:
    """Sums in float32, one layer after another, in the dtype of the kernel."""
    factor = np.float32(alpha / lora_a.shape[-1])

    def part(index: tuple[slice, ...]) -> np.ndarray:
        *layers, rows, columns = index
        value = np.array(kernel[index])
        first = lora_a[(*layers, rows, slice(None))].astype(np.float32)
        second = lora_b[(*layers, slice(None), columns)].astype(np.float32)
        for layer in np.ndindex(value.shape[:-2]):
            value[layer] = value[layer].astype(np.float32) + factor * (first[layer] @ second[layer])
        return value

    return LazyArray(kernel.shape, kernel.dtype, part)


def peft_tensors(
    table: Table, params: Mapping[str, Any], prefix: str = PEFT, scale: float = 1.0
) -> dict[str, FileTensor]:
    """Our low-rank additions as the tensors of a peft adapter (adapter_model.safetensors), read when they are written.

    Args:
      table: names of the network's tensors in torch.
      params: LazyArrays or arrays by the table's slash paths.
      prefix: of all names.
      scale: factor on B.

    Raises:
      WeightsError: no additions, or one that the table has no linear map for.
    """
    tensors: dict[str, FileTensor] = {}
    for place, row in _rows(table, params).items():
        first, second = (as_lazy(params[f"{place}/{leaf}"]) for leaf in ("lora_a", "lora_b"))
        for layer, key in enumerate(row.keys(first.shape)):
            chosen = (slice(layer, layer + 1),) if STACK in row.torch else ()
            name = prefix + key.removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = _transposed(first, chosen, 1.0)
            tensors[f"{name}.lora_B.weight"] = _transposed(second, chosen, scale)
    return tensors


def diffusers_tensors(
    table: Table, params: Mapping[str, Any], alpha: float, prefix: str = DIFFUSERS["unet/"]
) -> dict[str, FileTensor]:
    """The same for pytorch_lora_weights.safetensors of diffusers.

    The scale alpha / R is put into B: programs that read these files take alpha to be the rank, as diffusers does where
    the file has no metadata.
    """
    return peft_tensors(table, params, prefix, alpha / _rank(params))


def peft_settings(
    table: Table,
    params: Mapping[str, Any],
    alpha: float,
    dropout: float = 0.0,
    base_model: str | None = None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """The adapter_config.json for `peft_tensors`.

    Args:
      params: all of the network, so that a short name for the modules is taken only where no other has it too.
      base_model: folder or hub id of the weights that the adapter belongs to.
      task_type: "CAUSAL_LM" for language models.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": _rank(params),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_modules(table, params),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _rows(table: Table, params: Mapping[str, Any]) -> dict[str, Row]:
    """The row of the kernel beside each of our additions."""
    rows = {row.path: row for row in table.rows}
    places = [path.removesuffix("/lora_a") for path in params if path.endswith("/lora_a")]
    if not places:
        raise WeightsError("These parameters have no low-rank additions (lora_a, lora_b).")
    unnamed = [place for place in places if getattr(rows.get(f"{place}/kernel"), "layout", None) != "linear"]
    if unnamed:
        raise WeightsError(
            "The mapping table names no linear map for the low-rank additions of " + ", ".join(unnamed) + "."
        )
    return {place: rows[f"{place}/kernel"] for place in places}


def _rank(params: Mapping[str, Any]) -> int:
    ranks = {value.shape[-1] for path, value in params.items() if path.endswith("/lora_a")}
    if len(ranks) != 1:
        raise WeightsError(f"Low-rank additions of one rank are needed; these have {sorted(ranks) or 'none'}.")
    return ranks.pop()


def _transposed(value: LazyArray, chosen: tuple[slice, ...], scale: float) -> FileTensor:
    """A matrix, or one of a stack, as torch has it."""

    def read() -> np.ndarray:
        matrix = value[chosen].reshape(value.shape[-2:]).T
        return matrix if scale == 1 else (matrix * np.float32(scale)).astype(value.dtype)

    return FileTensor(value.shape[:-3:-1], value.dtype, read)


def _target_modules(table: Table, params: Mapping[str, Any]) -> list[str]:
    """The last parts of the modules' names where those mean no other module, else the names in full."""
    own = _rows(table, params)
    ends = {_end(row.torch) for row in own.values()}
    meant = {
        row for row in table.rows if row.path in params and _end(row.torch) in ends and row.path.endswith("/kernel")
    }
    if meant == set(own.values()):
        return sorted(ends)
    keys = [key for place, row in own.items() for key in row.keys(tuple(params[f"{place}/lora_a"].shape))]
    return sorted(key.removesuffix(".weight") for key in keys)


def _end(torch: str) -> str:
    """The name of a module in its parent: "q_proj", or "to_out.0" of a list."""
    name = torch.removesuffix(".weight")
    parent, _, last = name.rpartition(".")
    return f"{parent.rpartition('.')[2]}.{last}" if last.isdigit() else last
