"""From the `data` section of a config to sources of examples: one place that knows every name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pixelstory_jax.data.asking import Asking
from pixelstory_jax.data.builtin.characters import Cast, builtin_cast
from pixelstory_jax.data.builtin.questions import AskedScenes
from pixelstory_jax.data.builtin.stories import StorySource
from pixelstory_jax.data.builtin.things import ThingLibrary, builtin_library
from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_START, read_tiny_autoencoder
from pixelstory_jax.data.cached_stories import TOKEN_FIELDS, CachedStories
from pixelstory_jax.data.clip_tokenizer import ClipTokenizer, small_clip_tokenizer
from pixelstory_jax.data.conversations import STYLES
from pixelstory_jax.data.encoded_stories import EncodedStories
from pixelstory_jax.data.examples import Layout, PretrainingExamples, SegmentationExamples
from pixelstory_jax.data.labelled_panels import LabelledPanels
from pixelstory_jax.data.mixture import Group, Mixture, check_weights
from pixelstory_jax.data.pictures import Pictures
from pixelstory_jax.data.pipeline import Source
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.story_folder import StoryFolder
from pixelstory_jax.data.tokenizers import Tokenizer, json_tokenizer, llama_tokenizer, small_tokenizer


def build_tokenizer(data: Any, codebook_tokens: int) -> Tokenizer:
    """The vocabulary that `data.tokenizer` names: "small" (embedded), a `tokenizer.model` or a `tokenizer.json`.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if data.tokenizer == "small":
        return small_tokenizer(codebook_tokens)
    if not Path(data.tokenizer).is_file():
        raise ValueError(
            f"There is no tokenizer {data.tokenizer}; config.data.tokenizer has to name the tokenizer.model or "
            "tokenizer.json that came with the weights."
        )
    if data.tokenizer.endswith(".json"):
        return json_tokenizer(data.tokenizer, codebook_tokens)
    return llama_tokenizer(data.tokenizer, codebook_tokens)


def build_library(data: Any) -> ThingLibrary:
    """The cut-out pictures that scenes are composed of: "builtin", or "photos" from the folder `data.folder`.

    What was trained on a "mixture" is asked about embedded scenes, where `eval.splits` says so.
    """
    if data.name in ("builtin", "mixture"):
        return builtin_library()
    if data.name == "photos":
        from pixelstory_jax.data.builtin.cutouts import cutout_library

        return cutout_library(data.folder)
    raise ValueError(f"Unknown data {data.name!r}; known are builtin, photos and mixture.")


def build_layout(config: Any) -> Layout:
    """Static sizes of an example, from the `model` and `data` sections."""
    data, model = config.data, config.model
    if data.style not in STYLES:
        raise ValueError(f"Unknown data.style {data.style!r}; known are {', '.join(STYLES)}.")
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


def build_mixture(config: Any, seed: int) -> Mixture:
    """The training data of the paper, or what else `data.mixture` names, from below `data.folder`.

    Raises:
      ValueError: a config without a mixture, weights that are no shares, more questions than rows, an unknown data set,
        or a folder that is not as its data set has it.
    """
    data = config.data
    if "mixture" not in data:
        raise ValueError(
            "This config has no data.mixture; choose the variant that has, as pixellm.py:tiny,data=mixture."
        )
    asking = Asking(data.wording, data.asked, data.asked_targets)
    if data.asked > data.questions:
        raise ValueError(f"data.asked={data.asked} questions about a picture need as many rows, data.questions.")
    check_weights({name: group.weight for name, group in data.mixture.items()})
    groups = [
        Group(name, group.weight, tuple(open_reader(one, data.folder) for one in group.sets))
        for name, group in data.mixture.items()
        if group.weight
    ]
    return Mixture(groups, asking, seed)


def build_source(config: Any, split: str = "train", seed: int | None = None) -> Source:
    """The source of examples that `config.objective` trains on."""
    if config.objective == "storydiffusion":
        return build_stories(config, split, config.seed if seed is None else seed)
    if config.objective == "autoencoder":
        return Pictures(seed=config.seed if seed is None else seed, split=split, **config.data)
    if config.objective == "panel_classifier":
        return LabelledPanels(seed=config.seed if seed is None else seed, **config.data)
    seed = config.seed if seed is None else seed
    tokenizer = build_tokenizer(config.data, config.model.codebook_tokens * len(config.model.feature_layers))
    layout = build_layout(config)
    scenes: Any = build_mixture(config, seed) if config.data.name == "mixture" else build_scenes(config, split, seed)
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


def build_cast(data: Any, split: str) -> Cast:
    """The characters that stories are about: "builtin", or "wesnoth" from the folder `data.folder`."""
    if data.name == "builtin":
        return builtin_cast()
    if data.name == "wesnoth":
        from pixelstory_jax.data.builtin.wesnoth import wesnoth_cast

        return wesnoth_cast(data.folder, split)
    raise ValueError(f"Unknown data {data.name!r}; known are builtin, wesnoth, folder and cached.")


def story_tokenizers(config: Any) -> dict[str, ClipTokenizer]:
    """Tokenizers by encoder name: the small one that ships with the package, or those of a diffusers folder.

    Without `data.tokenizer` they are those of the first source of `init_from`, a pipeline or a checkpoint.

    Raises:
      ValueError, CheckpointError: there are none, or they cannot be read.
    """
    if config.data.tokenizer == "small":
        return {"text": small_clip_tokenizer()}
    folder = Path(config.data.tokenizer)
    if not config.data.tokenizer:
        from pixelstory_jax.interop.hub import resolve_source
        from pixelstory_jax.interop.start_weights import is_checkpoint, split_sources
        from pixelstory_jax.training.checkpoints import find_checkpoint, read_config

        first = next((source for _, source in split_sources(config.init_from)), "")
        if is_checkpoint(Path(first).expanduser()):
            return story_tokenizers(ConfigDict(read_config(find_checkpoint(Path(first).expanduser()))))
        folder = resolve_source(first)
        if folder.is_file():
            raise ValueError(f"{first} has no tokenizers; name the folder of a pipeline as config.data.tokenizer.")
    names = {"text": "tokenizer", **({"text_2": "tokenizer_2"} if config.model.text_2 else {})}
    return {name: ClipTokenizer.from_folder(folder / part) for name, part in names.items()}


def build_stories(config: Any, split: str, seed: int) -> Source:
    """Stories of one split: embedded, of pictures of the user's own, or cached (these have one split only).

    Embedded ones come with latents in place of pictures where `data.encoded` says how many.

    Raises:
      ValueError: an unknown name, or a folder that cannot be used.
    """
    data = config.data
    if data.name == "cached":
        return CachedStories(data.folder, seed, data.draws)
    if data.name == "folder":
        encoders = {TOKEN_FIELDS[name]: tokenizer.encode for name, tokenizer in story_tokenizers(config).items()}
        return StoryFolder(data.folder, encoders, seed, split, data.size, data.panels, data.draws)
    stories = StorySource(
        build_cast(data, split),
        story_tokenizers(config)["text"].encode,
        seed,
        split,
        data.size,
        data.panels,
        data.named,
        data.empty,
        data.pairs,
    )
    if not data.encoded:
        return stories
    if config.init_from != TINY_START:
        raise ValueError("data.encoded is for config.init_from=tiny_autoencoder; set it to 0.")
    return EncodedStories(stories, *read_tiny_autoencoder(), data.encoded, seed)


def class_numbers(library: ThingLibrary) -> dict[str, int]:
    """Numbers of the trained names, from 1 (0 is background)."""
    return {library.things[index].name: number for number, index in enumerate(library.pool("train"), start=1)}
