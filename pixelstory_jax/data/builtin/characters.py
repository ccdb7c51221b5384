"""Characters drawn in several poses: the one type that stories are told with, and the six that are embedded.

The embedded ones are Kenney's animated characters (CC0, see NOTICE). Each is one file with its frames side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.things import FOLDER

ATLASES = FOLDER / "assets" / "characters"
FRAME_SIZE = (96, 128)  # width, height
FRAMES = ("idle", "jump", "fall", "climb0", "climb1", *(f"walk{step}" for step in range(8)))
"""Frames of an embedded character, in their order in its file."""
POSES = {
    "standing": ("idle",),
    "jumping": ("jump",),
    "falling": ("fall",),
    "climbing": ("climb0", "climb1"),
    "walking": tuple(f"walk{step}" for step in range(8)),
}
"""Pose words and the embedded frames that show them; `story_wording.ACTIONS` has the verbs of each."""
NAMES = {
    "female_adventurer": "a red-haired girl",
    "female_person": "a girl in green",
    "male_adventurer": "a scout",
    "male_person": "a man in orange",
    "robot": "a robot",
    "zombie": "a zombie",
}
"""File of an embedded character, and how captions call it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cast:
    """Named characters with their pictures, each in several poses.

    names: noun phrases after an indefinite article ("a robot"), no two alike.
    sprites: for each character its frames by name, RGBA uint8 [h, w, 4], not premultiplied.
    poses: for each character its pose words ("walking") and the frames that show the pose.
    height: opaque height in sprite pixels of a typical standing character, the unit of all sizes in panels.

    Raises:
      ValueError: lengths differ, a name is repeated or without article, a frame is missing, empty or not RGBA.
    """

    names: tuple[str, ...]
    sprites: tuple[Mapping[str, np.ndarray], ...]
    poses: tuple[Mapping[str, tuple[str, ...]], ...]
    height: float

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.sprites) == len(self.poses) or not self.names:
            raise ValueError(
                f"a cast needs sprites and poses for each of its names, got {len(self.names)} names, "
                f"{len(self.sprites)} sets of sprites, {len(self.poses)} sets of poses"
            )
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise ValueError(f"names must be unique in a cast, repeated: {', '.join(repeated)}")
        for name, sprites, poses in zip(self.names, self.sprites, self.poses, strict=True):
            if not name.startswith(("a ", "an ")):
                raise ValueError(f"the name {name!r} must be a noun phrase that begins with 'a' or 'an'")
            if not poses:
                raise ValueError(f"the character {name!r} has no pose, expected at least one")
            for pose, frames in poses.items():
                missing = [frame for frame in frames if frame not in sprites]
                if missing or not frames:
                    raise ValueError(f"the character {name!r} lacks frames of the pose {pose!r}: {', '.join(missing)}")
            for frame, sprite in sprites.items():
                if sprite.ndim != 3 or sprite.shape[-1] != 4 or sprite.dtype != np.uint8:
                    raise ValueError(
                        f"the frame {frame!r} of {name!r} must be RGBA uint8 [h, w, 4], got {sprite.dtype} "
                        f"{list(sprite.shape)}"
                    )
                if not sprite[..., 3].any():
                    raise ValueError(f"the frame {frame!r} of {name!r} is fully transparent")

    def __len__(self) -> int:
        return len(self.names)

    def sprite(self, character: int, frame: str) -> np.ndarray:
        """One frame of a character, RGBA uint8 [h, w, 4]."""
        return self.sprites[character][frame]

    @functools.cached_property
    def pose_words(self) -> tuple[str, ...]:
        """Every pose that any character has, sorted: the classes of a pose classifier."""
        return tuple(sorted({pose for poses in self.poses for pose in poses}))


@functools.cache
def builtin_cast() -> Cast:
    """The six embedded characters with 13 frames in five poses. Loaded once a process."""
    return Cast(
        names=tuple(NAMES.values()),
        sprites=tuple(_read_atlas(file) for file in NAMES),
        poses=(POSES,) * len(NAMES),
        height=100.0,
    )


def _read_atlas(file: str) -> dict[str, np.ndarray]:
    with Image.open(ATLASES / f"{file}.webp") as image:
        atlas = np.asarray(image.convert("RGBA"))
    return dict(zip(FRAMES, np.split(atlas, len(FRAMES), axis=1), strict=True))
