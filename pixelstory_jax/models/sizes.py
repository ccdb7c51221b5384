"""Sizes of networks: from the sections of a config, and what is refused at once rather than deep inside a network."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Sizes = TypeVar("Sizes")
DTYPES = ("float32", "bfloat16", "float16")


def sizes_from_config(kind: type[Sizes], section: Mapping[str, Any]) -> Sizes:
    """Rebuilds a frozen dataclass of sizes, and the dataclasses in it, from a section of a config.

    Raises:
      ValueError: the dataclass refuses the values; where it is one inside, its field comes first ("llama: ...").
    """
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in section:
            continue
        value = section[field.name]
        inner = next(
            (part for part in (hints[field.name], *typing.get_args(hints[field.name])) if _is_sizes(part)), None
        )
        if inner is not None and value is not None:
            try:
                value = sizes_from_config(inner, value)
            except ValueError as error:
                raise ValueError(f"{field.name}: {error}") from error
        elif isinstance(value, list):
            value = tuple(value)
        values[field.name] = value
    return kind(**values)


def _is_sizes(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def check_sizes(sizes: Any, *names: str) -> None:
    """Raises ValueError where one of the named fields is below 1."""
    for name in names:
        if getattr(sizes, name) < 1:
            raise ValueError(f"{name} is {getattr(sizes, name)}; at least 1 is needed.")


def check_choice(sizes: Any, name: str, known: Collection[str]) -> None:
    """Raises ValueError where the named field is none of `known`."""
    if getattr(sizes, name) not in known:
        raise ValueError(f"{name} is {getattr(sizes, name)!r}; known are {', '.join(known)}.")
