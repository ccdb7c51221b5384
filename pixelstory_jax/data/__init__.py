"""From files to static-shaped batches."""

from pixelstory_jax.data.sources import build_source

__all__ = ["build_source"]
