"""Where compiled programs are kept, each time in a process of its own: JAX reads its settings once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from pixelstory_jax.training.compilation_cache import set_compilation_cache
print(set_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(7))
"""


def cache_of(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "rror" not in result.stderr
    return result.stdout.strip()


def test_programs_are_kept_in_the_folder_of_the_user(tmp_path):
    assert cache_of(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "pixelstory_jax" / "xla")
    assert any((tmp_path / "pixelstory_jax" / "xla").iterdir())
    assert cache_of(XDG_CACHE_HOME="", HOME=str(tmp_path)) == str(tmp_path / ".cache" / "pixelstory_jax" / "xla")


def test_the_variable_of_jax_wins(tmp_path):
    assert cache_of(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    assert any((tmp_path / "mine").iterdir()) and not (tmp_path / "pixelstory_jax").exists()


@pytest.mark.parametrize("value", ["", "off", "OFF"])
def test_the_cache_can_be_switched_off(tmp_path, value):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": value}
    assert cache_of(**environment, PYTHONPATH=os.getcwd()) == "None"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert cache_of(XDG_CACHE_HOME=str(tmp_path / "file")) == "None"
