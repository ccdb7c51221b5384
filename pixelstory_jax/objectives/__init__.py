"""What is trained: each objective has init, loss and evaluate, and knows no mesh and no file."""

from pixelstory_jax.objectives.build import build_objective

__all__ = ["build_objective"]
