"""The embedded data: named pictures, backgrounds, and what composes them into scenes with questions."""

from pixelstory_jax.data.builtin.scenes import SPLITS, Scene, compose
from pixelstory_jax.data.builtin.things import Thing, ThingLibrary, builtin_library

__all__ = ["SPLITS", "Scene", "Thing", "ThingLibrary", "builtin_library", "compose"]
