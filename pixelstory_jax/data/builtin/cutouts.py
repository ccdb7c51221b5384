"""Real photo cut-outs with names: the stamps of Tux Paint, read from a folder that the user unpacks.

    apt-get download tuxpaint-stamps-default
    dpkg -x tuxpaint-stamps-default*.deb stamps

The stamps are under the GPL version 2 and are therefore not embedded. They are converted once into a cache file; the
result is a ``ThingLibrary`` that ``compose`` takes in place of the embedded one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.prepare_assets import trim
from pixelstory_jax.data.builtin.things import ATTRIBUTES, Thing, ThingLibrary, read_table

COMMANDS = "apt-get download tuxpaint-stamps-default\ndpkg -x tuxpaint-stamps-default*.deb stamps"
LONG_SIDE = 128
MAX_PIXELS = 4096 * 4096
MIN_THINGS = 20
_FORMAT = 1

# Folder of the stamps (longest match wins): category, groups (a question mark for debatable ones), attributes.
# An attribute that is not listed is debatable for these things, except that dead things do none of what animals do.
_FOLDERS: dict[str, tuple[str, str, dict[str, bool]]] = {
    "animals/amphibians": ("animal", "animal reptile? sea-animal?", {"has_legs": True, "flies": False}),
    "animals/birds": ("animal", "animal bird farm-animal? sea-animal?", {"has_legs": True}),
    "animals/fish": ("animal", "animal sea-animal", {"lives_in_water": True, "flies": False}),
    "animals/insects": ("animal", "animal insect?", {"lives_in_water": False}),
    "animals/lizards": ("animal", "animal reptile", {"has_legs": True, "flies": False, "lives_in_water": False}),
    "animals/mammals": ("animal", "animal farm-animal?", {"has_legs": True, "flies": False, "lives_in_water": False}),
    "animals/mammals/aquatic": ("animal", "animal sea-animal?", {"flies": False}),
    "animals/marsupials": ("animal", "animal", {"has_legs": True, "flies": False, "lives_in_water": False}),
    "clothes": ("clothing", "clothing?", {}),
    "food": ("food", "food", {"edible": True}),
    "food/fruit": ("food", "food fruit plant?", {"edible": True, "grows": True}),
    "food/nuts": ("food", "food fruit? plant?", {"edible": True, "grows": True}),
    "food/vegetables": ("food", "food vegetable fruit? plant?", {"edible": True, "grows": True}),
    "hobbies": ("household", "household electronics? tool?", {}),
    "hobbies/music": ("instrument", "instrument", {"makes_music": True}),
    "household": ("household", "household kitchenware? tool? furniture? toy? electronics?", {}),
    "household/arttools": ("stationery", "stationery tool?", {"is_electric": False}),
    "household/dishes": ("kitchenware", "kitchenware tool?", {"is_electric": False}),
    "household/tools": ("tool", "tool", {}),
    "medical": ("household", "household tool?", {}),
    "plants/flowers": ("plant", "plant flower", {"grows": True}),
    "plants/trees": ("plant", "plant", {"grows": True}),
    "sports": ("sport", "sport? ball? toy?", {}),
    "vehicles/auto": ("vehicle", "vehicle", {"has_wheels": True, "flies": False}),
    "vehicles/construction": ("vehicle", "vehicle", {"has_wheels": True, "flies": False}),
    "vehicles/cycle": ("vehicle", "vehicle toy?", {"has_wheels": True, "flies": False}),
    "vehicles/emergency": ("vehicle", "vehicle", {"has_wheels": True, "flies": False}),
    "vehicles/flight": ("vehicle", "vehicle", {"flies": True}),
    "vehicles/masstransit": ("vehicle", "vehicle", {"has_wheels": True, "flies": False}),
    "vehicles/race": ("vehicle", "vehicle", {"has_wheels": True, "flies": False}),
    "vehicles/ship": ("vehicle", "vehicle boat", {"has_wheels": False, "flies": False}),
}
# Drawings, parts of things, and pictures that do not show one thing of their name.
_LEFT_OUT = re.compile(
    r"cartoon|_mirror|toys/|plastic/|clothes/(t_|button)|drumkit|wildboar|sedan_police|gnu-sitting|garlics|rambutan|"
    r"flower4|flower7|tricycle_|cylinder|clothes/hats|mammals/hedgehog|insects/bee|medical/tooth|rubberduck"
)
_ADJECTIVES = frozenset(
    re.findall(
        r"\S+",
        "red green brown black white yellow blue purple golden silver pink little small large big very male female "
        "european great colorful ripe baby sleeping sitting poisonous floppy-eared eared modern old-fashioned old "
        "lit closed open sweet folded sliced holiday albino striped stripey",
    )
)
_ALIASES = {
    "bell pepper": "bell pepper",
    "electric guitar": "guitar",
    "classical guitar": "guitar",
    "mandarin orange": "mandarin",
    "kiwifruit": "kiwi",
    "american football": "football",
    "lightbulb": "light bulb",
    "guinea fowl": "guinea fowl",
    "scissors": "scissors",
    "tamworth pig": "pig",
    "sumatran tiger": "tiger",
    "sedan car": "car",
    "gnu": "gnu",
    "trophy cup": "trophy",
    "garbage can": "trash can",
}
# Names that a person could mix up, by the family that they share.
_FAMILIES = {
    name: members.split(",")[0]
    for members in (
        "chicken,hen,rooster,turkey,peahen,peacock,guinea fowl",
        "camel,dromedary",
        "deer,doe,caribou,wapiti,indian blackbuck",
        "duck,drake,gander",
        "gull,seagull",
        "orange,mandarin",
        "violin,cello",
        "penguin,magellanic penguin",
        "car,sports car,race car,vw beetle",
        "truck,pickup truck",
        "sheep,ram",
        "mouse,rat",
        "dog,dingo",
        "cow,bull,zebu,yak,bison",
        "crow,blackbird,magpie",
        "dolphin,orca,whale",
        "wrench,adjustable wrench",
        "hammer,metal mallet",
        "sea lion,seal",
        "goat,mountaingoat",
        "flower,rose,iris,hibiscus,marigold,daffodil,gazania,pigface,star petunia",
        "pepper,chile pepper",
        "fly,hornet,bee",
        "squash,pumpkin",
        "parrot,adelaide rosella,rainbow lorikeet",
    )
    for name in members.split(",")
}
_ANIMAL_ONLY = frozenset({"lives_in_water", "has_legs"})


def cutout_library(folder: str | os.PathLike[str] | None, cache: pathlib.Path | None = None) -> ThingLibrary:
    """The cut-outs of an unpacked ``tuxpaint-stamps-default``, from the cache where it is fresh.

    Args:
      folder: where the package was unpacked; any folder above ``stamps`` will do.
      cache: file to keep the converted pictures in; by default one in the user's cache folder.

    Raises:
      FileNotFoundError: the folder is missing or holds too few stamps; the sentence says how to get them.
    """
    root = _stamps_folder(folder)
    sources = _stamps(root)
    if len(sources) < MIN_THINGS:
        raise FileNotFoundError(
            f"{root} holds {len(sources)} usable stamps, expected at least {MIN_THINGS}. Get them with:\n{COMMANDS}"
        )
    key = _fingerprint(root, sources)
    cache = cache or _cache_folder() / f"cutouts-{key[:16]}.npz"
    library = _load(cache, key)
    if library is None:
        library = _convert(root, sources)
        _save(cache, key, library)
    return library


def _stamps_folder(folder: str | os.PathLike[str] | None) -> pathlib.Path:
    if not folder:
        raise FileNotFoundError(f"No folder of photo cut-outs was given (data.folder). Get them with:\n{COMMANDS}")
    root = pathlib.Path(folder)
    for candidate in (root, root / "stamps", root / "usr/share/tuxpaint/stamps", root / "tuxpaint/stamps"):
        if (candidate / "animals").is_dir():
            return candidate
    raise FileNotFoundError(f"{root} is not an unpacked tuxpaint-stamps-default. Get it with:\n{COMMANDS}")


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pixelstory_jax"


def _folder_facts(path: str) -> tuple[str, str, dict[str, bool]] | None:
    parts = path.split("/")[:-1]
    for end in range(len(parts), 0, -1):
        facts = _FOLDERS.get("/".join(parts[:end]))
        if facts is not None:
            return facts
    return None


def _stamps(root: pathlib.Path) -> dict[str, str]:
    """Name to relative path; the first picture in alphabetical order where a name has several."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.png")):
        relative = path.relative_to(root).as_posix()
        text = path.with_suffix(".txt")
        if _LEFT_OUT.search(relative) or _folder_facts(relative) is None or not text.is_file():
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        name = short_name(lines[0]) if lines else None
        if name is not None:
            found.setdefault(name, relative)
    return found


def short_name(description: str) -> str | None:
    """The noun of a description such as "A big eared rabbit.", or None where it is not a short noun phrase."""
    match = re.fullmatch(r"(?:An?|The|Some)\s+([^.!?()]+?)(?:\s*\([^)]*\))?[.!]?", description.strip())
    if match is None:
        return None
    phrase = re.sub(r"^(pair|bunch|head) of ", "", re.sub(r"[“\"][^”\"]*[”\"]\s*", "", match[1].lower()))
    words = phrase.replace("great blue", "great").split()
    while len(words) > 1 and words[0] in _ADJECTIVES:
        words = words[1:]
    if len(words) > 1 and words[-1] in ("fruit", "flower", "bulb"):
        words = words[:-1]
    name = _ALIASES.get(" ".join(words), " ".join(words))
    return name if len(words) <= 2 and re.fullmatch(r"[a-z]+(?:[ -][a-z]+)?", name) else None


def _thing(name: str, relative: str) -> Thing:
    """A row for a cut-out: the reviewed facts where the table knows the name, those of the folder otherwise.

    Colours are left open, because a photo may show another one than the table's picture.
    """
    known = {thing.name: thing for thing in read_table()}.get(name)
    if known is not None:
        family = _FAMILIES.get(name, known.family)
        return dataclasses.replace(known, colour="", traces=frozenset(), family=family, file=relative)
    facts = _folder_facts(relative)
    assert facts is not None
    category, groups, attributes = facts
    listed = groups.split()
    values: list[tuple[str, bool | None]] = []
    for attribute in ATTRIBUTES:
        dead = attribute in _ANIMAL_ONLY and category != "animal"
        values.append((attribute, attributes.get(attribute, False if dead else None)))
    plural_only = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    return Thing(
        name=name,
        plural=name if plural_only else _plural(name),
        article="" if plural_only else "an" if name[0] in "aeiou" else "a",
        number="plural" if plural_only else "count",
        split="unseen" if zlib.crc32(name.encode()) % 5 == 0 else "train",
        category=category,
        groups=frozenset(group.replace("-", " ") for group in listed if not group.endswith("?")),
        doubtful_groups=frozenset(group[:-1].replace("-", " ") for group in listed if group.endswith("?")),
        family=_FAMILIES.get(name, name.split()[-1]),
        # A clownfish must not be answered by "There is no fish."
        shows=frozenset({"fish"} if relative.startswith("animals/fish/") else ()),
        attributes=tuple(values),
        file=relative,
    )


def _plural(name: str) -> str:
    if name.endswith("fish"):
        return name
    if re.search(r"(s|x|ch|sh)$", name):
        return name + "es"
    return re.sub(r"[^aeiou]y$", lambda match: match[0][0] + "ies", name) if name.endswith("y") else name + "s"


def _convert(root: pathlib.Path, sources: dict[str, str]) -> ThingLibrary:
    things, pictures = [], []
    for name, relative in sorted(sources.items()):
        try:
            with Image.open(root / relative, formats=("PNG",)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    continue
                small = np.asarray(trim(picture, LONG_SIDE))
        except (OSError, ValueError):
            continue  # A damaged or empty stamp costs one thing, not the library.
        solid = float((small[..., 3] > 127).mean())
        if min(small.shape[:2]) < LONG_SIDE // 8 or not 0.08 < solid < 0.97:
            continue  # A sliver, or a picture with its background left in.
        things.append(_thing(name, relative))
        pictures.append(small)
    if len(things) < MIN_THINGS:
        raise FileNotFoundError(
            f"only {len(things)} stamps under {root} could be read. Get them anew with:\n{COMMANDS}"
        )
    return ThingLibrary(things, pictures)


def _fingerprint(root: pathlib.Path, sources: dict[str, str]) -> str:
    entries = [(name, path, (root / path).stat().st_size) for name, path in sorted(sources.items())]
    return hashlib.sha256(json.dumps([_FORMAT, LONG_SIDE, entries]).encode()).hexdigest()


def _save(cache: pathlib.Path, key: str, library: ThingLibrary) -> None:
    """Writes the pictures under a temporary name and renames, so that no half file is ever read."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.concatenate([picture.ravel() for picture in library.pictures])
    shapes = np.array([picture.shape for picture in library.pictures], np.int32)
    rows = json.dumps([[thing.name, thing.file] for thing in library.things])
    handle, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, key=np.array(key), rows=np.array(rows), shapes=shapes, pixels=pixels)
        os.replace(temporary, cache)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _load(cache: pathlib.Path, key: str) -> ThingLibrary | None:
    """The cached library, or None where the file is missing, damaged or of other stamps."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            rows: Sequence[tuple[str, str]] = json.loads(str(stored["rows"]))
            shapes, pixels = stored["shapes"], stored["pixels"]
        ends = np.cumsum(shapes.prod(1))
        pictures = [part.reshape(shape) for part, shape in zip(np.split(pixels, ends[:-1]), shapes, strict=True)]
        return ThingLibrary([_thing(name, path) for name, path in rows], pictures)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
