"""MUSE: questions about several things in a picture of COCO, in both forms that were released.

muse/muse_{train,val,test_less,test_many}.json      or the same files beside the folder muse
refer_seg/images/mscoco/images/{train2014,train2017,val2017}/*.jpg

A file lists pictures, each with `file_name` (of train2014) or `coco_url` (of train2017 or val2017), `height`, `width`,
`ann_list`, `questions`, for every question the instances of its answer in `answers` and, in one of the forms, its
`text_answers`, where {seg} stands behind the phrase for every instance. An instance has `category_name`, `bbox`,
`segmentation` (polygons or run lengths) and mostly a `rephrased_name`. Source of the rules: PixelLM's
`utils/multi_reason_seg_dataset.py` and `utils/multi_reason_seg_val_dataset.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.readers.reader import LayoutError, need, picture_path, read_file, read_json

FILES = {
    "train": "muse_train.json",
    "val": "muse_val.json",
    "test_few": "muse_test_less.json",
    "test_many": "muse_test_many.json",
}
PICTURES = "refer_seg/images/mscoco/images"
LAYOUT = (
    "muse/muse_train.json, muse_val.json, muse_test_less.json, muse_test_many.json",
    f"{PICTURES}/train2014/*.jpg, the same for train2017 and val2017",
)
MARK = "{seg}"


class Muse:
    """Regions are all instances of a picture, requests its questions.

    Raises:
      LayoutError: the file of the split or the folder of pictures is missing, or the file is empty.
    """

    name = "muse"

    def __init__(self, root: Path, split: str) -> None:
        self.split, self.root = split, root
        self.file = root / "muse" / FILES[split]
        if not self.file.exists() and (root / FILES[split]).exists():
            self.file = root / FILES[split]
        # Entries as text: small to keep, and to send to the processes that load.
        self.entries = [json.dumps(entry).encode() for entry in read_json(self.file, LAYOUT, list)]
        if not self.entries:
            raise LayoutError(f"{self.file} has no entries.")
        self.pictures = need(root / PICTURES, LAYOUT)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Annotation:
        entry = json.loads(self.entries[index])
        check_entry(entry, f"{self.file}, entry {index}", needs_rephrased=self.split != "train")
        regions, requests = read_entry(entry)
        path = picture_path(self.pictures, picture_name(entry))
        return Annotation(
            size=(entry["height"], entry["width"]),
            task="questions",
            regions=regions,
            requests=requests,
            provenance=Provenance(self.name, self.split, path.relative_to(self.root).as_posix(), str(index)),
        )

    def picture(self, index: int) -> bytes:
        entry = json.loads(self.entries[index])
        return read_file(picture_path(self.pictures, picture_name(entry) if isinstance(entry, dict) else None))


def picture_name(entry: Mapping[str, Any]) -> str | None:
    """The path of an entry's picture below the folder of COCO's pictures."""
    if "file_name" in entry:
        return f"train2014/{entry['file_name']}"
    url = entry.get("coco_url")
    if not isinstance(url, str):
        return None
    return f"{'train2017' if 'train2017' in url else 'val2017'}/{url.split('/')[-1]}"


def read_entry(entry: Mapping[str, Any]) -> tuple[tuple[Region, ...], tuple[Request, ...]]:
    """Regions and requests of an entry that `check_entry` accepts."""
    regions: list[Region] = []
    numbers: dict[str, int] = {}

    def number_of(instance: Mapping[str, Any]) -> int:
        """The same instance in two answers is one region."""
        names = instance["category_name"], instance.get("rephrased_name") or ""
        key = json.dumps([_thing(instance), names[1]])
        if key not in numbers:
            numbers[key] = len(regions)
            regions.append(Region(instance["segmentation"], *names, id=str(instance.get("id", ""))))
        return numbers[key]

    answered: dict[str, Mapping[str, Any]] = {}  # as they are called in answers; the list may lack these names
    for instance in (instance for instances in entry["answers"] for instance in instances):
        answered.setdefault(_thing(instance), instance)
    for instance in entry["ann_list"]:
        number_of(answered.get(_thing(instance), instance))
    texts = entry.get("text_answers") or [None] * len(entry["questions"])
    requests = []
    for number, (asked, instances, text) in enumerate(zip(entry["questions"], entry["answers"], texts, strict=True)):
        targets = tuple(number_of(instance) for instance in instances)
        answer = None if text is None else _pieces(text, targets)
        requests.append(Request((asked,), targets, is_sentence=True, answer=answer, id=str(number)))
    return tuple(regions), tuple(requests)


def _thing(instance: Mapping[str, Any]) -> str:
    """The same text for what has the same category and mask."""
    return json.dumps([instance["category_name"], instance["segmentation"]])


def _pieces(text: str, targets: tuple[int, ...]) -> tuple[str | int, ...]:
    """The text with a region for every {seg}."""
    words = text.split(MARK)
    pieces = [piece for pair in zip(words, targets, strict=False) for piece in pair]
    return tuple(piece for piece in (*pieces, words[-1]) if piece != "")


def check_entry(entry: Any, where: str, needs_rephrased: bool = False) -> None:
    """Checks one picture of a file in MUSE's form.

    Args:
      where: begins the message, as "muse_val.json, entry 3".
      needs_rephrased: whether every instance of an answer needs a rephrased name, as in the splits for evaluation.

    Raises:
      AnnotationError: one sentence that names the field that is wrong.
    """

    def wrong(field: str, expected: str) -> AnnotationError:
        return AnnotationError(f"{where}: {field} should be {expected}.")

    if not isinstance(entry, dict):
        raise AnnotationError(f"{where} should be an object with questions and answers.")
    if not isinstance(entry.get("file_name", entry.get("coco_url")), str):
        raise wrong("file_name or coco_url", "the name of a picture")
    for field in ("height", "width"):
        if type(entry.get(field)) is not int or entry[field] < 1:
            raise wrong(field, "a number of pixels")
    for field in ("ann_list", "questions", "answers"):
        if not isinstance(entry.get(field), list):
            raise wrong(field, "a list")
    for number, instance in enumerate(entry["ann_list"]):
        _check_instance(instance, f"{where}: ann_list[{number}]", False)
    questions, answers = entry["questions"], entry["answers"]
    texts = entry.get("text_answers")
    if texts is None:
        texts = [None] * len(questions)
    if not questions:
        raise wrong("questions", "at least one question")
    if len(answers) != len(questions):
        raise wrong("answers", f"as many as the {len(questions)} questions, not {len(answers)}")
    if not isinstance(texts, list) or len(texts) != len(questions):
        raise wrong("text_answers", f"a list as long as the {len(questions)} questions")
    for number, (asked, instances, text) in enumerate(zip(questions, answers, texts, strict=True)):
        if not isinstance(asked, str) or not asked.strip():
            raise wrong(f"questions[{number}]", "a question")
        if not isinstance(instances, list) or (text is None and not instances):
            raise wrong(f"answers[{number}]", "a list of instances")
        for place, instance in enumerate(instances):
            _check_instance(instance, f"{where}: answers[{number}][{place}]", needs_rephrased)
        if text is not None and (not isinstance(text, str) or text.count(MARK) != len(instances)):
            raise wrong(f"text_answers[{number}]", f"a text with one {MARK} for each of {len(instances)} instances")


def _check_instance(instance: Any, where: str, needs_rephrased: bool) -> None:
    if not isinstance(instance, dict):
        raise AnnotationError(f"{where} should be an instance.")
    if not isinstance(instance.get("category_name"), str):
        raise AnnotationError(f"{where} has no category_name.")
    if not isinstance(instance.get("segmentation"), list | dict):
        raise AnnotationError(f"{where} has no segmentation.")
    rephrased = instance.get("rephrased_name")
    if not isinstance(rephrased, str | None) or (needs_rephrased and not rephrased):
        raise AnnotationError(
            f"{where} has no rephrased_name, which {'this split needs' if needs_rephrased else 'is text'}."
        )
