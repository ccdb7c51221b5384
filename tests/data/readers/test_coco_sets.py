"""PACO-LVIS, PASCAL-Part and files of one's own in COCO's format: miniatures, odd cases, real photos where found."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageFilter

from configs.pixellm import get_config
from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.asking import Asking, ask_about
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.names import plain_name
from pixelstory_jax.data.packing import pack
from pixelstory_jax.data.readers import open_folder, open_reader
from pixelstory_jax.data.readers.packed import Packed
from pixelstory_jax.data.readers.parts import part_words
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from pixelstory_jax.data.readers.registry import packed_folder
from pixelstory_jax.data.sources import build_mixture
from tests.data.readers.miniature import MAKERS, save_json, save_picture, scene
from tests.data.readers.miniature_coco import FAR, INSTANCE_NAMES, PACO_NAMES, PASCAL_NAMES, entry
from tests.data.readers.test_coco_file import reference_masks

SETS = {
    ("paco_lvis", "train"): ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
    ("paco_lvis", "val"): ("vlpart/paco/annotations/paco_lvis_v1_val.json", "coco"),
    ("pascal_part", "train"): ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    ("coco_instances", "train"): ("coco/annotations/instances_train2017.json", "coco/train2017"),
    ("coco_instances", "val"): ("coco/annotations/instances_val2017.json", "coco/val2017"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("paco_lvis", "pascal_part", "coco_instances"):
        MAKERS[name](folder)
    return folder


@pytest.mark.parametrize("name, split", SETS)
def test_every_mask_and_picture_is_that_of_the_file(name, split, root):
    file, pictures = SETS[name, split]
    content = json.loads((root / file).read_text())
    masks = reference_masks(content)
    reader = pickle.loads(pickle.dumps(open_reader(name, root, split)))
    assert len(reader) == 3
    for number in range(3):
        annotation = reader[number]
        assert annotation.provenance.dataset == name and annotation.provenance.split == split
        assert annotation.provenance.picture.startswith(pictures)
        assert annotation.provenance.id == str(FAR + number)
        for place, region in enumerate(annotation.regions):
            np.testing.assert_array_equal(annotation.mask(place), masks[int(region.id)])
        image = open_picture(reader, number, annotation.provenance.picture)
        annotation.check_size(image)
        assert np.abs(image.astype(float) - scene(number).image).mean() < 60


@pytest.mark.parametrize("name, names", [("paco_lvis", PACO_NAMES), ("pascal_part", PASCAL_NAMES)])
def test_every_part_is_asked_for_by_itself(name, names, root):
    reader = open_reader(name, root)
    for number in range(3):
        annotation = reader[number]
        count = len(scene(number).masks)
        assert len(annotation.regions) == len(annotation.requests) == count
        for place, request in enumerate(annotation.requests):
            assert request.words == part_words(names[place % len(names)]) and request.targets == (place,)
            assert annotation.regions[place].name == request.words[0]


def test_words_of_parts():
    assert part_words("trash_can_(bin):lid") == ("trash can lid", "the lid of the trash can")
    assert part_words("scarf_(cloth)") == ("scarf",)
    for wrong in ("", ":lid", "can:", "a:b:c", "_(x)"):
        with pytest.raises(ValueError, match="OBJECT:PART"):
            part_words(wrong)


def test_a_category_that_is_no_part_is_named(tmp_path):
    MAKERS["pascal_part"](tmp_path)
    path = tmp_path / "vlpart/pascal_part/train.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "a:b:c"
    save_json(content, path)
    with pytest.raises(LayoutError, match="train.json has the category 'a:b:c', where OBJECT or OBJECT:PART"):
        open_reader("pascal_part", tmp_path)


def test_a_category_is_answered_with_all_its_instances_from_left_to_right(root):
    annotation = open_reader("coco_instances", root)[0]
    things = scene(0).masks
    names = [plain_name(INSTANCE_NAMES[place % len(INSTANCE_NAMES)]) for place in range(len(things))]
    wanted = {request.words[0]: len(request.targets) for request in annotation.requests}
    outside = {"potted plant": 1}  # the polygon that begins outside of the picture
    assert wanted == {name: names.count(name) + outside.get(name, 0) for name in names if name}
    plants = next(request for request in annotation.requests if request.words == ("potted plant",))
    lefts = [np.flatnonzero(annotation.mask(target).any(0)).mean() for target in plants.targets]
    assert lefts == sorted(lefts)
    crowd = annotation.ignored_mask()
    assert crowd[: len(crowd) // 4].all()
    for place, name in enumerate(names):  # "__ignore__" counts as the crowd does
        assert name or crowd[things[place]].all()


def own_content(count: int, **fields) -> dict:
    """One picture of 60 x 40 pixels with so many cups and one dog."""
    cups = [entry(i, 1, 1, [[9 * i, 1, 9 * i + 6, 1, 9 * i + 6, 9, 9 * i, 9]], **fields) for i in range(count)]
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 60}],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
        "annotations": [*cups, entry(50, 1, 2, [[1, 20, 30, 20, 30, 39]])],
    }


@pytest.mark.parametrize("count, asked", [(1, {"cup": 1, "dog": 1}), (5, {"cup": 5, "dog": 1}), (6, {"dog": 1})])
def test_a_category_with_too_many_instances_is_not_asked_for(count, asked, tmp_path):
    save_json(own_content(count), tmp_path / "mine.json")
    save_picture(np.zeros((40, 60, 3), np.uint8), tmp_path / "mine/a.jpg")
    reader = open_reader("coco_instances:mine.json:mine", tmp_path)
    annotation = reader[0]
    assert reader.name == annotation.provenance.dataset == "coco_instances:mine.json:mine"
    assert {request.words[0]: len(request.targets) for request in annotation.requests} == asked
    image = open_picture(reader, 0, "a.jpg")
    for seed in range(20):
        example = ask_about(image, annotation, np.random.default_rng(seed), Asking())
        sizes = sorted(len(turn.targets) for (turn,) in example.conversations)
        assert sum(sizes) == sum(asked.values()) and len(sizes) == len(asked)


def test_lvis_categories_that_are_not_exhaustive_are_not_asked_for(tmp_path):
    content = own_content(2)
    content["images"][0]["not_exhaustive_category_ids"] = [1]
    save_json(content, tmp_path / "mine.json")
    (tmp_path / "mine").mkdir()
    (request,) = open_reader("coco_instances:mine.json:mine", tmp_path)[0].requests
    assert request.words == ("dog",)


def test_a_picture_of_crowds_alone_has_nothing_to_ask_for(tmp_path):
    content = own_content(2, iscrowd=1)
    content["annotations"].pop()
    save_json(content, tmp_path / "mine.json")
    (tmp_path / "mine").mkdir()
    reader = open_reader("coco_instances:mine.json:mine", tmp_path)
    with pytest.raises(AnnotationError, match="a.jpg shows nothing that can be asked for"):
        reader[0]
    with pytest.raises(ImageError, match="no picture at .*mine/a.jpg"):
        reader.picture(0)


def test_splits_of_a_file_of_ones_own(tmp_path):
    for split in ("train", "val"):
        save_json(own_content(1 if split == "train" else 2), tmp_path / f"{split}.json")
    (tmp_path / "p").mkdir()
    counts = [
        len(open_reader("coco_instances:{split}.json:p", tmp_path, split)[0].regions) for split in ("train", "val")
    ]
    assert counts == [2, 3]
    with pytest.raises(ValueError, match="has the split train only"):
        open_reader("coco_instances:train.json:p", tmp_path, "val")
    for wrong in ("train.json", "train.json:", "a:b:c"):
        with pytest.raises(ValueError, match="should be coco_instances:ANNOTATIONS.json:PICTURES_FOLDER"):
            open_reader(f"coco_instances:{wrong}", tmp_path)
    for missing in ("other.json:p", "train.json:other"):
        with pytest.raises(LayoutError, match="no .*other"):
            open_reader(f"coco_instances:{missing}", tmp_path)
    with pytest.raises(ValueError, match="Unknown data set 'ade20k:x'; did you mean ade20k"):
        open_reader("ade20k:x", tmp_path)


def test_a_file_of_ones_own_in_a_mixture_and_packed(tmp_path):
    name = "coco_instances:tools/{split}.json:tools/pictures"
    save_json(own_content(2), tmp_path / "tools/train.json")
    save_picture(np.zeros((40, 60, 3), np.uint8), tmp_path / "tools/pictures/a.jpg")
    config = get_config("tiny,data=mixture")
    config.data.folder = str(tmp_path)
    config.data.mixture = ConfigDict({"mine": {"weight": 1.0, "sets": (name,)}})
    drawn = build_mixture(config, 1)[5]
    folder = packed_folder(name, tmp_path, "train")
    assert folder.parent == tmp_path / "packed"
    pack(open_folder(name, tmp_path), range(1), folder, source="")
    packed = open_reader(name, tmp_path)
    assert isinstance(packed, Packed) and packed.name == name
    again = build_mixture(config, 1)[5]
    assert drawn[1] == again[1] and drawn[0].provenance == again[0].provenance
    np.testing.assert_array_equal(drawn[0].masks, again[0].masks)


@pytest.mark.parametrize(
    "label, name",
    [
        ("diningtable", "dining table"),
        ("tv/monitor", "television"),
        ("Tissue_Box", "Tissue Box"),
        ("bow_(weapon)", "bow"),
        ("cup (of tea)", "cup"),
        ("__ignore__", ""),
        ("_background_", ""),
        ("Background", ""),
    ],
)
def test_labels_in_plain_english(label, name):
    assert plain_name(label) == name


def labelme_folder() -> Path:
    """Examples of labelme's Debian package, installed, or unpacked into the folder that PIXELSTORY_PHOTOS names."""
    inside = "usr/share/doc/labelme-examples/examples/instance_segmentation"
    for base in ("/", os.environ.get("PIXELSTORY_PHOTOS", "/")):
        if (Path(base) / inside / "data_dataset_coco").is_dir():
            return Path(base) / inside
    pytest.skip(
        "no labelme-examples: apt-get download it, dpkg -x labelme-examples*.deb photos, PIXELSTORY_PHOTOS=photos"
    )


def test_real_photos_with_polygons_drawn_by_people():
    folder = labelme_folder()
    reader = open_reader("coco_instances:data_dataset_coco/annotations.json:data_dataset_coco", folder)
    assert len(reader) == 3
    masks = reference_masks(json.loads((folder / "data_dataset_coco/annotations.json").read_text()))
    asked = []
    for number in range(3):
        annotation = reader[number]
        annotation.check_size(open_picture(reader, number, annotation.provenance.picture))
        asked.append({request.words[0]: len(request.targets) for request in annotation.requests})
        classes = np.load(folder / f"data_dataset_voc/SegmentationClass/{Path(annotation.provenance.picture).stem}.npy")
        names = (folder / "data_dataset_voc/class_names.txt").read_text().split("\n")
        for request in annotation.requests:
            united = np.zeros(annotation.size, bool)
            for target in request.targets:
                mask = annotation.mask(target)
                np.testing.assert_array_equal(mask, masks[int(annotation.regions[target].id)])
                united |= mask
            drawn = classes == [plain_name(name) for name in names].index(request.words[0])
            grown = Image.fromarray(united).convert("L").filter(ImageFilter.MaxFilter(3))
            assert not (drawn & (np.asarray(grown) == 0)).any()  # labelme draws the border as well
    assert asked == [
        {"person": 2, "bottle": 1},
        {"bus": 2, "car": 1},
        {"person": 4, "chair": 1, "sofa": 1},
    ]
