"""ADE20K's instances and COCO's panoptic maps, in files that TFDS's own writer has written."""

import pickle

import numpy as np
import pytest

from pixelstory_jax.data.annotations import AnnotationError
from pixelstory_jax.data.readers import open_reader
from pixelstory_jax.data.readers.reader import LayoutError, open_picture
from pixelstory_jax.data.readers.tfds_sets import THINGS, panoptic_name, scene_instances
from tests.data.readers.miniature import MAKERS, scene
from tests.data.readers.miniature_tfds import IDS, PANOPTIC_NAMES, panoptic_objects

SCENE_PARSE, PANOPTIC = "tfds:scene_parse150", "tfds:coco/2017_panoptic"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for name in (SCENE_PARSE, PANOPTIC):
        MAKERS[name](folder)
    return folder


@pytest.mark.parametrize(
    "name, split, numbers",
    [(SCENE_PARSE, "train", [0, 1]), (SCENE_PARSE, "val", [3]), (PANOPTIC, "train", [0, 1]), (PANOPTIC, "val", [2])],
)
def test_every_segment_is_a_region_with_its_name(name, split, numbers, root):
    reader = pickle.loads(pickle.dumps(open_reader(name, root, split)))
    assert len(reader) == len(numbers) + ((name, split) == (SCENE_PARSE, "train"))
    for place, number in enumerate(numbers):
        annotation = reader[place]
        things = scene(number).masks
        if name == SCENE_PARSE:
            wanted = {str(k + 1): (THINGS[33 * (k % 4)], mask) for k, mask in enumerate(things)}
        else:
            whole = [np.logical_or.reduce(things[k::4]) for k in range(min(4, len(things)))]
            asked = [one for one in panoptic_objects(number) if one["label"] != "wall-brick" and not one["is_crowd"]]
            wanted = {str(one["id"]): (panoptic_name(one["label"]), whole[IDS.index(one["id"])]) for one in asked}
            ignored = ~np.logical_or.reduce([mask for _, mask in wanted.values()])
            np.testing.assert_array_equal(annotation.ignored_mask(), ignored)
            assert annotation.provenance.picture == f"{number:012d}.jpg"
            assert annotation.provenance.id == str((1 << 40) + number)
        assert {region.id: region.name for region in annotation.regions} == {k: name for k, (name, _) in wanted.items()}
        for k, region in enumerate(annotation.regions):
            np.testing.assert_array_equal(annotation.mask(k), wanted[region.id][1])
        for request in annotation.requests:
            assert {annotation.regions[target].name for target in request.targets} == set(request.words)
        image = open_picture(reader, place, "picture")
        annotation.check_size(image)
        assert np.abs(image.astype(float) - scene(number).image).mean() < 60


def test_a_picture_without_instances_is_named(root):
    with pytest.raises(AnnotationError, match="train: picture 2 shows nothing that can be asked for"):
        open_reader(SCENE_PARSE, root)[2]
    with pytest.raises(ValueError, match="instance 4 has the class 101, which is not one of 1 to 100"):
        scene_instances({}, np.full((2, 2, 3), (101, 4, 0), np.uint8), THINGS)


def test_names():
    assert len(THINGS) == len(set(THINGS)) == 100
    assert [THINGS[k - 1] for k in (1, 2, 4, 30, 58, 85, 100)] == [
        "bed", "windowpane", "person", "refrigerator", "television receiver", "screen", "flag",
    ]  # fmt: skip
    names = ("tree-merged", "sky-other-merged", "door-stuff", "playingfield", "wall-brick", "window-blind", "car")
    assert [panoptic_name(name) for name in names] == ["tree", "sky", "door", "playing field", "", "", "car"]
    assert len(PANOPTIC_NAMES) == len(IDS)


@pytest.mark.parametrize("missing", ["panoptic_objects-label.labels.txt", "coco-train.array_record-00000-of-00001"])
def test_an_incomplete_folder_says_what_is_expected(missing, tmp_path):
    MAKERS[PANOPTIC](tmp_path)
    (tmp_path / "coco/2017_panoptic/1.1.0" / missing).unlink()
    with pytest.raises(LayoutError, match="coco/2017_panoptic/1.1.0.* Expected are:\n  coco/2017_panoptic/1.1.0"):
        open_reader(PANOPTIC, tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    MAKERS[SCENE_PARSE](tmp_path)
    (shard,) = tmp_path.glob("scene_parse150/1.0.0/*train*")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    reader = open_reader(SCENE_PARSE, tmp_path)
    with pytest.raises(AnnotationError, match="record 0 of train is damaged: Corrupted"):
        reader[0]
    with pytest.raises(AnnotationError, match="record 0 of train is damaged: Corrupted"):
        reader.picture(0)
    assert reader[1].regions
