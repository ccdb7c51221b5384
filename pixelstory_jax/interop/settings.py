"""What the settings files (`config.json`) of transformers say, checked against what our networks can do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixelstory_jax.interop.tensors import WeightsError

DTYPE_KEYS = ("dtype", "torch_dtype")  # the first since transformers 5


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table from a file.

    Raises:
      WeightsError: absent, unreadable, or something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}).") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path} is not a table of settings.")
    return table


def json_text(table: Mapping[str, Any]) -> str:
    """As transformers writes its files."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def need(settings: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Raises WeightsError where one of `names` is absent."""
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise WeightsError(f"The settings of the {what} lack {', '.join(missing)}.")


def check_known(settings: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Raises WeightsError where a setting has a value that is not implemented; `known` lists those that are."""
    for name, values in known.items():
        if name in settings and settings[name] not in values:
            raise WeightsError(
                f"The {what} has {name}={settings[name]!r}; {' or '.join(map(repr, values))} is what can be read."
            )


def compute_dtype(settings: Mapping[str, Any]) -> str:
    """The dtype that the settings name for computing; float32 where they name none."""
    named = next((settings[key] for key in DTYPE_KEYS if settings.get(key)), "float32")
    return named if named in ("bfloat16", "float16") else "float32"
