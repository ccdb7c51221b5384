"""Every miniature: importing this fills `MAKERS`."""

from tests.data.readers import miniature_coco, miniature_language, miniature_semantic, miniature_tfds  # noqa: F401
from tests.data.readers.miniature import MAKERS

__all__ = ["MAKERS"]
