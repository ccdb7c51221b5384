"""Low-rank additions of whole models: of others, merged on the way in; ours, merged or given away on the way out."""

from __future__ import annotations

import dataclasses
from typing import Any

from pixelstory_jax.interop.exports import Export, Source, bare_model
from pixelstory_jax.interop.hub import resolve_source
from pixelstory_jax.interop.llama_folder import llama_table
from pixelstory_jax.interop.lora_files import merge_lora, open_lora, story_tables
from pixelstory_jax.interop.lora_params import diffusers_tensors, merge_own, peft_settings, peft_tensors
from pixelstory_jax.interop.settings import json_text
from pixelstory_jax.interop.tables import pixellm
from pixelstory_jax.interop.tensors import LazyArray, LazyParams, WeightsError
from pixelstory_jax.interop.torch_folder import TorchPart
from pixelstory_jax.interop.torch_layout import Row, Table
from pixelstory_jax.interop.unet_table import unet_table
from pixelstory_jax.interop.weights import without_prefix

OTHERS = (
    "Embeddings, head, projectors and decoder, which training changes too, are not in the adapter; --lora=merged "
    "writes the whole model."
)


def merge_file(kind: str, model: Any, params: LazyParams, source: str, scale: float) -> LazyParams:
    """Parameters with the additions of a LoRA file or folder; see `lora_files.merge_lora`.

    Raises:
      WeightsError: it cannot be read, does not fit, or this kind of model takes none.
    """
    tensors, settings = open_lora(resolve_source(source))
    if kind == "storydiffusion":
        return merge_lora(params, story_tables(model), tensors, scale, settings)
    prefixes = {"llama": "", "llava": "llama/", "pixellm": "llama/"}
    if kind not in prefixes:
        raise WeightsError(
            f"Low-rank additions can be merged into language models and U-Nets, not into {kind} weights."
        )
    return merge_lora(params, {prefixes[kind]: llama_table()}, tensors, scale, settings)


def merged_model(model: Any, params: LazyParams) -> tuple[Any, LazyParams]:
    """A model of ours with its low-rank additions merged, and its sizes without them."""
    if not any(path.endswith("/lora_a") for path in params):
        return bare_model(model), params
    return bare_model(model), merge_own(params, _alpha(model))


def _alpha(model: Any) -> float:
    if hasattr(model, "unet"):
        return model.unet.lora_alpha
    return (model.llama if hasattr(model, "llama") else model).lora.alpha


def adapter_export(layout: str, source: Source) -> Export:
    """The additions alone, as peft reads them for a language model and diffusers for a U-Net.

    Args:
      layout: "llama" or "pixellm" (names of LlamaForCausalLM, which PixelLM shares), or that of a pipeline.

    Raises:
      WeightsError: there are none, or the layout has no adapters.
    """
    if not any(path.endswith("/lora_a") for path in source.params):
        raise WeightsError("This checkpoint has no low-rank additions; --lora=merged writes the whole model.")
    alpha = _alpha(source.model)
    if layout in ("diffusers-sd15", "diffusers-sdxl") and source.kind == "storydiffusion":
        unet = without_prefix(source.params, "unet/")
        return _tensors_export(
            diffusers_tensors(unet_table(source.model.unet), unet, alpha), "pytorch_lora_weights", {}
        )
    if layout in ("llama", "pixellm") and source.kind in ("llama", "llava", "pixellm"):
        llama = source.model if source.kind == "llama" else source.model.llama
        own = source.params if source.kind == "llama" else without_prefix(source.params, "llama/")
        table = llama_table()
        if layout == "pixellm" and source.kind == "pixellm":  # names that no other module of the whole model has
            own, table = source.params, pixellm(source.model.scales, source.model.decoder.depth, tower=True)
        settings = peft_settings(table, own, alpha, llama.lora.dropout, task_type="CAUSAL_LM")
        export = _tensors_export(
            peft_tensors(table, own), "adapter_model", {"adapter_config.json": json_text(settings)}
        )
        return dataclasses.replace(export, notes=(OTHERS,)) if source.kind == "pixellm" else export
    raise WeightsError(f"A checkpoint of {source.kind!r} has no adapter in the format {layout}.")


def _tensors_export(tensors: Any, stem: str, files: Any) -> Export:
    """An export of tensors that are in the layout of torch already."""
    params = {name: LazyArray.whole(tensor.shape, tensor.dtype, tensor.read) for name, tensor in tensors.items()}
    return Export((TorchPart("", stem, Table(tuple(Row(name, name) for name in params))),), params, files)
