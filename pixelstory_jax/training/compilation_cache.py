"""Compiled programs are kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OFF = ("", "off")


def set_compilation_cache() -> Path | None:
    """Keeps compiled programs under the user's cache folder, and returns where; None where they are not kept.

    JAX_COMPILATION_CACHE_DIR names another folder; empty or "off" switches this off. So does, silently, a folder that
    cannot be written, as in a read-only container.
    """
    named = os.environ.get(VARIABLE)
    if named is not None and named.lower() in OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    cache = named or getattr(jax.config, "jax_compilation_cache_dir", None) or _writable_default()
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    return None if cache is None else Path(cache)


def _writable_default() -> Path | None:
    try:
        root = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(root) if root else Path.home() / ".cache") / "pixelstory_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter where nobody has a home
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
