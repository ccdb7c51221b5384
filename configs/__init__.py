"""Configurations: python -m experiments.train --config=configs/NAME.py:variant,option=value."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from pixelstory_jax.training.options import ProfileOptions, TrainOptions


def parse_variant(argument: str | None, variants: tuple[str, ...], **options: str) -> tuple[str, dict[str, str]]:
    """Reads what follows the colon of `--config=file.py:variant,option=value`.

    Args:
      argument: the text, may be empty; the variant comes first and defaults to the first of `variants`.
      options: known options with their defaults.

    Raises:
      ValueError: an unknown variant or option, with what is known.
    """
    parts = [part for part in (argument or "").split(",") if part]
    variant = parts.pop(0) if parts and "=" not in parts[0] else variants[0]
    if variant not in variants:
        raise ValueError(f"Unknown variant {variant!r}; this config has {', '.join(variants)}.")
    for part in parts:
        key, _, value = part.partition("=")
        if key not in options:
            raise ValueError(f"Unknown option {key!r} after the colon; this config has {', '.join(options) or 'none'}.")
        options[key] = value
    return variant, options


def train_section(values: dict[str, Any]) -> ConfigDict:
    """The section `train`: `values`, completed by the trainer's defaults, so that every field can be overridden."""
    section = {**dataclasses.asdict(TrainOptions()), **values}
    for field in dataclasses.fields(TrainOptions):
        if field.type == "float":  # a whole number here would refuse fractions, as in --config.train.warmup_steps=0.05
            section[field.name] = float(section[field.name])
    return ConfigDict(section)


def profile_section() -> ConfigDict:
    """The section `profile`: which steps to trace (docs/training.md)."""
    return ConfigDict(dataclasses.asdict(ProfileOptions()))


def as_config(sizes: Any) -> ConfigDict:
    """A frozen dataclass of sizes (and those in it) as a ConfigDict, so that every field can be overridden."""
    return ConfigDict(dataclasses.asdict(sizes))
