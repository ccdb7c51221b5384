"""ADE20K of the scene parsing challenge 2016 (SceneParse150): 150 classes, 0 is unlabelled.

ade20k/images/{training,validation}/*.jpg
ade20k/annotations/{training,validation}/*.png
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.label_maps import LabelMaps

SPLITS = {"train": "training", "val": "validation"}
LAYOUT = (
    "ade20k/images/training/*.jpg, ade20k/images/validation/*.jpg",
    "ade20k/annotations/training/*.png, ade20k/annotations/validation/*.png",
)

_CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
glass, clock, flag
"""
CLASSES = tuple(" ".join(name.split()) for name in _CLASSES.split(","))
"""Names of the classes 1 to 150, of several synonyms the one that PixelLM and LISA ask by."""


def open_ade20k(root: Path, split: str) -> LabelMaps:
    """The reader of `root`/ade20k."""
    pictures, labels = (root / "ade20k" / part / SPLITS[split] for part in ("images", "annotations"))
    return LabelMaps("ade20k", split, root, pictures, labels, dict(enumerate(CLASSES, start=1)), LAYOUT)
