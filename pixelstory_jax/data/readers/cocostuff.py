"""COCO-Stuff 164k: 91 things and 91 kinds of stuff as maps (the archive stuffthingmaps_trainval2017).

cocostuff/{train2017,val2017}/*.png
coco/{train2017,val2017}/*.jpg

A map holds the official category number minus 1, so 0 to 181, and 255 where nothing is labelled (README of
nightrome/cocostuff: "indices 0-181 and 255"). PixelLM's list of names begins with "0: unlabeled", which its loader
drops, so value i is name i of the rest: the same. Kinds that people cannot tell from their neighbours by name
("wall-brick", "furniture-other", all names with a hyphen) are ignored pixels, as in PixelLM, which calls "sky-other"
sky and therefore keeps it.
"""

from __future__ import annotations

from pathlib import Path

from pixelstory_jax.data.readers.label_maps import LabelMaps

SPLITS = {"train": "train2017", "val": "val2017"}
LAYOUT = (
    "cocostuff/train2017/*.png, cocostuff/val2017/*.png (stuffthingmaps_trainval2017.zip)",
    "coco/train2017/*.jpg, coco/val2017/*.jpg",
)

_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, stop
sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
salad, sand, sea, shelf, sky, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent,
textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile,
wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
CLASSES = tuple(" ".join(name.split()) for name in _CLASSES.split(","))
"""Names by value in the map; 11 of the things are in no picture."""


def open_cocostuff(root: Path, split: str) -> LabelMaps:
    """The reader of `root`/cocostuff with the pictures of `root`/coco."""
    names = {value: name for value, name in enumerate(CLASSES) if "-" not in name}
    folder = SPLITS[split]
    return LabelMaps("cocostuff", split, root, root / "coco" / folder, root / "cocostuff" / folder, names, LAYOUT)
