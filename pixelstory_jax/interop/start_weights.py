"""What `config.init_from` names: one source of starting weights or several by part, in any layout, for a model's sizes.

llava-v1.5-7b                                    a folder, its layout found out
clip-vision:clip-vit-large-patch14-336,vicuna-7b several, later ones over earlier ones; a layout may stand in front
runs/imported                                    a checkpoint, of a training or an import
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixelstory_jax.interop.checkpoint_folder import open_checkpoint
from pixelstory_jax.interop.clip_vision_folder import resized_tower
from pixelstory_jax.interop.formats import FORMATS, read_weights
from pixelstory_jax.interop.pixellm_folder import OWN_PATHS, grow_vocabulary
from pixelstory_jax.interop.tensors import LazyArray, LazyParams, WeightsError
from pixelstory_jax.interop.weights import MODELS, Weights, prefixed
from pixelstory_jax.models.pixellm import PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.training.checkpoints import find_checkpoint, read_config


def split_sources(text: str) -> list[tuple[str, str]]:
    """(layout, source) of each part of `config.init_from`; layout "auto" where none stands in front."""
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layout, colon, source = part.partition(":")
        sources.append((layout, source) if colon and layout in FORMATS else ("auto", part))
    return sources


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of this package, or has some."""
    if any((path / name).is_dir() for name in ("params", "checkpoints", "best", "last")):
        return True
    return path.is_dir() and any(step.name.isdigit() and (step / "params").is_dir() for step in path.iterdir())


def open_source(layout: str, source: str, settings: str | None = None) -> Weights:
    """Weights of any layout or of a checkpoint; towers that a folder only names are not looked for.

    Raises:
      WeightsError, CheckpointError: it cannot be read, or has no part that a model here could start from.
    """
    path = Path(source).expanduser()
    if layout != "auto" or not is_checkpoint(path):
        return read_weights(source, layout, settings=settings, need_tower=False)
    config = read_config(find_checkpoint(path))
    kind = str(config.get("objective"))
    kind = "pixellm" if kind == "pretraining" else kind  # the same network without its decoder
    if kind not in MODELS:
        raise WeightsError(f"{source} holds a checkpoint of {kind!r}, from which nothing else can start.")
    return Weights(kind, sizes_from_config(MODELS[kind], config["model"]), open_checkpoint(path))


def pixellm_start(text: str, model: PixelLMConfig) -> LazyParams:
    """Starting weights of a PixelLM by slash path, fitted to its sizes.

    A tower loses the layers that the model does not have, its position table is resized (as `model.mode` says), and a
    vocabulary grows by new tokens. A projector of LLaVA that has another shape is left out, as in the paper's training.

    Raises:
      WeightsError, CheckpointError: a source cannot be read, or is none for PixelLM.
    """
    start: LazyParams = {}
    for layout, source in split_sources(text):
        weights = open_source(layout, source)
        start |= _fitted(_pixellm_paths(weights, source), weights, model)
    return start


def _pixellm_paths(weights: Weights, source: str) -> LazyParams:
    """The parameters under the paths that they have in a PixelLM."""
    if weights.kind in ("pixellm", "llava"):
        return dict(weights.params)
    prefixes = {"llama": "llama/", "clip-vision": "vision/"}
    if weights.kind not in prefixes:
        raise WeightsError(f"{source} holds {weights.kind} weights, of which PixelLM has none.")
    return prefixed(weights.params, prefixes[weights.kind])


def _fitted(params: LazyParams, weights: Weights, model: PixelLMConfig) -> LazyParams:
    params = {
        path: first_layers(value, model.vision.layers) if path.startswith("vision/layers/") else value
        for path, value in params.items()
        if not path.startswith("vision/final_norm/") or model.vision.has_final_norm
    }
    if "vision/position_embedding" in params:
        params = resized_tower(params, model.vision.grid, model.mode == "faithful", "vision/")
    if weights.kind == "llava":
        width = model.llama.width
        shapes = {"kernel": ((model.vision.width, 2 * width), (2 * width, width)), "bias": ((2 * width,), (width,))}
        projector = {path: value for path, value in params.items() if path.startswith("mm_projector/")}
        if any(value.shape not in shapes[path.rpartition("/")[2]] for path, value in projector.items()):
            params = {path: value for path, value in params.items() if path not in projector}
    if model.mode != "paper":
        params = {path: value for path, value in params.items() if path not in OWN_PATHS}
    if not model.llama.lora.rank:
        kept = {path: value for path, value in params.items() if "/lora_" not in path}
        if len(kept) < len(params):
            raise WeightsError(
                "The starting weights have low-rank additions, the model none; export them merged first."
            )
    return grow_vocabulary(params, model.llama.vocab)


def first_layers(value: LazyArray, layers: int) -> LazyArray:
    """A stacked parameter with its first layers alone."""
    if value.shape[0] <= layers:
        return value

    def part(index: tuple[slice, ...]) -> Any:
        return value[(slice(*index[0].indices(layers)), *index[1:])]

    return LazyArray((layers, *value.shape[1:]), value.dtype, part)


def story_start(text: str, settings: str | None) -> Mapping[str, Any]:
    """Starting weights of a StoryDiffusion by slash path: a whole pipeline first, then text encoders over it.

    Args:
      settings: pipeline folder with the tokenizers of a single file.

    Raises:
      WeightsError, CheckpointError: a source cannot be read, or is none for StoryDiffusion.
    """
    start: LazyParams = {}
    for layout, source in split_sources(text):
        weights = open_source(layout, source, settings)
        if weights.kind == "clip-text":
            start |= prefixed(weights.params, "text/")
        elif weights.kind == "storydiffusion":
            start |= weights.params
        else:
            raise WeightsError(f"{source} holds {weights.kind} weights, of which StoryDiffusion has none.")
    return start
