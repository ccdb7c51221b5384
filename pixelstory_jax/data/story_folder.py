"""Stories of a user: pictures in a folder, and a file that says which of them make a story, with captions.

    FOLDER/stories.jsonl   one story a line: {"panels": [{"image": "a.png", "caption": "a fox runs"}, ...]}

A story may have "split": "train" or "test"; without it, it is for training. Other fields are ignored. Pictures are
named relative to the folder and lie in it.

P  panels of an example
S  side of a panel in pixels
T  tokens of a caption
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pixelstory_jax.data.builtin.scenes import scene_rng
from pixelstory_jax.data.builtin.stories import STORY_SPLITS
from pixelstory_jax.data.images import ImageError, open_image
from pixelstory_jax.data.pipeline import DataError

STORIES = "stories.jsonl"
_STORY = 'a story is {"panels": [{"image": "a.png", "caption": "..."}, ...]}'
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell them, no text can hold them


class StoryFolderError(DataError):
    """A folder of stories that cannot be used; one sentence with file and line."""


class FolderPanel(NamedTuple):
    """A panel as an example has it.

    Attributes:
      image: path of the picture. caption: the words, as they were written.
      mirrored: whether the picture is turned left to right.
      line: of the file that lists the stories.
    """

    image: Path
    caption: str
    mirrored: bool
    line: int


class StoryFolder:
    """Random access to the stories of a folder.

    An example has ``images`` uint8 [P, S, S, 3] and, for each encoder, its token ids int32 [P, T]. It is a function of
    (seed, split, index). Pictures are cut to their middle square and resized by Lanczos' filter. A story of more than
    P panels gives P consecutive ones, drawn at random. A story of fewer is gone through again and again, every second
    time with its pictures mirrored.

    Args:
      folder: with stories.jsonl.
      encoders: from a caption to its token ids, int [T], by the name of the field: "tokens" (and "tokens_2").
      seed: of the draws, non-negative.
      split: "train" or "test".
      size: side S of a panel.
      panels: number P of panels.
      draws: examples that are made of each story; index i is draw i // N of story i % N.

    Raises:
      StoryFolderError: the file or a picture is missing, a line is not a story, or the split is empty.
      ValueError: an argument out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        encoders: Mapping[str, Callable[[str], np.ndarray]],
        seed: int,
        split: str,
        size: int,
        panels: int,
        draws: int = 1,
    ) -> None:
        if split not in STORY_SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(STORY_SPLITS)}")
        if min(seed, size - 1, panels - 1, draws - 1) < 0:
            raise ValueError(
                "a folder of stories needs a seed of at least 0, and size, panels and draws of at least 1, "
                f"got seed {seed}, size {size}, panels {panels}, draws {draws}"
            )
        self.file = Path(folder) / STORIES
        content = _read_bytes(self.file)
        self.digest = hashlib.sha256(content).hexdigest()  # of the file that lists the stories
        stories = _read_stories(self.file, content)
        self._stories = [panels for own_split, panels in stories if own_split == split]
        if not self._stories:
            raise StoryFolderError(
                f'{self.file} has no story of the split {split!r} among its {len(stories)}; "split" in a line says '
                "which it is of, without it a story is for training."
            )
        self._encoders = dict(encoders)
        self._seed, self._split, self._size = seed, split, size
        self._panels, self._draws = panels, draws

    def __len__(self) -> int:
        return len(self._stories) * self._draws

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        panels = self.panels(index)
        example = {"images": np.stack([self._picture(panel) for panel in panels])}
        for name, encode in self._encoders.items():
            example[name] = np.stack([np.asarray(encode(panel.caption), np.int32) for panel in panels])
        return example

    def panels(self, index: int) -> tuple[FolderPanel, ...]:
        """What the panels of an example are, without reading pictures."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} does not exist, there are {len(self)}")
        story = self._stories[index % len(self._stories)]
        rng = scene_rng(self._seed, index, self._split, "run of panels")
        first = int(rng.integers(max(len(story) - self._panels, 0) + 1))
        rounds, places = np.divmod(first + np.arange(self._panels), len(story))
        return tuple(
            story[place]._replace(mirrored=bool(number % 2)) for number, place in zip(rounds, places, strict=True)
        )

    def _picture(self, panel: FolderPanel) -> np.ndarray:
        """The middle square of a picture, uint8 [S, S, 3]."""
        try:
            picture = open_image(panel.image)
        except ImageError as error:
            raise StoryFolderError(f"{self.file}, line {panel.line}: {error}") from error
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = Image.fromarray(picture[top : top + side, left : left + side])
        resized = np.asarray(square.resize((self._size, self._size), Image.Resampling.LANCZOS))
        return resized[:, ::-1] if panel.mirrored else resized


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoryFolderError(
            f"{file} cannot be read ({error.strerror or error}); a folder of stories has this file, one story a line."
        ) from error


def _read_stories(file: Path, content: bytes) -> list[tuple[str, tuple[FolderPanel, ...]]]:
    """(split, panels) of every story."""
    root = file.parent.resolve()
    stories = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            stories.append(_parse_story(line, root, number))
        except ValueError as error:
            raise StoryFolderError(f"{file}, line {number}: {error}") from error
    return stories


def _parse_story(line: bytes, root: Path, number: int) -> tuple[str, tuple[FolderPanel, ...]]:
    """(split, panels) of a line. Raises ValueError with what is wrong with it."""
    try:
        story = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("the text is not UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON ({error}); {_STORY} on one line.") from None
    if not isinstance(story, dict) or not isinstance(story.get("panels"), list) or not story["panels"]:
        raise ValueError(f'there is no list "panels" with anything in it; {_STORY}.')
    split = story.get("split", "train")
    if split not in STORY_SPLITS:
        raise ValueError(f'"split" is {split!r}; it is one of {", ".join(STORY_SPLITS)}.')
    return split, tuple(
        _parse_panel(panel, f"panel {place}", root, number) for place, panel in enumerate(story["panels"], start=1)
    )


def _parse_panel(panel: Any, name: str, root: Path, number: int) -> FolderPanel:
    if not isinstance(panel, dict):
        raise ValueError(f'{name} is not {{"image": ..., "caption": ...}}.')
    for field in ("image", "caption"):
        text = panel.get(field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{name} has no "{field}", or an empty one.')
        if _HALF_CHARACTER.search(text):
            raise ValueError(f'"{field}" of {name} is not valid text: {text!r}.')
    return FolderPanel(_picture_path(panel["image"], name, root), panel["caption"], False, number)


def _picture_path(image: str, name: str, root: Path) -> Path:
    try:
        path = (root / image).resolve()
        is_there = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in circles, a zero byte
        raise ValueError(f"the picture {image!r} of {name} cannot be reached ({error}).") from error
    if not path.is_relative_to(root):
        raise ValueError(
            f"the picture {image!r} of {name} lies outside the folder; put it, not a link to it, into {root}."
        )
    if not is_there:
        raise ValueError(f"the picture of {name} is missing: there is no file {path}.")
    return path
