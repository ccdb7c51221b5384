"""Makes the embedded assets again from the packages that they come from.

    python -m pixelstory_jax.data.builtin.prepare_assets --fluent=DIR --scikit_image=DIR --scikit_learn=DIR

``--fluent`` is the unpacked npm package @lobehub/fluent-emoji-3d 1.1.0 (the folder with ``assets/<code point>.webp``);
the other two are the folders of the installed Python packages (``skimage``, ``sklearn``), whose sample photos give the
backgrounds. Which pictures are taken is decided by ``things.csv``. The same input and Pillow give the same bytes.
"""

from __future__ import annotations

import csv
import pathlib

import numpy as np
from absl import app, flags
from PIL import Image

from pixelstory_jax.data.builtin import things

LONG_SIDE = 96
THING_QUALITY = 80
BACKGROUND_QUALITY = 75
BACKGROUNDS = things.FOLDER / "assets" / "backgrounds"

# name: (package, file, crop box left, top, right, bottom in the source, longest side after shrinking, held out).
# The crops leave out whatever the table has a name for: no cup, flower, building, rocket or tree as a whole.
BACKGROUND_CROPS = {
    "sky": ("scikit_learn", "datasets/images/china.jpg", (320, 0, 640, 130), 256, False),
    "foliage": ("scikit_learn", "datasets/images/flower.jpg", (0, 0, 160, 427), 300, False),
    "shade": ("scikit_learn", "datasets/images/flower.jpg", (450, 0, 640, 340), 256, False),
    "dusk": ("scikit_image", "data/rocket.jpg", (335, 0, 440, 200), 200, False),
    "grass": ("scikit_image", "data/grass.png", (0, 0, 320, 320), 256, False),
    "gravel": ("scikit_image", "data/gravel.png", (0, 0, 320, 320), 256, False),
    "wood": ("scikit_image", "data/coffee.png", (480, 240, 600, 400), 160, True),
    "bricks": ("scikit_image", "data/brick.png", (60, 60, 380, 380), 256, True),
    "stars": ("scikit_image", "data/hubble_deep_field.jpg", (0, 0, 512, 512), 256, True),
}


def trim(picture: Image.Image, long_side: int = LONG_SIDE) -> Image.Image:
    """Cuts an RGBA picture to its opaque box (alpha above 8) and scales its long side to ``long_side`` pixels.

    Raises:
      ValueError: nothing in the picture is opaque.
    """
    picture = picture.convert("RGBA")
    box = Image.fromarray((np.asarray(picture)[..., 3] > 8).astype(np.uint8) * 255).getbbox()
    if box is None:
        raise ValueError("the picture is fully transparent")
    picture = picture.crop(box)
    scale = long_side / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    # Pillow multiplies RGBA by alpha before it resizes, so transparent pixels do not bleed into the edge.
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def prepare_things(fluent: pathlib.Path, target: pathlib.Path) -> None:
    """Writes one small WebP a row of the table.

    Raises:
      FileNotFoundError: pictures are missing from the package; all of them are listed.
    """
    with open(things.TABLE, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    sources: dict[str, pathlib.Path] = {}
    for row in rows:
        for suffix in ("", "-fe0f"):
            path = fluent / "assets" / f"{row['code']}{suffix}.webp"
            if path.is_file():
                sources[row["file"]] = path
    missing = [row["code"] for row in rows if row["file"] not in sources]
    if missing:
        raise FileNotFoundError(f"{fluent / 'assets'} lacks the pictures of the code points {', '.join(missing)}")
    target.mkdir(parents=True, exist_ok=True)
    for file, source in sources.items():
        with Image.open(source) as picture:
            trim(picture).save(target / file, quality=THING_QUALITY, alpha_quality=90, method=6)
    for stale in set(target.glob("*.webp")) - {target / file for file in sources}:
        stale.unlink()


def prepare_backgrounds(folders: dict[str, pathlib.Path], target: pathlib.Path) -> None:
    """Writes the photo crops; the name of a held-out one begins with ``test_``.

    Raises:
      FileNotFoundError: a photo is missing from its package.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name, (package, file, box, long_side, held_out) in BACKGROUND_CROPS.items():
        with Image.open(folders[package] / file) as photo:
            crop = photo.convert("RGB").crop(box)
        crop.thumbnail((long_side, long_side), Image.Resampling.LANCZOS)
        prefix = "test" if held_out else "train"
        crop.save(target / f"{prefix}_{name}.webp", quality=BACKGROUND_QUALITY, method=6)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    prepare_things(pathlib.Path(values.fluent), things.PICTURES)
    prepare_backgrounds(
        {"scikit_image": pathlib.Path(values.scikit_image), "scikit_learn": pathlib.Path(values.scikit_learn)},
        BACKGROUNDS,
    )
    files = [path for path in (things.FOLDER / "assets").rglob("*.webp")]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"{len(files)} pictures, {megabytes:.2f} MB in {things.FOLDER / 'assets'}")


if __name__ == "__main__":
    flags.DEFINE_string("fluent", None, "Folder of the unpacked npm package @lobehub/fluent-emoji-3d.", required=True)
    flags.DEFINE_string("scikit_image", None, "Folder of the installed package skimage.", required=True)
    flags.DEFINE_string("scikit_learn", None, "Folder of the installed package sklearn.", required=True)
    app.run(main)
