"""From a config to its objective: one place that knows every name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from pixelstory_jax.data.builtin.start import StartError, is_own_file, read_start, start_name
from pixelstory_jax.data.builtin.tiny_autoencoder import TINY_START, read_tiny_autoencoder
from pixelstory_jax.data.cached_stories import CachedStories, encoder_params
from pixelstory_jax.data.pipeline import Source, stack_examples
from pixelstory_jax.data.sources import build_cast, build_library, build_source, build_tokenizer, class_numbers
from pixelstory_jax.inference.painter import Painter, PaintOptions
from pixelstory_jax.inference.sharing import SharingPlan
from pixelstory_jax.interop.tensors import WeightsError
from pixelstory_jax.models.paths import flatten
from pixelstory_jax.models.pixellm import PixelLMConfig
from pixelstory_jax.models.sizes import sizes_from_config
from pixelstory_jax.models.story_diffusion import StoryDiffusionConfig
from pixelstory_jax.objectives.objective import Evaluation, Objective, Params

FITTING = 16  # of that many examples at the start of the data, one must hold a conversation


def check_length(source: Any, data: Any) -> None:
    """Raises ValueError where the rows of the layout are too short for every one of the first conversations."""
    if not any(source[index]["token_valid"].any() for index in range(min(FITTING, len(source)))):
        raise ValueError(
            f"No conversation of the first {FITTING} examples fits into data.length={data.length} tokens (image tokens "
            f"included) and data.slots={data.get('slots', 0)} masks; set a larger data.length."
        )


def check_counts(section: Any, *names: str) -> None:
    """Raises ValueError where a named field of `config.eval`, whose turn would come hours later, is below 1."""
    for name in names:
        if section[name] < 1:
            raise ValueError(f"eval.{name} is {section[name]}; at least 1 is needed.")


def check_answers(config: Any, model: PixelLMConfig) -> None:
    """Raises ValueError where `config.eval` cannot be answered: nothing to ask, or no room for question and answer."""
    check_counts(config.eval, "examples", "quick_examples", "batch_size", "max_new_tokens")
    if not config.eval.splits:
        raise ValueError("eval.splits is empty; at least one split is needed, as ('test',).")
    length, new, most = config.data.length, config.eval.max_new_tokens, model.llama.max_length
    if length >= most:
        raise ValueError(f"data.length={length} leaves no room for an answer in model.llama.max_length={most}.")
    if length + new > most:
        raise ValueError(
            f"eval.max_new_tokens={new} behind a prompt of data.length={length} is more than "
            f"model.llama.max_length={most}; set eval.max_new_tokens to at most {most - length}."
        )


def check_frozen(config: Any, start: Iterable[str]) -> None:
    """Raises StartError where a part is frozen that is not among `start`, the paths of the starting weights."""
    parts = {"vision": ("vision/", "vision tower"), "language_model": ("llama/", "language model")}
    bare = {
        field: name
        for field, (prefix, name) in parts.items()
        if not config.trained[field] and not any(path.startswith(prefix) for path in start)
    }
    if bare and not config.get("allow_random_frozen", False):
        switches = " and ".join(f"config.trained.{field}=True" for field in bare)
        raise StartError(
            f"The {' and the '.join(bare.values())} would stay frozen at random initialisation: set config.init_from "
            f"to a file of weights, or {switches} (config.allow_random_frozen=True for a dry run)."
        )


def start_weights(config: Any) -> Mapping[str, Any]:
    """What a run that starts anew begins with. Only such a run reads the file: to resume or to evaluate needs none.

    Raises:
      StartError: the file cannot be read, or lacks a part that stays frozen.
    """
    weights = pixellm_weights(config)
    check_frozen(config, weights)
    return weights


def pixellm_weights(config: Any) -> Mapping[str, Any]:
    """The arrays, or LazyArrays, that `config.init_from` names, by slash path.

    Raises:
      StartError: a source cannot be read or does not fit; one sentence, or a list of tensors.
    """
    from pixelstory_jax.interop.start_weights import pixellm_start

    if config.init_from in ("", "builtin") or is_own_file(config.init_from):
        return read_start(config.init_from)
    try:
        return pixellm_start(config.init_from, sizes_from_config(PixelLMConfig, config.model))
    except WeightsError as error:
        raise StartError(f"The starting weights that config.init_from names cannot be read: {error}") from error


def check_builtin_start(config: Any, model: PixelLMConfig) -> None:
    """Raises ValueError that names the fields in which `model` differs from what the shipped weights were made for."""
    shipped = PixelLMConfig.tiny()
    free = ("dtype", "remat", "lora", "max_length")  # of no matter to the arrays
    pairs: dict[str, tuple[Any, Any]] = {
        f"model.{part}.{field.name}": (getattr(has, field.name), getattr(needs, field.name))
        for part, has, needs in (("vision", model.vision, shipped.vision), ("llama", model.llama, shipped.llama))
        for field in dataclasses.fields(needs)
        if field.name not in free
    }
    pairs["model.codebook_tokens"] = model.codebook_tokens, shipped.codebook_tokens
    pairs["number of model.feature_layers"] = model.scales, shipped.scales
    pairs["data.tokenizer"] = config.data.tokenizer, "small"
    differing = [f"{name} is {has!r}, not {needs!r}" for name, (has, needs) in pairs.items() if has != needs]
    if differing:
        raise ValueError(
            f"The shipped weights (config.init_from=builtin) do not fit: {'; '.join(differing)}; change that, or set "
            "config.init_from to other weights."
        )


def batch_spec(source: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, read off the first example."""
    return {k: jax.ShapeDtypeStruct((batch_size, *np.shape(v)), np.asarray(v).dtype) for k, v in source[0].items()}


def build_objective(config: Any, open_source: Callable[[], Source] | None = None) -> Objective:
    """The objective that `config.objective` names, with its data for evaluation.

    Args:
      open_source: gives the training data of PixelLM, which is opened anew if left out. Lists of large data sets take
        minutes to read, so whoever needs the data too gives a function that reads them once.

    Raises:
      ValueError: an unknown name, or sizes that do not fit together.
    """
    builders: dict[str, Callable[[Any], Objective]] = {
        "pixellm": lambda config: _pixellm(config, open_source or (lambda: build_source(config, "train"))),
        "storydiffusion": _storydiffusion,
        "pretraining": _pretraining,
        "autoencoder": _autoencoder,
        "panel_classifier": _panel_classifier,
    }
    if config.objective not in builders:
        raise ValueError(f"Unknown objective {config.objective!r}; known are {', '.join(builders)}.")
    return builders[config.objective](config)


def name_tokens(config: Any) -> np.ndarray:
    """[K, n] ids of the trained names in the order of their class numbers, padded with -1."""
    tokenizer = build_tokenizer(config.data, config.model.codebook_tokens * len(config.model.feature_layers))
    ids = [tokenizer.encode(name) for name in class_numbers(build_library(config.data))]
    return np.array([row + [-1] * (max(map(len, ids)) - len(row)) for row in ids], np.int32)


def _autoencoder(config: Any) -> Objective:
    from pixelstory_jax.objectives.autoencoder import build_autoencoder_objective

    return build_autoencoder_objective(config)


def _panel_classifier(config: Any) -> Objective:
    from pixelstory_jax.objectives.panel_classifier import build_panel_classifier_objective

    return build_panel_classifier_objective(config)


def _pretraining(config: Any) -> Objective:
    from pixelstory_jax.objectives.pretraining import PretrainingObjective

    check_counts(config.eval, "examples")
    source = build_source(config, "train")
    check_length(source, config.data)
    held_out = build_source(config, "train", seed=config.seed + 1)  # other training scenes; the test split stays unseen
    size = config.train.batch_size

    def evaluation_batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, config.eval.examples, size):
            indices = range(start, start + size)
            yield stack_examples([held_out[i] for i in indices], list(indices))

    return PretrainingObjective(
        sizes_from_config(PixelLMConfig, config.model),
        classes=len(class_numbers(build_library(config.data))) + 1,
        batch_spec=batch_spec(source, size),
        evaluation_batches=evaluation_batches,
        dense_weight=config.dense_weight,
        alignment_weight=config.alignment_weight,
        name_tokens=name_tokens(config),
        train_tower=config.train_tower,
        start=lambda: pixellm_weights(config),
        start_name=start_name(config.init_from),
    )


def _pixellm(config: Any, open_source: Callable[[], Source]) -> Objective:
    from pixelstory_jax.evaluation.generated import AnswerEvaluator
    from pixelstory_jax.objectives.pixellm import LossWeights, PixelLMObjective, Trained

    model = sizes_from_config(PixelLMConfig, config.model)
    tokenizer = build_tokenizer(config.data, model.group)
    if tokenizer.vocab_size > model.llama.vocab:
        raise ValueError(f"The tokenizer has {tokenizer.vocab_size} ids, model.llama.vocab is {model.llama.vocab}.")
    if config.init_from == "builtin":
        check_builtin_start(config, model)
    check_answers(config, model)
    source = open_source()
    check_length(source, config.data)
    return PixelLMObjective(
        model,
        batch_spec=batch_spec(source, config.train.batch_size),
        weights=LossWeights(**config.loss),
        trained=Trained(**config.trained),
        evaluator=AnswerEvaluator(config, model, tokenizer),
        start=lambda: start_weights(config),
        start_name=start_name(config.init_from),
    )


def check_cache(config: Any, stories: CachedStories) -> None:
    """Raises ValueError where cached stories were made for other sizes than the config's."""
    index, model = stories.index, config.model
    pairs = {
        "data.size": (config.data.size, index.picture_size),
        "data.panels": (config.data.panels, index.fields["mean"][0]),
        "model.unet.context_width": (model.unet.context_width, index.fields["context"][-1]),
    }
    differing = [f"{name} is {has}, the cache has {made}" for name, (has, made) in pairs.items() if has != made]
    if differing:
        raise ValueError(f"The cached stories in {config.data.folder} do not fit: {'; '.join(differing)}.")


def story_evaluator(config: Any, painter: Painter) -> Callable[[Params, int], Evaluation]:
    """What scores or shows generated stories: a classifier for the embedded characters, else a sheet to look at."""
    from pixelstory_jax.evaluation.panel_classifier import read_panel_classifier
    from pixelstory_jax.evaluation.stories import StoryEvaluator, StorySheet

    size, section = config.data.size, config.eval
    check_counts(section, "stories", "quick_stories", "batch_size")
    options = PaintOptions(
        section.steps, section.guidance, guide_sharing=section.guide_sharing, height=size, width=size
    )
    plan = SharingPlan("joint", window=0, rate=section.rate)
    if config.data.name != "builtin":
        return StorySheet(painter, options, plan, section.prompts, section.seed)
    return StoryEvaluator(
        painter,
        options,
        plan,
        build_cast(config.data, "test"),
        read_panel_classifier(),
        config.train.steps,
        config.data.panels,
        section.stories,
        section.quick_stories,
        section.sweep_stories,
        tuple(section.rates),
        section.batch_size,
        section.sheet,
        section.seed,
    )


def _storydiffusion(config: Any) -> Objective:
    from pixelstory_jax.objectives.storydiffusion import DiffusionLoss, StoryDiffusionObjective

    if not config.init_from:
        raise ValueError(
            "config.init_from is empty; name the folder of a diffusers pipeline, as --config.init_from=sdxl-base."
        )
    painter = Painter.from_config(config, {})
    size, folder = config.data.size, config.data.folder
    painter.model.config.latent_size(size, size)  # refuses sides that cannot be encoded
    source = build_source(config, "train")
    empty: Mapping[str, np.ndarray] = {name: encoder.encode("") for name, encoder in painter.tokenizers.items()}
    if isinstance(source, CachedStories):
        check_cache(config, source)
        empty = source.empty
    names = {"builtin": "six embedded characters", "wesnoth": f"the characters in {folder}"}
    start = "random initialisation" if config.init_from == TINY_START else config.init_from
    model = painter.model

    def start_weights() -> Mapping[str, Any]:
        weights = story_start(config)
        if isinstance(source, CachedStories):
            source.check_networks(model, encoder_params(model, weights))
        return weights

    return StoryDiffusionObjective(
        model.config,
        painter.sampler.schedule,
        DiffusionLoss(**config.loss),
        batch_spec(source, config.train.batch_size),
        empty,
        size,
        config.trained.text,
        config.trained.unet,
        story_evaluator(config, painter),
        start=start_weights,
        description=f"stories about {names.get(config.data.name, f'what is in {folder}')}, panels of {size} x {size} "
        f"pixels, from {start}. Trained: U-Net ({config.trained.unet})"
        f"{' and text encoder' if config.trained.text else ''}.",
        zero_empty=config.zero_negative,
    )


def story_start(config: Any) -> Mapping[str, Any]:
    """What a run that starts anew begins with, by slash path."""
    from pixelstory_jax.interop.start_weights import story_start as released_start

    if config.init_from == TINY_START:
        return {f"autoencoder/{path}": value for path, value in flatten(read_tiny_autoencoder()[1]).items()}
    try:
        model = sizes_from_config(StoryDiffusionConfig, config.model)
        return released_start(config.init_from, config.data.tokenizer or None, model, config.schedule)
    except WeightsError as error:
        raise StartError(f"The starting weights that config.init_from names cannot be read: {error}") from error
