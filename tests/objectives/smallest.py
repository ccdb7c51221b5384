"""The tiny configs with the least sizes: they compile in seconds on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs.pixellm import get_config
from configs.pretrain_tiny import get_config as get_pretraining_config


def shrink(config: ConfigDict) -> ConfigDict:
    """Two layers of width 32 on pictures of 48 pixels; the language model has one layer."""
    config.model.vision.update({"canvas": 48, "patch_size": 12, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64})
    config.model.llama.update({"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 64})
    config.model.decoder.update({"width": 16, "heads": 2, "mlp_width": 32, "iou_width": 16, "depth": 1})
    config.model.update({"feature_layers": (2, 1), "image_tokens_side": 2})
    config.data.update({"questions": 2, "conversations": 2, "length": 88})
    config.train.update({"batch_size": 2, "steps": 2})
    config.init_from = ""
    return config


def smallest_pixellm() -> ConfigDict:
    config = shrink(get_config())
    config.data.slots = 4
    config.allow_random_frozen = True
    config.eval.update({"splits": ("test",), "examples": 1, "quick_examples": 1, "max_new_tokens": 4, "batch_size": 8})
    return config


def smallest_mixture(root: Path, *names: str) -> ConfigDict:
    """The smallest model on the named data sets."""
    config = shrink(get_config("tiny,data=mixture"))
    config.allow_random_frozen = True
    config.data.update({"folder": str(root), "questions": 3, "slots": 12, "length": 160})
    config.data.mixture = ConfigDict({"all": {"weight": 1.0, "sets": names}})
    return config


def smallest_pretraining() -> ConfigDict:
    config = shrink(get_pretraining_config())
    config.eval.examples = 2
    return config


def drawn_params(objective: Any) -> Any:
    """Drawn by hand: the real initialisation takes longer to compile than the tests to run."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "token_weights", "scale_weights"):
            return np.full(leaf.shape, 1.0 if name == "scale" else 0.5, leaf.dtype)
        return rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(objective.init, jax.random.key(0)))
