"""The embedded data: named pictures, backgrounds, and what composes them into scenes with questions."""

from pixelstory_jax.data.builtin.questions import KIND_WEIGHTS, KINDS, AskedScenes, Conversation, Question, ask
from pixelstory_jax.data.builtin.scenes import SPLITS, Scene, compose
from pixelstory_jax.data.builtin.things import Thing, ThingLibrary, builtin_library

__all__ = [
    "KINDS",
    "KIND_WEIGHTS",
    "SPLITS",
    "AskedScenes",
    "Conversation",
    "Question",
    "Scene",
    "Thing",
    "ThingLibrary",
    "ask",
    "builtin_library",
    "compose",
]
