"""Sizes of networks from the sections of a config."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Sizes = TypeVar("Sizes")


def sizes_from_config(kind: type[Sizes], section: Mapping[str, Any]) -> Sizes:
    """Rebuilds a frozen dataclass of sizes, and the dataclasses in it, from a section of a config.

    Raises:
      ValueError: the dataclass refuses the values.
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in section:
            continue
        value = section[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            value = sizes_from_config(typing.cast(type, hints[field.name]), value)
        elif isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    return kind(**values)
