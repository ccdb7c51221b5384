"""What `config.init_from` names: one source of starting weights or several by part, in any layout, for a model's sizes.

llava-v1.5-7b                                    a folder, its layout found out
clip-vision:clip-vit-large-patch14-336,vicuna-7b several, later ones over earlier ones; a layout may stand in front
runs/imported                                    a checkpoint, of a training or an import
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pixelstory_jax.inference.noise_schedule import NoiseSchedule
from pixelstory_jax.interop.checkpoint_folder import open_checkpoint
from pixelstory_jax.interop.clip_vision_folder import resized_tower
from pixelstory_jax.interop.formats import FORMATS, read_weights
from pixelstory_jax.interop.pixellm_folder import OWN_PATHS, grow_vocabulary
from pixelstory_jax.interop.tensors import LazyArray, LazyParams, WeightsError
from pixelstory_jax.interop.weights import MODELS, Weights, prefixed
from pixelstory_jax.models.pixellm import PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig
from pixelstory_jax.training.checkpoints import find_checkpoint, read_config


def split_sources(text: str) -> list[tuple[str, str]]:
    """(layout, source) of each part of `config.init_from`; layout "auto" where none stands in front."""
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        layout, colon, source = part.partition(":")
        named = colon and layout.strip() in FORMATS
        sources.append((layout.strip(), source.strip()) if named else ("auto", part))
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
    if not is_checkpoint(path):
        return read_weights(source, layout, settings=settings, need_tower=False)
    config = read_config(find_checkpoint(path))
    kind = str(config.get("objective"))
    kind = "pixellm" if kind == "pretraining" else kind  # the same network without its decoder
    if kind not in MODELS:
        raise WeightsError(f"{source} holds a checkpoint of {kind!r}, from which nothing else can start.")
    sizes = sizes_from_config(MODELS[kind], config["model"])
    return Weights(kind, sizes, open_checkpoint(path), settings={"schedule": config.get("schedule", {})})


# Of no matter to what the weights compute, or fitted on the way.
FREE = {
    "llama": ("vocab", "max_length", "lora", "dtype", "remat"),
    "vision": ("canvas", "layers", "has_final_norm", "dtype", "remat"),
    "unet": ("linear_projection", "lora_rank", "lora_alpha", "dtype", "remat"),
    "text": ("dtype", "remat"),
    "text_2": ("dtype", "remat"),
    "autoencoder": ("dtype", "remat"),
}
STORY_PARTS = ("unet", "autoencoder", "text", "text_2")


def check_sizes_of(source: str, sizes: Any, model: Any, parts: Iterable[str]) -> None:
    """Raises WeightsError where a part of the model would compute something else than the weights were made for.

    Shapes alone do not tell: the epsilon of norms, heads, activations, the base of rotary positions.
    """
    wrong = []
    for part in parts:
        has, needs = getattr(model, part), getattr(sizes, part)
        if has is None or needs is None:
            continue
        for field in dataclasses.fields(needs):
            value, wanted = getattr(has, field.name), getattr(needs, field.name)
            if field.name not in FREE[part] and value != wanted:
                wrong.append(f"--config.model.{part}.{field.name}={wanted} (it is {value})")
    if wrong:
        raise WeightsError(f"{source} was made for another model; set {', '.join(wrong)}.")


def check_schedule(source: str, made_for: NoiseSchedule, trained: NoiseSchedule) -> None:
    """Raises WeightsError where a model is to be trained on other noise, or to predict something else, than it does."""
    wrong = [
        f"--config.schedule.{name}={value}" for name, value in vars(made_for).items() if value != vars(trained)[name]
    ]
    if wrong:
        raise WeightsError(f"{source} was made for another noise schedule; set {', '.join(wrong)}.")


def part_sizes(weights: Weights) -> Any:
    """The sizes of weights with those of a lone part under its name in a whole model."""
    names = {"llama": "llama", "clip-vision": "vision", "clip-text": "text"}
    if weights.kind not in names:
        return weights.config
    parts = dict.fromkeys(names.values())
    return SimpleNamespace(**{**parts, names[weights.kind]: weights.config})


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
        params, sizes = _pixellm_paths(weights, source), part_sizes(weights)
        parts = [part for part in ("llama", "vision") if any(path.startswith(f"{part}/") for path in params)]
        check_sizes_of(source, sizes, model, parts)
        if "llama" in parts and sizes.llama.vocab > model.llama.vocab:
            raise WeightsError(
                f"{source} has {sizes.llama.vocab} tokens; set --config.model.llama.vocab to that or more (it is "
                f"{model.llama.vocab})."
            )
        start |= _fitted(params, weights, model)
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


def story_start(
    text: str, settings: str | None, model: StoryDiffusionConfig, schedule: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Starting weights of a StoryDiffusion by slash path: a whole pipeline first, then text encoders over it.

    Args:
      model, schedule: what is trained, which has to be what the weights were made for.
      settings: pipeline folder with the tokenizers of a single file.

    Raises:
      WeightsError, CheckpointError: a source cannot be read, or is none for StoryDiffusion.
    """
    start: LazyParams = {}
    for layout, source in split_sources(text):
        weights = open_source(layout, source, settings)
        if weights.kind not in ("clip-text", "storydiffusion"):
            raise WeightsError(f"{source} holds {weights.kind} weights, of which StoryDiffusion has none.")
        check_sizes_of(source, part_sizes(weights), model, ("text",) if weights.kind == "clip-text" else STORY_PARTS)
        if "schedule" in weights.settings:
            check_schedule(source, NoiseSchedule(**weights.settings["schedule"]), NoiseSchedule(**schedule))
        start |= prefixed(weights.params, "text/") if weights.kind == "clip-text" else weights.params
    return start
