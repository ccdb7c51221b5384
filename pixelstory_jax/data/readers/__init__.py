"""One file per data set: from its official folder layout to `data.annotations.Annotation`."""

from pixelstory_jax.data.readers.registry import READERS, open_folder, open_reader

__all__ = ["READERS", "open_folder", "open_reader"]
