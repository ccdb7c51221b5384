"""The readers by name, and how one is opened."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pixelstory_jax.data.readers import (
    ade20k,
    coco_instances,
    cocostuff,
    llava_instruct,
    mapillary,
    muse,
    paco_lvis,
    pascal_part,
    reason_seg,
    refer,
    tfds_ref_coco,
    tfds_sets,
)
from pixelstory_jax.data.readers.packed import Packed, set_name
from pixelstory_jax.data.readers.reader import LayoutError, Reader

PACKED = "packed"


@dataclass(frozen=True)
class Entry:
    """open(root, split) makes the reader; splits: their names; layout: lines for people, below the root; takes: what
    may follow the name behind a colon, a third argument of `open`."""

    open: Callable[..., Reader]
    splits: tuple[str, ...]
    layout: tuple[str, ...]
    takes: str = ""


READERS: dict[str, Entry] = {
    "ade20k": Entry(ade20k.open_ade20k, tuple(ade20k.SPLITS), ade20k.LAYOUT),
    "cocostuff": Entry(cocostuff.open_cocostuff, tuple(cocostuff.SPLITS), cocostuff.LAYOUT),
    "mapillary": Entry(mapillary.open_mapillary, tuple(mapillary.SPLITS), mapillary.LAYOUT),
    "paco_lvis": Entry(paco_lvis.open_paco_lvis, paco_lvis.SPLITS, paco_lvis.LAYOUT),
    "pascal_part": Entry(pascal_part.open_pascal_part, pascal_part.SPLITS, pascal_part.LAYOUT),
    "coco_instances": Entry(
        coco_instances.open_coco_instances, coco_instances.SPLITS, coco_instances.LAYOUT, "ANNOTATIONS.json:PICTURES"
    ),
    "reason_seg": Entry(reason_seg.ReasonSeg, reason_seg.SPLITS, reason_seg.LAYOUT),
    "llava_instruct_150k": Entry(llava_instruct.LlavaInstruct, llava_instruct.SPLITS, llava_instruct.LAYOUT),
    "muse": Entry(muse.Muse, tuple(muse.FILES), muse.LAYOUT),
    **{
        name: Entry(partial(make, name=name), refer.SPLITS[key], refer.layout(key))
        for make, names in (
            (refer.open_referring, refer.NAMES),
            (refer.open_multi_referring, refer.MULTI_NAMES),
        )
        for name, key in names.items()
    },
    **{
        f"tfds:ref_coco/{config}": Entry(
            partial(tfds_ref_coco.TfdsRefCoco, config=config),
            tfds_ref_coco.SPLITS[config],
            tfds_ref_coco.layout(config),
        )
        for config in tfds_ref_coco.CONFIGS
    },
    "tfds:scene_parse150": Entry(
        tfds_sets.open_scene_parse, tuple(tfds_sets.SCENE_PARSE_SPLITS), tfds_sets.SCENE_PARSE_LAYOUT
    ),
    "tfds:coco/2017_panoptic": Entry(
        tfds_sets.open_panoptic, tuple(tfds_sets.PANOPTIC_SPLITS), tfds_sets.PANOPTIC_LAYOUT
    ),
}


def open_reader(name: str, root: str | Path, split: str = "train") -> Reader:
    """The reader of one split of a data set below the folder `root`.

    Where there is a folder `root`/packed/NAME-SPLIT, that is read (`readers/packed.py`), else the official layout.

    Args:
      name: one of `READERS`, with a colon and more behind it where its entry takes that ("coco_instances:a.json:b").

    Raises:
      ValueError: an unknown data set or split.
      LayoutError: the folder is not as expected.
    """
    folder = packed_folder(name, root, split)
    return Packed(folder) if folder.is_dir() else open_folder(name, root, split)


def packed_folder(name: str, root: str | Path, split: str) -> Path:
    """Where the packed form of a split is, if there is one."""
    return Path(root).expanduser() / PACKED / set_name(name, split)


def open_folder(name: str, root: str | Path, split: str = "train") -> Reader:
    """The reader of the official layout, whether there is a packed form of it or not; errors as `open_reader`."""
    base, _, more = name.partition(":")
    base, more = (base, more) if base in READERS and READERS[base].takes else (name, "")
    if base not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(READERS)}."
        raise ValueError(f"Unknown data set {name!r}; {hint}")
    entry = READERS[base]
    if split not in entry.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(entry.splits)}.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise LayoutError(
            f"There is no folder {folder}. For {name} it should hold:\n" + "\n".join(f"  {x}" for x in entry.layout)
        )
    return entry.open(folder, split, more) if more else entry.open(folder, split)
