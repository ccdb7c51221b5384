"""A checkpoint of a tiny PixelLM of random weights whose language model says one answer, with a mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from configs import as_config
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.models.paths import flatten, unflatten
from pixelstory_jax.models.pixellm import PixelLM
from tests.inference.test_segmenter import smallest
from tests.models.small import random_like


def talking_params(config: Any, tokenizer: Any) -> Any:
    """Layers add nothing to a token's embedding, and the head knows which token comes after which.

    The channels of the masks are weighted so that masks cover a part of a picture.
    """
    batch = {
        "image": np.zeros((1, 32, 32, 3), np.uint8),
        "image_size": np.full((1, 2), 32, np.int32),
        "tokens": np.zeros((1, 1, 4), np.int32),
        "token_valid": np.ones((1, 1, 4), bool),
        "target_positions": np.ones((1, 1, 6), np.int32),
    }
    flat = flatten(random_like(jax.eval_shape(PixelLM(config).init, jax.random.key(0), batch)["params"]))
    for path, array in flat.items():
        if path.startswith("llama/layers") and path.split("/")[-2] in ("out", "down"):
            flat[path] = np.zeros_like(array)
    weights = 3 * np.random.default_rng(9).normal(size=2)
    for path in ("mask_decoder/hypernetworks/kernel_2", "mask_decoder/hypernetworks/bias_2"):
        flat[path] = np.asarray(flat[path]) * weights.astype(np.float32)
    chain = [*(tokenizer.encode(word)[-1] for word in ("ASSISTANT:", "cow")), *tokenizer.codebook_ids, tokenizer.eos_id]
    embedding, head = np.array(flat["llama/embedding"]), np.zeros_like(flat["llama/head"])
    embedding[chain] = np.eye(len(chain), config.llama.width)
    head[:, chain[1:]] = embedding[chain[:-1]].T
    return unflatten({**flat, "llama/embedding": embedding, "llama/head": head})


def write_checkpoint(folder: Path) -> Path:
    """A workdir of training with the model as its best checkpoint."""
    tokenizer = small_tokenizer(6)
    model = smallest(tokenizer.vocab_size)
    data = {"tokenizer": "small", "style": "plain"}
    config = ConfigDict({"objective": "pixellm", "data": data, "eval": {"max_new_tokens": 12}})
    config.model = as_config(model)
    items = {
        "params": ocp.args.PyTreeSave(talking_params(model, tokenizer)),
        "config": ocp.args.JsonSave(json.loads(config.to_json())),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder / "checkpoints/best/7", args=ocp.args.Composite(**items))
    return folder
