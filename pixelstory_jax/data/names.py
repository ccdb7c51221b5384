"""Labels of data sets in plain English."""

from __future__ import annotations

import re

_PLAIN = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "tvmonitor": "television",
    "tv/monitor": "television",
    "playingfield": "playing field",
}
_NAMELESS = frozenset({"background", "ignore", "ignored", "unlabeled", "unlabelled", "void", ""})


def plain_name(label: str) -> str:
    """The label as one would say it; "" for one that names nothing ("__ignore__", "background").

    Underscores are spaces, a qualifier in brackets as LVIS has it ("bow_(weapon)") is dropped, names that PASCAL VOC
    writes as one word are known.
    """
    name = " ".join(re.sub(r"[_ ]\(.*", "", label).replace("_", " ").split())
    if label.startswith("_") or name.lower() in _NAMELESS:
        return ""
    return _PLAIN.get(name.lower(), name)
