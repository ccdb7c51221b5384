"""Miniatures of the data sets in which language says what is meant, with the odd entries that the real ones have."""

from __future__ import annotations

import io
import json
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, message_factory
from PIL import Image

from pixelstory_jax.data.masks import encode_rle, mask_polygons
from pixelstory_jax.data.readers import refer, tfds_ref_coco
from pixelstory_jax.data.readers.packed import array_record
from tests.data.readers.miniature import maker, save_json, save_picture, scene

LARGE = 1 << 40  # ids are larger than 32 bits hold
MODES = ("RGB", "L", "CMYK")


def polygons(mask: np.ndarray) -> list[list[int]]:
    return mask_polygons(mask)


def points(mask: np.ndarray) -> list[list[int]]:
    """The corners of the largest part of a mask."""
    return np.reshape(mask_polygons(mask)[0], (-1, 2)).tolist()


def beyond(mask: np.ndarray) -> list[list[int]]:
    """Two overlapping polygons: the middle of the picture, and one that reaches over its corner."""
    height, width = mask.shape
    inner = [width // 4, height // 4, width // 2, height // 4, width // 2, height // 2, width // 4, height // 2]
    outer = [width // 3, height // 3, 2 * width, height // 3, 2 * width, 2 * height, width // 3, 2 * height]
    return [inner, outer]


# refCLEF, refCOCO, refCOCO+, refCOCOg, gRefCOCO.


def sentences(number: int, place: int, name: str) -> list[dict[str, Any]]:
    """Two expressions for thing `place` of picture `number`."""
    words = [f"The {name} number {place}", f"{name} {place}, café"]
    return [
        {"sent_id": LARGE + 100 * number + 2 * place + k, "sent": text, "raw": text, "tokens": text.split()}
        for k, text in enumerate(words)
    ]


def reference(number: int, split: str, targets: Any, spoken: list[dict[str, Any]]) -> dict[str, Any]:
    return {"ref_id": number, "image_id": LARGE + number, "split": split, "ann_id": targets, "sentences": spoken}


def annotation_id(number: int, place: int) -> int:
    return LARGE + 100 * number + place


def picture_file(name: str, number: int) -> str:
    return f"0{number % 2}/images/{number}.jpg" if name == "refclef" else f"COCO_train2014_{number:012d}.jpg"


def make_referring(root: Path, key: str) -> None:
    """Five pictures for training and one for every other split.

    Of those for training the second has a mask that reaches out of the picture, the third an empty one, the fourth an
    expression for an annotation that does not exist, and the fifth has no file.
    """
    name, expressions = key.split("|")
    splits = ["train"] * 5 + [split for split in refer.SPLITS[key][1:] if (split != "test" or "unc" not in key)]
    images, annotations, references = [], [], []
    pictures = root / refer.layout(key)[2].split("/*")[0]
    for number, split in enumerate(splits):
        things = scene(number)
        file = picture_file(name, number)
        if number != 4:
            save_picture(things.image, pictures / file, MODES[number % 3])
        height, width = things.image.shape[:2]
        images.append({"id": LARGE + number, "file_name": file, "height": height, "width": width})
        for place, (mask, thing) in enumerate(zip(things.masks, things.names, strict=True)):
            parts: Any = [encode_rle(mask), encode_rle(mask)] if name == "refclef" else polygons(mask)
            if place == 0 and number in (1, 2):
                parts = beyond(mask) if number == 1 else []
            annotations.append(
                {
                    "id": annotation_id(number, place),
                    "image_id": LARGE + number,
                    "category_id": place,
                    "segmentation": parts,
                    "iscrowd": 0,
                }
            )
            target: Any = annotation_id(number, place)
            spoken = sentences(number, place, thing)
            references.append(reference(number, split, [target] if name == "grefcoco" else target, spoken))
        if number == 3:
            references.append(reference(number, split, LARGE - 1, sentences(number, 9, "ghost")))
        if name == "grefcoco":
            both = [annotation_id(number, 1), annotation_id(number, 0)]
            references.append(reference(number, split, both, sentences(number, 10, "both")))
            references.append(reference(number, split, [-1], sentences(number, 11, "unicorn")))
    categories = [{"id": place, "name": f"category {place}"} for place in range(10)]
    folder = root / "refer_seg" / name
    save_json({"images": images, "annotations": annotations, "categories": categories}, folder / "instances.json")
    if name == "grefcoco":
        save_json(references, folder / f"grefs({expressions}).json")
    else:
        (folder / f"refs({expressions}).p").write_bytes(pickle.dumps(references, protocol=2))


for _name, _key in (refer.NAMES | refer.MULTI_NAMES).items():
    maker(_name)(partial(make_referring, key=_key))


# The same sets as TensorFlow Datasets prepares them.


def example_bytes(features: dict[str, list[Any]]) -> bytes:
    """A `tf.train.Example`, written by the protobuf library from a description of its messages."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")
    for message, fields in {
        "Bytes": [("value", kinds.TYPE_BYTES, "")],
        "Floats": [("value", kinds.TYPE_FLOAT, "")],
        "Ints": [("value", kinds.TYPE_INT64, "")],
        "Feature": [(name, kinds.TYPE_MESSAGE, f".tf.{name}") for name in ("Bytes", "Floats", "Ints")],
        "Entry": [("key", kinds.TYPE_STRING, ""), ("value", kinds.TYPE_MESSAGE, ".tf.Feature")],
        "Features": [("feature", kinds.TYPE_MESSAGE, ".tf.Entry")],
        "Example": [("features", kinds.TYPE_MESSAGE, ".tf.Features")],
    }.items():
        described = file.message_type.add(name=message)
        for number, (name, kind, of) in enumerate(fields, start=1):
            label = kinds.LABEL_OPTIONAL if message in ("Feature", "Entry", "Example") else kinds.LABEL_REPEATED
            described.field.add(name=name, number=number, type=kind, label=label, type_name=of or None)
    classes = message_factory.GetMessages([file])
    example = classes["tf.Example"]()
    for key, values in features.items():
        entry = example.features.feature.add(key=key)
        kind = {bytes: "Bytes", float: "Floats", int: "Ints"}[type(values[0])]
        getattr(entry.value, kind).value.extend(values)
    return example.SerializeToString()


def file_bytes(image: np.ndarray, form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form)
    return stream.getvalue()


def prepared_example(number: int) -> bytes:
    """Two expressions of every thing of a picture, and one that is empty of the first."""
    things = scene(number)
    count = len(things.masks)
    spoken = [sentences(number, place, name) for place, name in enumerate(things.names)]
    spoken[0].append({"sent_id": 1, "raw": " "})
    return example_bytes(
        {
            "image": [file_bytes(things.image, "JPEG")],
            "image/id": [LARGE + number],
            "objects/id": [annotation_id(number, place) for place in range(count)],
            "objects/bbox": [0.25] * 4 * count,
            "objects/mask": [file_bytes(mask, "PNG") for mask in things.masks],
            "objects/refexp/raw/ragged_flat_values": [said["raw"].encode() for one in spoken for said in one],
            "objects/refexp/raw/ragged_row_lengths_0": [len(one) for one in spoken],
            "objects/refexp/refexp_id/ragged_flat_values": [said["sent_id"] for one in spoken for said in one],
            "objects/refexp/refexp_id/ragged_row_lengths_0": [len(one) for one in spoken],
        }
    )


def write_tfrecords(path: Path, records: list[bytes]) -> None:
    """Check sums are zeros: our reader does not compare them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records))


def write_array_records(path: Path, records: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record("array_record_module").ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def make_prepared(root: Path, config: str, kind: str) -> None:
    """Three pictures for training in two files, one for every other split, beside an older version without files."""
    folder = root / "ref_coco" / config
    (folder / "1.0.0").mkdir(parents=True, exist_ok=True)
    write = write_tfrecords if kind == "tfrecord" else write_array_records
    for split in tfds_ref_coco.SPLITS[config]:
        parts = [[0, 1], [2]] if split == "train" else [[3]]
        stored = "validation" if split == "val" else split
        for number, part in enumerate(parts):
            file = f"ref_coco-{stored}.{kind}-{number:05d}-of-{len(parts):05d}"
            write(folder / "1.1.0" / file, [prepared_example(picture) for picture in part])


for _config, _kind in (("refcoco_unc", "tfrecord"), ("refcocog_umd", "array_record")):
    maker(f"tfds:ref_coco/{_config}")(partial(make_prepared, config=_config, kind=_kind))


# ReasonSeg.


def reasoning_file(number: int) -> dict[str, Any]:
    """The last thing to be ignored, the others meant, a flag without meaning, and a shape that reaches out."""
    masks = scene(number).masks
    shapes = [{"label": "target", "points": points(mask)} for mask in masks[:-1]]
    shapes += [{"label": "Ignored", "points": points(masks[-1])}]
    shapes += [{"label": "flag", "points": [[0, 0], [500, 0], [500, 500]]}]
    shapes += [{"label": "target", "points": [[-5.5, -5.5], [8.7, -5.5], [8.7, 6.2]]}]
    is_sentence = number != 1
    text = [f"Which of these would a fiancé give, {k}?" if is_sentence else f"The Gift {k}" for k in range(4)]
    return {"text": text, "is_sentence": is_sentence, "shapes": shapes}


@maker("reason_seg")
def make_reason_seg(root: Path) -> None:
    """Three pictures for training, of which the first is explained; a file of val is cp1252, another is missing."""
    folder = root / "reason_seg/ReasonSeg"
    for number, split in enumerate(["train"] * 3 + ["val"] * 2 + ["test"]):
        path = folder / split / f"{number}_gift.jpg"
        save_picture(scene(number).image, path, MODES[number % 3])
        text = json.dumps(reasoning_file(number), ensure_ascii=False)
        if number != 4:
            path.with_suffix(".json").write_bytes(text.encode("cp1252" if number == 3 else "utf-8"))
    explanations = [{"image": "0_gift.jpg", "query": "Which?", "outputs": "One gives what shines."}]
    save_json(explanations, folder / "explanatory/train.json")


# LLaVA-Instruct-150k.


def said(*texts: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[k % 2], "value": text} for k, text in enumerate(texts)]


@maker("llava_instruct_150k")
def make_llava_instruct(root: Path) -> None:
    """Three conversations, then one about a picture that is missing and one in which gpt speaks twice."""
    twice = said("And?", "This.", "That.")
    twice[2]["from"] = "gpt"
    conversations = [
        said("<image>\nWhat is here?", "A picture.", "Of what?", "Of things."),
        said("What colour is it?\n<image>", "Green."),
        said("Hello!", "What do you see?\n<image>", "Something.", "What else?", first="gpt"),
        said("<image>\nWho?", "Nobody."),
        twice,
    ]
    for number, conversation in enumerate(conversations):
        if number != 3:
            save_picture(scene(number).image, root / f"coco/train2017/{number:012d}.jpg", MODES[number % 3])
        conversations[number] = {  # type: ignore[call-overload]
            "id": str(LARGE + number),
            "image": f"{number:012d}.jpg",
            "conversations": conversation,
        }
    save_json(conversations, root / "llava_dataset/llava_instruct_150k.json")


# MUSE.


def instance(number: int, place: int, rephrased: bool = True, runs: bool = False) -> dict[str, Any]:
    things = scene(number)
    mask = things.masks[place]
    fields = {
        "category_id": LARGE + place,
        "category_name": things.names[place],
        "bbox": [0, 0, 5, 5],
        "segmentation": encode_rle(mask) if runs else polygons(mask),
    }
    return fields | ({"rephrased_name": f"The {things.names[place]} at {place}"} if rephrased else {})


def muse_entry(number: int, where: dict[str, str], with_text: bool, **form: bool) -> dict[str, Any]:
    """Two questions about the first two things; both answers name the second one."""
    things = [instance(number, place, **form) for place in range(len(scene(number).masks))]
    height, width = scene(number).image.shape[:2]
    entry = {
        **where,
        "height": height,
        "width": width,
        "ann_list": things,
        "questions": ["What could be lifted first?", "What then?"],
        "answers": [[things[1], things[0]], [things[1]]],
    }
    texts = ["Lift the second {seg}, then the first {seg}.", "{seg} again"]
    return entry | ({"text_answers": texts} if with_text else {})


@maker("muse")
def make_muse(root: Path) -> None:
    """Four pictures for training, of which the last has a {seg} too many, and one for each other split."""
    folder = root / "refer_seg/images/mscoco/images"
    places = [
        {"file_name": "COCO_train2014_000000000000.jpg"},
        {"coco_url": "http://images.cocodataset.org/train2017/000000000001.jpg"},
        {"coco_url": "http://images.cocodataset.org/val2017/000000000002.jpg"},
        {"file_name": "COCO_train2014_000000000003.jpg"},
    ]
    for number, place in enumerate(places):
        part = "train2014" if "file_name" in place else place["coco_url"].split("/")[-2]
        save_picture(scene(number).image, folder / part / list(place.values())[0].split("/")[-1], MODES[number % 3])
    entries = [
        muse_entry(0, places[0], True),
        muse_entry(1, places[1], False, rephrased=False),
        muse_entry(2, places[2], False, runs=True),
        muse_entry(3, places[3], True),
    ]
    entries[3]["text_answers"][1] = "{seg} and {seg}"
    save_json(entries, root / "muse/muse_train.json")
    for split in ("val", "test_less", "test_many"):
        save_json([muse_entry(0, places[0], True), muse_entry(2, places[2], False)], root / f"muse/muse_{split}.json")
