"""refCOCO, refCOCO+ and refCOCOg as TensorFlow Datasets prepares them (`ref_coco`), for those who have that already.

ref_coco/refcoco_unc/1.1.0/ref_coco-train.tfrecord-00000-of-000NN

Expressions are there as people wrote them, not in the cleaned form of REFER's own lists; categories are numbers only.
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.images import open_image
from pixelstory_jax.data.readers import refer
from pixelstory_jax.data.readers.tfds_folder import TfdsFolder

CONFIGS = {
    "refcoco_unc": "refcoco|unc",
    "refcoco_google": "refcoco|google",
    "refcocoplus_unc": "refcoco+|unc",
    "refcocog_umd": "refcocog|umd",
    "refcocog_google": "refcocog|google",
}
SPLITS = {
    config: tuple(split for split in refer.SPLITS[key] if split != "test" or "testA" not in refer.SPLITS[key])
    for config, key in CONFIGS.items()
}


def layout(config: str) -> tuple[str, ...]:
    """Lines for people."""
    return (f"ref_coco/{config}/1.1.0/ref_coco-train.tfrecord-00000-of-000NN, or array_record for tfrecord",)


class TfdsRefCoco:
    """An expression is a request, the object that it refers to its region.

    Raises:
      LayoutError: the files are missing or not all there.
    """

    def __init__(self, root: Path, split: str, config: str) -> None:
        self.name, self.split = f"tfds:ref_coco/{config}", split
        stored = "validation" if split == "val" else split
        self.records = TfdsFolder(root / "ref_coco" / config, "ref_coco", stored, layout(config))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Annotation:
        try:
            record = self.records[index]
            masks = [open_image(mask)[..., 0] > 0 for mask in record["objects/mask"]]
            ids, picture = record["objects/id"], str(record["image/id"][0])
            words = record["objects/refexp/raw/ragged_flat_values"]
            numbers = record["objects/refexp/refexp_id/ragged_flat_values"]
            targets = [
                target
                for target, count in enumerate(record["objects/refexp/raw/ragged_row_lengths_0"])
                for _ in range(count)
            ]
            return Annotation(
                size=(masks[0].shape[0], masks[0].shape[1]),
                task="names",
                regions=tuple(Region(mask, id=str(one)) for mask, one in zip(masks, ids, strict=True)),
                requests=tuple(
                    Request((text.decode().strip(),), (target,), id=str(number))
                    for text, target, number in zip(words, targets, numbers, strict=True)
                    if text.strip()
                ),
                provenance=Provenance(self.name, self.split, f"COCO_train2014_{picture.zfill(12)}.jpg", picture),
            )
        except (ValueError, KeyError, IndexError) as error:
            raise AnnotationError(f"{self.name}, record {index} of {self.split} is damaged: {error}") from error

    def picture(self, index: int) -> bytes:
        try:
            return self.records[index]["image"][0]
        except (ValueError, KeyError, IndexError) as error:
            raise AnnotationError(f"{self.name}, record {index} of {self.split} is damaged: {error}") from error
