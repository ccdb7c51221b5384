"""Settings of LLaMA-family language models, as transformers' `LlamaForCausalLM` has them, and our sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pixelstory_jax.interop.settings import check_known, check_unquantised, compute_dtype, need
from pixelstory_jax.interop.tables import LLAMA
from pixelstory_jax.interop.tensors import TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Row, Table
from pixelstory_jax.models.llama import Llama, LlamaConfig

SETTINGS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
}
OPTIONAL = {
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_length",
}
KNOWN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
}
# What transformers takes where a file does not say: files of models inside others leave it out.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def llama_config(settings: Mapping[str, Any], **changes: Any) -> LlamaConfig:
    """Sizes from a `config.json`; `changes` replace fields.

    Raises:
      WeightsError: a setting is missing, or is one that our network does not have.
    """
    need(settings, SETTINGS, "language model")
    check_unquantised(settings)
    check_known(settings, KNOWN, "language model")
    rope = settings.get("rope_parameters") or {}
    _check_rope(rope)
    _check_rope(settings.get("rope_scaling") or {})
    sizes: dict[str, Any] = {ours: settings[theirs] for theirs, ours in SETTINGS.items()}
    sizes["kv_heads"] = sizes["heads"]
    sizes |= {ours: settings[theirs] for theirs, ours in OPTIONAL.items() if settings.get(theirs) is not None}
    sizes["rope_theta"] = float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0)
    sizes["dtype"] = compute_dtype(settings)
    config = LlamaConfig(**{**sizes, **changes})
    head = settings.get("head_dim") or config.head_width
    if head != config.head_width:
        raise WeightsError(
            f"The language model has head_dim={head}; hidden_size / num_attention_heads = {config.head_width} is what "
            "can be read."
        )
    return config


def _check_rope(rope: Mapping[str, Any]) -> None:
    """Refuses positions that are scaled; a linear scale of 1 is none."""
    kind, factor = rope.get("rope_type") or rope.get("type") or "default", rope.get("factor") or 1.0
    if kind != "default" and not (kind == "linear" and factor == 1.0):
        raise WeightsError(f"The language model scales rotary positions (rope_type={kind!r}); plain ones can be read.")


def llama_settings(config: LlamaConfig, tied: bool = False, dtype: str = "float32") -> dict[str, Any]:
    """What transformers needs to build the same network: `config.json`, readable by versions 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for theirs, ours in {**SETTINGS, **OPTIONAL}.items()},
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def generation_settings() -> dict[str, Any]:
    """`generation_config.json`: greedy, LLaMA's marks."""
    return {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama_table(tied: bool = False) -> Table:
    """LlamaForCausalLM. Tied: the file has the head's weights as those of the embedding alone."""
    if not tied:
        return LLAMA
    rows = tuple(Row(EMBEDDING, row.path, row.layout) if row.torch == HEAD else row for row in LLAMA.rows)
    return Table(rows, (*LLAMA.ignored, "lm_head\\.weight"), LLAMA.ours_only)


def llama_shapes(config: LlamaConfig) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s, without low-rank additions; computes nothing."""
    bare = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0))
    tokens = np.zeros((1, 1), np.int32)

    def init(rng: Any) -> Any:
        return Llama(bare).init(rng, tokens, tokens == 0, method=Llama.whole)

    return jax.eval_shape(init, jax.random.key(0))["params"]


def is_tied(settings: Mapping[str, Any], tensors: TensorMap) -> bool:
    """Whether a file has no head of its own, because it is the embedding."""
    return bool(settings.get("tie_word_embeddings")) and HEAD not in tensors
