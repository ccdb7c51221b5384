"""Referring expressions: refCLEF, refCOCO, refCOCO+, refCOCOg and gRefCOCO, in the layout of the REFER code.

refer_seg/{set}/refs({list}).p      expressions: a pickle of plain values (gRefCOCO: grefs(unc).json or .p)
refer_seg/{set}/instances.json      pictures and masks in COCO's form; refCLEF has lists of run lengths for polygons
refer_seg/images/mscoco/images/train2014/*.jpg, of refCLEF refer_seg/images/saiapr_tc-12/*/images/*.jpg

Source of the rules: `utils/refer.py`, `utils/grefer.py` and `utils/dataset.py` (`ValDataset`) of PixelLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.builtin.wording import listed
from pixelstory_jax.data.readers.plain_pickle import read_plain_pickle
from pixelstory_jax.data.readers.reader import LayoutError, need, picture_path, read_file, read_json

_UNC = ("train", "val", "testA", "testB", "test")
SPLITS: dict[str, tuple[str, ...]] = {
    "refclef|unc": ("train", "val", "testA", "testB", "testC", "test"),
    "refclef|berkeley": ("train", "val", "test"),
    "refcoco|unc": _UNC,
    "refcoco|google": ("train", "val", "test"),
    "refcoco+|unc": _UNC,
    "refcocog|umd": ("train", "val", "test"),
    "refcocog|google": ("train", "val"),
    "grefcoco|unc": _UNC[:-1],
}
"""Set and list of expressions -> splits. The first list of a set is meant where none is named."""

NAMES: dict[str, str] = {key.split("|")[0]: key for key in reversed(SPLITS)} | {key: key for key in SPLITS}
"""What a set may be called -> set and list."""

MULTI_NAMES = {f"multi_{name}": NAMES[name] for name in ("refcoco", "refcoco+", "refcocog")}

CHUNKS = (6, 5, 4)  # expressions in the questions of the multi-referring protocol, in turn
NO_TARGET = "-1"  # gRefCOCO's annotation of an expression for which nothing in the picture stands


def layout(key: str) -> tuple[str, ...]:
    """Lines for people."""
    name, expressions = key.split("|")
    pictures = "saiapr_tc-12/*/images/*.jpg" if name == "refclef" else "mscoco/images/train2014/*.jpg"
    file = f"grefs({expressions}).json" if name == "grefcoco" else f"refs({expressions}).p"
    return (f"refer_seg/{name}/{file}", f"refer_seg/{name}/instances.json", f"refer_seg/images/{pictures}")


def open_referring(root: Path, split: str, name: str) -> Referring:
    """The reader of one split of a set in `NAMES`; one request an expression."""
    key = NAMES[name]
    return Referring(name, split, root, _records(root, split, key), _pictures(root, key))


def open_multi_referring(root: Path, split: str, name: str) -> MultiReferring:
    """The pictures of a set in `MULTI_NAMES` with several expressions in a question."""
    key = MULTI_NAMES[name]
    return MultiReferring(name, split, root, _records(root, split, key), _pictures(root, key))


class Referring:
    """Pictures with expressions, each of which refers to annotated things.

    Args:
      records: a picture with its expressions and annotations a line of JSON: small to keep and to send to the processes
        that load.
      pictures: their folder.
    """

    task = "names"

    def __init__(self, name: str, split: str, root: Path, records: Sequence[bytes], pictures: Path) -> None:
        self.name, self.split, self.root, self.records, self.pictures = name, split, root, records, pictures

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Annotation:
        record = json.loads(self.records[index])
        where = f"{self.name}, picture {record['id']}"
        if record["picture"] is None:
            raise AnnotationError(f"{where}: there are expressions for it, but instances.json does not have it.")
        path = picture_path(self.pictures, record["picture"].get("file_name"))
        try:
            regions, expressions = _read(record)
            return Annotation(
                size=(int(record["picture"]["height"]), int(record["picture"]["width"])),
                task=self.task,
                regions=regions,
                requests=self.requests(expressions),
                provenance=Provenance(self.name, self.split, path.relative_to(self.root).as_posix(), record["id"]),
            )
        except AnnotationError as error:
            raise AnnotationError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AnnotationError(f"{where} has a damaged entry: {type(error).__name__} {error}") from error

    def requests(self, expressions: Sequence[Request]) -> tuple[Request, ...]:
        """What is asked, from the expressions of a picture."""
        return tuple(expressions)

    def picture(self, index: int) -> bytes:
        record = json.loads(self.records[index])
        return read_file(picture_path(self.pictures, (record["picture"] or {}).get("file_name")))


class MultiReferring(Referring):
    """The multi-referring protocol of PixelLM: the expressions of a picture in questions of 6, 5, 4, 6, ... of them.

    A request's words are "a, b, ... and f", for the question "What is {c} in this image? Please output segmentation
    mask."; its answer lists one mask for each, and expressions of the same thing repeat the mask.
    """

    task = "questions"

    def requests(self, expressions: Sequence[Request]) -> tuple[Request, ...]:
        return tuple(_joined(chunk) for chunk in _chunks(expressions))


def _chunks(expressions: Sequence[Request]) -> Iterator[Sequence[Request]]:
    start = number = 0
    while start < len(expressions):
        size = CHUNKS[number % len(CHUNKS)]
        yield expressions[start : start + size]
        start, number = start + size, number + 1


def _joined(chunk: Sequence[Request]) -> Request:
    targets = [target for request in chunk for target in request.targets]
    answer: list[str | int] = []
    for place, target in enumerate(targets):
        between = "" if place == 0 else " and " if place == len(targets) - 1 else ", "
        answer += [between, target] if between else [target]
    return Request(
        words=(listed([request.words[0].lower() for request in chunk]),),
        targets=tuple(targets),
        answer=(*answer, "."),
        id=",".join(request.id for request in chunk),
    )


# Reading the files.


def _pictures(root: Path, key: str) -> Path:
    folder = "saiapr_tc-12" if key.startswith("refclef") else "mscoco/images/train2014"
    return need(root / "refer_seg/images" / folder, layout(key))


def _records(root: Path, split: str, key: str) -> list[bytes]:
    """The pictures of a split in the order of the list of expressions; ids are compared as text."""
    name, expressions = key.split("|")
    folder = root / "refer_seg" / name
    lines = layout(key)
    path = folder / f"{'g' if name == 'grefcoco' else ''}refs({expressions}).p"
    if name == "grefcoco" and not path.exists():
        path = path.with_suffix(".json")
        references = read_json(path, lines, list)
    else:
        references = read_plain_pickle(path, lines, list)
    file = folder / "instances.json"
    instances = read_json(file, lines, dict)
    try:
        images = {str(image["id"]): image for image in instances["images"]}
        annotations = {str(annotation["id"]): annotation for annotation in instances["annotations"]}
        categories = {str(category["id"]): category["name"] for category in instances["categories"]}
    except (KeyError, TypeError) as error:
        raise LayoutError(f"{file} is not in COCO's form: images, annotations or categories lack {error}.") from error
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for number, reference in enumerate(references):
        if not isinstance(reference, dict) or not {"split", "image_id"} <= reference.keys():
            raise LayoutError(f"{path}, entry {number} has no split or no image_id.")
        if _belongs(str(reference["split"]), split):
            by_picture.setdefault(str(reference["image_id"]), []).append(reference)
    if not by_picture:
        raise LayoutError(f"{path} has no expressions of the split {split}.")
    return [_record(picture, images.get(picture), own, annotations, categories) for picture, own in by_picture.items()]


def _belongs(own: str, split: str) -> bool:
    """Whether an expression of split `own` is in `split`: "testAB" is in testA, testB and test."""
    if split in ("testA", "testB", "testC"):
        return own.startswith("test") and split[-1] in own
    return own.startswith("test") if split == "test" else own == split


def _record(
    picture: str,
    image: Mapping[str, Any] | None,
    references: Sequence[Mapping[str, Any]],
    annotations: Mapping[str, Mapping[str, Any]],
    categories: Mapping[str, str],
) -> bytes:
    def targets(reference: Mapping[str, Any]) -> list[str]:
        ids = reference.get("ann_id")
        return [one for one in map(str, ids if isinstance(ids, list) else [ids]) if one != NO_TARGET]

    wanted = dict.fromkeys(one for reference in references for one in targets(reference))
    own = {one: annotations[one] for one in wanted if one in annotations}
    record = {
        "id": picture,
        "picture": image,
        "references": [[targets(reference), reference.get("sentences")] for reference in references],
        "annotations": [
            [one, annotation.get("segmentation"), categories.get(str(annotation.get("category_id")), "")]
            for one, annotation in own.items()
        ],
    }
    return json.dumps(record).encode()


def _read(record: Mapping[str, Any]) -> tuple[tuple[Region, ...], list[Request]]:
    """Regions, each annotation once, and a request for every expression that has words."""
    regions = [Region(mask, name=name, id=one) for one, mask, name in record["annotations"]]
    numbers = {one: number for number, (one, _, _) in enumerate(record["annotations"])}
    requests = []
    for targets, sentences in record["references"]:
        absent = [one for one in targets if one not in numbers]
        if absent:
            raise AnnotationError(f"instances.json does not have annotation {absent[0]}, which is referred to.")
        for sentence in sentences:
            if words := sentence["sent"].strip():
                places = tuple(numbers[one] for one in targets)
                requests.append(Request((words,), places, id=str(sentence["sent_id"])))
    return tuple(regions), requests
