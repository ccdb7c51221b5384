"""Configurations: python -m experiments.train --config=configs/NAME.py:variant,option=value."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict


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


def as_config(sizes: Any) -> ConfigDict:
    """A frozen dataclass of sizes (and those in it) as a ConfigDict, so that every field can be overridden."""
    return ConfigDict(dataclasses.asdict(sizes))
