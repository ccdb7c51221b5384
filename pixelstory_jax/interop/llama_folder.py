"""Settings of LLaMA-family language models, as transformers' `LlamaForCausalLM` has them, and our sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixelstory_jax.interop.settings import check_known, compute_dtype, need
from pixelstory_jax.interop.tables import LLAMA
from pixelstory_jax.interop.tensors import TensorMap, WeightsError
from pixelstory_jax.interop.torch_layout import Row, Table
from pixelstory_jax.models.llama import LlamaConfig

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
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1.0),
    "pretraining_tp": (1,),
}
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def llama_config(settings: Mapping[str, Any], **changes: Any) -> LlamaConfig:
    """Sizes from a `config.json`; `changes` replace fields.

    Raises:
      WeightsError: a setting is missing, or is one that our network does not have.
    """
    need(settings, SETTINGS, "language model")
    check_known(settings, KNOWN, "language model")
    rope = settings.get("rope_parameters") or {}
    check_known(rope, {"rope_type": ("default",)}, "language model")
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


def is_tied(settings: Mapping[str, Any], tensors: TensorMap) -> bool:
    """Whether a file has no head of its own, because it is the embedding."""
    return bool(settings.get("tie_word_embeddings")) and HEAD not in tensors
