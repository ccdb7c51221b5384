"""Several hundred animated characters: the units of Battle for Wesnoth, read from a folder that the user unpacks.

    apt-get download wesnoth-1.16-data
    dpkg -x wesnoth-1.16-data*.deb wesnoth

The pictures are under the GPL (version 2 or later) and are therefore not embedded. A character is a unit type with its
name; its poses are told by the words in the names of its frames: ``bowman-melee-attack-2.png`` is a bowman attacking.
"""

from __future__ import annotations

import colorsys
import os
import pathlib
import re
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.characters import Cast
from pixelstory_jax.data.builtin.stories import STORY_SPLITS

COMMANDS = "apt-get download wesnoth-1.16-data\ndpkg -x wesnoth-1.16-data*.deb wesnoth"
MAX_SIDE = 160
"""Most frames are 72x72 pixels, those of riders and beasts a little larger; dragons and buildings are left out."""
MIN_FRAMES = 5
MIN_CHARACTERS = 5
_TEST_SHARE = 5  # one character in so many is kept for the split "test"
# A frame that shows less of the character than this share of its standing picture is a cloud of dust or a remainder.
_MIN_AREA = 0.45

# Words in the name of a frame that tell the pose; the first row with a word of the frame decides.
_POSE_WORDS: tuple[tuple[str, str], ...] = (
    ("left out", "halo shadow blank weapon soul puff splash ring projectile missile dust"),
    ("dying", "die dying death"),
    ("defending", "defend defense defending block"),
    ("leading", "lead leading leadership"),
    ("casting", "magic cast heal healing healer summon summoning flare"),
    ("flying", "fly flying takeoff upstroke downstroke landing glide"),
    ("running", "run running move moving gallop walk walking"),
    ("throwing", "throw thrown throwing bolas knife throwknife net sling javelin jarid"),
    ("shooting", "bow ranged crossbow shoot fire shooting longbow thunderstick rifle spit inhale"),
    (
        "attacking",
        "attack melee sword axe slash hammer spear staff pierce claw claws kick bite blade pincer tentacle dagger mace "
        "halberd lance trident fist crush smash strike charge flail club scythe saber touch wail gaze sting stinger "
        "tail horn",
    ),
    ("standing", "idle stand standing bob base ready"),
)
# Parts of a frame's name that say where the character looks, or nothing at all.
_IDLE_PARTS = frozenset({"", "s", "n", "se", "sw", "ne", "nw", "e", "w"})

# The reds that the game replaces by the colour of a side, as its file team-colors.cfg lists them.
_TEAM_COLOURS = (
    (0xF49AC1, 0x3F0016, 0x55002A, 0x690039, 0x7B0045, 0x8C0051, 0x9E005D, 0xB10069, 0xC30074, 0xD6007F)
    + (0xEC008C, 0xEE3D96, 0xEF5BA1, 0xF172AC, 0xF287B6, 0xF6ADCD, 0xF8C1D9, 0xFAD5E5, 0xFDE9F1)
)  # fmt: skip
_HUES = (0.0, 0.09, 0.15, 0.33, 0.47, 0.58, 0.68, 0.78)


def wesnoth_cast(folder: str | os.PathLike[str] | None, split: str) -> Cast:
    """The characters of an unpacked ``wesnoth-1.16-data`` that belong to a split; no character is in both.

    Args:
      folder: where the package was unpacked; any folder above ``core`` of the game's data will do.
      split: "train" (about four characters in five) or "test".

    Raises:
      FileNotFoundError: the folder is missing or holds too few characters; the sentence says how to get them.
      ValueError: unknown split.
    """
    if split not in STORY_SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(STORY_SPLITS)}")
    core = _core_folder(folder)
    names, sprites, poses, heights = [], [], [], []
    for name, paths in sorted(_frames_of(core).items()):
        if split_of(name) != split:
            continue
        frames = _read_frames(name, paths)
        if len(frames) < MIN_FRAMES:
            continue
        names.append(name)
        sprites.append({frame: pixels for frame, (_, pixels) in frames.items()})
        words = sorted({pose for pose, _ in frames.values()})
        poses.append({word: tuple(sorted(f for f, (pose, _) in frames.items() if pose == word)) for word in words})
        heights.append(len(next(iter(sprites[-1].values()))))
    if len(names) < MIN_CHARACTERS:
        raise FileNotFoundError(
            f"{core} holds {len(names)} usable characters of the split {split}, expected at least {MIN_CHARACTERS}. "
            f"Get them anew with:\n{COMMANDS}"
        )
    return Cast(tuple(names), tuple(sprites), tuple(poses), float(np.median(heights)))


def split_of(name: str) -> str:
    """The split that a character belongs to, decided by its name alone."""
    return "test" if zlib.crc32(name.encode()) % _TEST_SHARE == 0 else "train"


def _core_folder(folder: str | os.PathLike[str] | None) -> pathlib.Path:
    if not folder:
        raise FileNotFoundError(f"No folder of Wesnoth's characters was given (data.folder). Get it with:\n{COMMANDS}")
    root = pathlib.Path(folder)
    candidates = [root, root / "core", root / "data/core", *sorted(root.glob("usr/share/games/wesnoth/*/data/core"))]
    for candidate in candidates:
        if (candidate / "images/units").is_dir() and (candidate / "units").is_dir():
            return candidate
    raise FileNotFoundError(f"{root} is not an unpacked wesnoth-1.16-data. Get it with:\n{COMMANDS}")


def _frames_of(core: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of each character by its name, its standing picture first."""
    images = core / "images"
    standing: dict[pathlib.Path, str] = {}  # picture that a unit type names: name of the character
    for path in sorted((core / "units").rglob("*.cfg")):
        for picture, name in unit_types(path.read_text(encoding="utf-8", errors="replace")):
            if (images / picture).is_file() and name not in standing.values():
                standing.setdefault(images / picture, name)
    stems = {(path.parent, _stem(path.stem)): path for path in standing}
    found = {name: [path] for path, name in standing.items()}
    for directory in sorted({path.parent for path in standing}):
        for path in sorted(directory.glob("*.png")):
            # The longest unit name that the file's name begins with: "mage-white-attack" is no mage.
            parts = path.stem.split("-")
            owners = (stems.get((directory, "-".join(parts[:end]))) for end in range(len(parts), 0, -1))
            owner = next((owner for owner in owners if owner is not None), None)
            if owner is not None and path != owner:
                found[standing[owner]].append(path)
    return found


def _stem(stem: str) -> str:
    """What the names of all frames of a character begin with, from that of its standing picture."""
    return re.sub(r"(-(s|se|sw|n|ne|nw|idle|stand|bob|\d+))+$", "", stem)


def unit_types(text: str) -> Iterable[tuple[str, str]]:
    """Picture and name, after its article, of the unit types of a .cfg file, with those of their female variants.

    ``units/elves-wood/archer.png``, "an elvish archer"; ``units/elves-wood/archer+female.png``, "a female elvish
    archer". Types whose picture or name is not plain text are left out.
    """
    for macro, value in re.findall(r"^#define (\w+)\n(.*)#enddef", text, re.MULTILINE):
        text = text.replace(f"{{{macro}}}", value)
    for block in text.split("[unit_type]")[1:]:
        male, *others = re.split(r"\[female\]", block, maxsplit=1)
        first = _picture_and_name(male)
        if first is not None:
            yield first[0], _with_article(first[1])
        second = _picture_and_name(others[0]) if others else None
        if second is not None and (first is None or second[0] != first[0]):
            same = first is not None and second[1] == first[1]  # an enchantress needs no other word
            yield second[0], _with_article(f"female {second[1]}" if same else second[1])


def _picture_and_name(block: str) -> tuple[str, str] | None:
    picture = re.search(r'^\s*image="(units/[\w/+-]+\.png)', block, re.MULTILINE)
    name = re.search(r'^\s*name= *_ *"(?:\w+\^)?([A-Za-z]+(?:[ -][A-Za-z]+)*)"', block, re.MULTILINE)
    return (picture[1], name[1].lower()) if picture and name else None


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _read_frames(name: str, paths: list[pathlib.Path]) -> dict[str, tuple[str, np.ndarray]]:
    """Usable frames: pose word and RGBA uint8 [h, w, 4], cut to the opaque box; the standing picture first."""
    base, *others = paths
    stem = _stem(base.stem)
    still = _read(base, name)
    if still is None:
        return {}
    frames = {base.stem: ("standing", still)}
    area = int((still[..., 3] > 127).sum())
    for path in others:
        pose = pose_of(path.stem[len(stem) :])
        pixels = _read(path, name) if pose else None
        if pose and pixels is not None and (pixels[..., 3] > 127).sum() >= _MIN_AREA * area:
            frames[path.stem] = pose, pixels
    return frames


def pose_of(rest: str) -> str | None:
    """Pose word of what a frame's name has after the name of the unit; None where it tells none that is known."""
    words = {word.strip("0123456789") for word in rest.split("-")} - _IDLE_PARTS
    if not words:
        return "standing"
    for pose, known in _POSE_WORDS:
        if words & set(known.split()):
            return None if pose == "left out" else pose
    return None


def _read(path: pathlib.Path, name: str) -> np.ndarray | None:
    """A frame in the colours of its character, or None where it cannot be used."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if max(picture.size) > MAX_SIDE:
                return None
            image = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError):
        return None  # A damaged frame costs one frame, not the cast.
    box = image.getchannel("A").getbbox()
    if box is None:
        return None
    hue = _HUES[zlib.crc32(name.encode()) // _TEST_SHARE % len(_HUES)]
    return _recoloured(np.array(image.crop(box)), hue)


def _recoloured(pixels: np.ndarray, hue: float) -> np.ndarray:
    """Replaces the colours of the side by shades of one hue (0..1), equally light and saturated; in place."""
    packed = pixels[..., 0].astype(np.int32) << 16 | pixels[..., 1].astype(np.int32) << 8 | pixels[..., 2]
    for number in _TEAM_COLOURS:
        here = packed == number
        if here.any():
            _, saturation, value = colorsys.rgb_to_hsv(number >> 16, number >> 8 & 255, number & 255)
            pixels[here, :3] = [round(channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
    return pixels
