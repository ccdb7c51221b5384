"""What the settings files (`config.json`) of transformers say, checked against what our networks can do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixelstory_jax.interop.tensors import WeightsError

DTYPE_KEYS = ("dtype", "torch_dtype")  # the first since transformers 5


def read_json(path: Path, owner: str = "") -> dict[str, Any]:
    """A JSON table from a file; `owner` is what has such a file, for the message where it is absent.

    Raises:
      WeightsError: absent, unreadable, or something else.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        has = f"; {owner} has it" if owner else ""
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}){has}.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}).") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path} is not a table of settings.")
    return table


def json_text(table: Mapping[str, Any]) -> str:
    """As transformers writes its files."""
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def check_unquantised(settings: Mapping[str, Any]) -> None:
    """Raises WeightsError where the weights are quantised."""
    quantised = settings.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "a way of its own") if isinstance(quantised, Mapping) else quantised
        raise WeightsError(f"The weights are quantised ({method}); floating-point ones, or a GGUF file, can be read.")


def need(settings: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Raises WeightsError where one of `names`, all of them sizes, is absent or no whole number."""
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise WeightsError(f"The settings of the {what} lack {', '.join(missing)}.")
    wrong = [f"{name}={settings[name]!r}" for name in names if type(settings[name]) is not int]
    if wrong:
        raise WeightsError(f"The settings of the {what} have {', '.join(wrong)}; whole numbers are needed.")


def check_known(settings: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], what: str) -> None:
    """Raises WeightsError where a setting has a value that is not implemented; `known` lists those that are.

    A setting that is null is taken as one that is absent.
    """
    for name, values in known.items():
        if settings.get(name) is not None and settings[name] not in values:
            raise WeightsError(
                f"The {what} has {name}={settings[name]!r}; {' or '.join(map(repr, values))} is what can be read."
            )


def compute_dtype(settings: Mapping[str, Any]) -> str:
    """The dtype that the settings name for computing; float32 where they name none."""
    named = next((settings[key] for key in DTYPE_KEYS if settings.get(key)), "float32")
    return named if named in ("bfloat16", "float16") else "float32"
