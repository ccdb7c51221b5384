"""From the `data` section of a config to sources of examples: one place that knows every name."""

from __future__ import annotations

from typing import Any

from pixelstory_jax.data.builtin.questions import AskedScenes
from pixelstory_jax.data.builtin.things import ThingLibrary, builtin_library
from pixelstory_jax.data.conversations import SYSTEM_PROMPTS
from pixelstory_jax.data.examples import Layout, PretrainingExamples, SegmentationExamples
from pixelstory_jax.data.tokenizers import Tokenizer, llama_tokenizer, small_tokenizer


def build_tokenizer(data: Any, codebook_tokens: int) -> Tokenizer:
    """The vocabulary that `data.tokenizer` names: "small" (embedded) or the path of a LLaMA `tokenizer.model`."""
    if data.tokenizer == "small":
        return small_tokenizer(codebook_tokens)
    return llama_tokenizer(data.tokenizer, codebook_tokens)


def build_library(data: Any) -> ThingLibrary:
    """The cut-out pictures that scenes are composed of: "builtin", or "photos" from the folder `data.folder`."""
    if data.name == "builtin":
        return builtin_library()
    if data.name == "photos":
        from pixelstory_jax.data.builtin.cutouts import cutout_library

        return cutout_library(data.folder)
    raise ValueError(f"Unknown data {data.name!r}; known are builtin and photos.")


def build_layout(config: Any) -> Layout:
    """Static sizes of an example, from the `model` and `data` sections."""
    data, model = config.data, config.model
    if data.style not in SYSTEM_PROMPTS:
        raise ValueError(f"Unknown data.style {data.style!r}; known are {', '.join(SYSTEM_PROMPTS)}.")
    return Layout(
        canvas=model.vision.canvas,
        questions=data.questions,
        length=data.length,
        slots=data.get("slots", 0),
        image_tokens=model.image_tokens_side**2,
        style=data.style,
    )


def build_scenes(config: Any, split: str, seed: int) -> AskedScenes:
    """Scenes with conversations of one split."""
    data = config.data
    return AskedScenes(
        library=build_library(data),
        seed=seed,
        split=split,
        size=config.model.vision.canvas,
        conversations=data.conversations,
        kinds=dict(data.kinds),
    )


def build_source(
    config: Any, split: str = "train", seed: int | None = None
) -> SegmentationExamples | PretrainingExamples:
    """The source of examples that `config.objective` trains on."""
    scenes = build_scenes(config, split, config.seed if seed is None else seed)
    tokenizer = build_tokenizer(config.data, config.model.codebook_tokens * len(config.model.feature_layers))
    layout = build_layout(config)
    if config.objective == "pretraining":
        return PretrainingExamples(
            scenes,
            tokenizer,
            layout,
            class_numbers(scenes.library),
            config.data.boxes_in_captions,
            config.data.presence,
        )
    return SegmentationExamples(scenes, tokenizer, layout)


def class_numbers(library: ThingLibrary) -> dict[str, int]:
    """Numbers of the trained names, from 1 (0 is background)."""
    return {library.things[index].name: number for number, index in enumerate(library.pool("train"), start=1)}
