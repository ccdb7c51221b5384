"""The parameters that each kind of weights has, as shapes alone; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pixelstory_jax.interop.clip_text_table import clip_text_shapes
from pixelstory_jax.interop.clip_vision_folder import clip_vision_shapes
from pixelstory_jax.interop.llama_folder import llama_shapes
from pixelstory_jax.interop.pixellm_folder import pixellm_shapes
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.models.llava import Llava
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.story_diffusion import StoryDiffusion


def parameter_shapes(kind: str, model: Any) -> dict[str, Any]:
    """`jax.ShapeDtypeStruct`s by slash path of a kind in `weights.MODELS`, without low-rank additions."""
    shapes: dict[str, Callable[[Any], Any]] = {
        "pixellm": pixellm_shapes,
        "llava": Llava.shapes,
        "llama": llama_shapes,
        "clip-vision": clip_vision_shapes,
        "clip-text": clip_text_shapes,
        "storydiffusion": lambda config: jax.eval_shape(StoryDiffusion(config).init, jax.random.key(0)),
    }
    return flatten(shapes[kind](model))


def check_params(kind: str, model: Any, params: Mapping[str, Any]) -> None:
    """Raises WeightsError that lists every parameter that is missing, unknown or mis-shaped."""
    shapes = parameter_shapes(kind, model)
    wrong = [f"missing: {path} {list(leaf.shape)}" for path, leaf in shapes.items() if path not in params]
    wrong += [
        f"mis-shaped: {path} is {list(params[path].shape)}, expected {list(leaf.shape)}"
        for path, leaf in shapes.items()
        if path in params and tuple(params[path].shape) != tuple(leaf.shape)
    ]
    wrong += [f"unexpected: {path} {list(value.shape)}" for path, value in params.items() if path not in shapes]
    if wrong:
        raise WeightsError("These parameters do not fit:" + "".join(f"\n  {line}" for line in wrong))
