"""Makes the embedded characters again from the package that they come from.

    pip download --no-deps arcade==3.3.3 && unzip arcade-3.3.3-py3-none-any.whl -d arcade-3.3.3
    python -m pixelstory_jax.data.builtin.prepare_characters --arcade=arcade-3.3.3

Each character becomes one lossless WebP with its frames side by side. The same input and Pillow give the same bytes.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import app, flags
from PIL import Image

from pixelstory_jax.data.builtin import characters

IMAGES = "resources/assets/images/animated_characters"


def prepare_characters(arcade: pathlib.Path, target: pathlib.Path) -> None:
    """Writes one atlas a character.

    Args:
      arcade: folder of the unpacked wheel, or of the package ``arcade`` itself.
      target: folder of the atlases.

    Raises:
      FileNotFoundError: frames are missing from the package; all of them are listed.
      ValueError: a frame has another size than expected.
    """
    root = arcade / "arcade" if (arcade / "arcade").is_dir() else arcade
    sources = {file: [_frame_path(root, file, frame) for frame in characters.FRAMES] for file in characters.NAMES}
    missing = [path.name for paths in sources.values() for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{root / IMAGES} lacks the pictures {', '.join(missing)}")
    atlases = {file: np.concatenate([_read(path) for path in paths], axis=1) for file, paths in sources.items()}
    target.mkdir(parents=True, exist_ok=True)
    for file, atlas in atlases.items():
        Image.fromarray(atlas).save(target / f"{file}.webp", lossless=True, quality=100, method=6)


def _frame_path(root: pathlib.Path, file: str, frame: str) -> pathlib.Path:
    first, *others = file.split("_")
    return root / IMAGES / file / f"{first}{''.join(word.capitalize() for word in others)}_{frame}.png"


def _read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path, formats=("PNG",)) as picture:
        frame = np.array(picture.convert("RGBA"))
    if frame.shape[1::-1] != characters.FRAME_SIZE:
        width, height = characters.FRAME_SIZE
        raise ValueError(f"{path} is {frame.shape[1]}x{frame.shape[0]} pixels, expected {width}x{height}")
    frame[frame[..., 3] == 0] = 0  # the colour of what nobody sees would only cost bytes
    return frame


def main(_: list[str]) -> None:
    prepare_characters(pathlib.Path(flags.FLAGS.arcade), characters.ATLASES)
    files = list(characters.ATLASES.glob("*.webp"))
    print(f"{len(files)} characters, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {characters.ATLASES}")


if __name__ == "__main__":
    flags.DEFINE_string("arcade", None, "Folder of the unpacked wheel arcade 3.3.3.", required=True)
    app.run(main)
