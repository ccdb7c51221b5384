"""Miniatures of the data sets with a map of class numbers for every picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.readers.miniature import maker, save_json, save_labels, save_picture, scene

ADE20K = {1: "wall", 2: "building", 5: "tree", 150: "flag"}
COCOSTUFF = {0: "person", 2: "car", 95: "", 156: "sky", 181: "wood"}  # 95 is "building-other": ignored
MAPILLARY = {0: "bird", 1: "", 2: "lane marking - crosswalk", 3: "unlabelled, yet evaluated"}
"""Value in the map -> name that it is asked for by; "" where it is ignored."""


def labels_of(number: int, values: list[int], nothing: int) -> np.ndarray:
    """Class numbers of scene `number`: the things get the values in turn."""
    things = scene(number)
    labels = np.full(things.image.shape[:2], nothing, np.uint8)
    for place, mask in enumerate(things.masks):
        labels[mask] = values[(number + place) % len(values)]
    return labels


@maker("ade20k")
def make_ade20k(root: Path) -> None:
    """Three pictures for training (one grey, one CMYK), two for validation, whose second has no labels."""
    folder = root / "ade20k"
    for number, (split, mode) in enumerate(
        [("training", "RGB"), ("training", "L"), ("training", "CMYK"), ("validation", "RGB"), ("validation", "RGB")]
    ):
        stem = f"ADE_{split[:5]}_{number:08d}"
        save_picture(scene(number).image, folder / "images" / split / f"{stem}.jpg", mode)
        labels = labels_of(number, list(ADE20K), 0)
        save_labels(labels * (number != 4), folder / "annotations" / split / f"{stem}.png")


@maker("cocostuff")
def make_cocostuff(root: Path) -> None:
    """Three pictures for training, of which two have maps, and one for validation."""
    for number, split in enumerate(["train2017", "train2017", "train2017", "val2017"]):
        save_picture(scene(number).image, root / "coco" / split / f"{number:012d}.jpg", "L" if number == 1 else "RGB")
        if number < 2 or split == "val2017":
            labels = labels_of(number, list(COCOSTUFF), 255)
            save_labels(labels, root / "cocostuff" / split / f"{number:012d}.png")


@maker("mapillary")
def make_mapillary(root: Path) -> None:
    """Two pictures for training and one for validation, with maps in palettes."""
    folder = root / "mapillary"
    labels = [
        {"name": "animal--bird", "readable": "Bird", "evaluate": True},
        {"name": "human--person--person-group", "readable": "Person Group", "evaluate": False},
        {"name": "marking--discrete--crosswalk-zebra", "readable": "Lane Marking - Crosswalk", "evaluate": True},
        {"name": "new", "readable": "Unlabelled, yet evaluated"},
    ]
    save_json({"labels": labels, "version": "2.0"}, folder / "config_v2.0.json")
    for number, split in enumerate(["training", "training", "validation"]):
        save_picture(scene(number).image, folder / split / "images" / f"key_{number}.jpg")
        maps = labels_of(number, list(MAPILLARY), 255)
        save_labels(maps, folder / split / "v2.0" / "labels" / f"key_{number}.png", palette=True)
