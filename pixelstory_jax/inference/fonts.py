"""Fonts of comic pages: which characters a font file draws, and which of several fonts draws a piece of text.

A page is lettered in the user's fonts first, then in the shipped ones (assets/fonts, see NOTICE there).
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ImageFont

FOLDER = Path(__file__).parent / "assets" / "fonts"
SHIPPED = (
    "ComicNeue-Bold.otf",
    "NotoSans-Bold.ttf",
    "NotoSansHebrew-Bold.ttf",
    "NotoSansArabic-Bold.ttf",
    "NotoSansDevanagari-Bold.ttf",
    "NotoSansThai-Bold.ttf",
    "NotoSansArmenian-Bold.ttf",
    "NotoSansGeorgian-Bold.ttf",
    "NotoSansCJK-Bold.otf",
    "NotoSansSymbols2-Regular.ttf",
)
"""In order of preference."""
UNSEEN = frozenset("\u200c\u200d")
"""Joiners: they tell neighbours to join or not, and need no shape of their own."""


class FontError(ValueError):
    """A font file cannot be used, or no font has a character. panel: of which words (from 0), None for no panel's."""

    panel: int | None = None


@dataclasses.dataclass(frozen=True)
class Fonts:
    """Font files in order of preference.

    Raises:
      FontError: a file is missing or not a font.
    """

    files: tuple[Path, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            characters_of(file)

    @classmethod
    def with_shipped(cls, fonts: Sequence[Path] = ()) -> Fonts:
        """The given files first, then the shipped ones."""
        return cls((*map(Path, fonts), *(FOLDER / name for name in SHIPPED)))

    def covering(self, text: str) -> Path | None:
        """The first font that has every character of `text`."""
        wanted = {ord(character) for character in text if character not in UNSEEN}
        return next((file for file in self.files if wanted <= characters_of(file)), None)

    def choose(self, cluster: str) -> Path:
        """The first font that has every character of `cluster`; FontError if there is none."""
        if (file := self.covering(cluster)) is not None:
            return file
        alone = (character for character in cluster if self.covering(character) is None)
        missing = next(alone, cluster[0])
        name = unicodedata.name(missing, "a character without a name")
        raise FontError(
            f"No font here has the character {missing} (U+{ord(missing):04X}, {name}): leave it out, or name a font "
            "that has it."
        )


@functools.lru_cache(maxsize=512)
def sized(file: Path, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    """The font at `size` pixels; shaped: letters joined and placed by Raqm."""
    engine = ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC
    return ImageFont.truetype(str(file), size, layout_engine=engine)


@functools.cache
def characters_of(file: Path) -> frozenset[int]:
    """Code points that the font file draws, by its character map. Raises FontError as `Fonts`."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FontError(f"The font {file} cannot be read ({error.strerror or type(error).__name__}).") from None
    try:
        found = frozenset(_character_map(data))
        sized(file, 16, shaped=False)
    except (struct.error, OSError, ValueError, StopIteration, IndexError):
        raise FontError(f"{file} is not a TrueType or OpenType font that can be used here.") from None
    return found


def _character_map(data: bytes) -> Iterator[int]:
    """Reads the best Unicode subtable of `cmap` (OpenType specification: formats 4 and 12)."""
    start = struct.unpack_from(">I", data, 12)[0] if data[:4] == b"ttcf" else 0
    tables = (struct.unpack_from(">4sIII", data, start + 12 + 16 * i) for i in range(_word(data, start + 4)))
    cmap = next(offset for tag, _, offset, _ in tables if tag == b"cmap")
    subtables = {}
    for i in range(_word(data, cmap + 2)):
        platform, encoding, offset = struct.unpack_from(">HHI", data, cmap + 4 + 8 * i)
        if platform == 0 or (platform == 3 and encoding in (1, 10)):
            subtables[_word(data, cmap + offset)] = cmap + offset
    if 12 in subtables:
        return _segmented_32(data, subtables[12])
    if 4 in subtables:
        return _segmented_16(data, subtables[4])
    raise ValueError("no Unicode character map")


def _word(data: bytes, offset: int) -> int:
    return struct.unpack_from(">H", data, offset)[0]


def _segmented_32(data: bytes, table: int) -> Iterator[int]:
    groups, free = struct.unpack_from(">I", data, table + 12)[0], 0
    for i in range(groups):
        first, last, glyph = struct.unpack_from(">III", data, table + 16 + 12 * i)
        if not free <= first <= last <= 0x10FFFF:  # in order, so that no file keeps us busy for long
            raise ValueError("damaged character map")
        yield from range(first + (glyph == 0), last + 1)
        free = last + 1


def _segmented_16(data: bytes, table: int) -> Iterator[int]:
    segments = _word(data, table + 6) // 2
    ends, starts = table + 14, table + 16 + 2 * segments
    deltas, offsets = starts + 2 * segments, starts + 4 * segments
    free = 0
    for i in range(segments):
        first, last = _word(data, starts + 2 * i), _word(data, ends + 2 * i)
        if not free <= first <= last:
            raise ValueError("damaged character map")
        free = last + 1
        delta, offset = _word(data, deltas + 2 * i), _word(data, offsets + 2 * i)
        for code in range(first, last + 1):
            glyph = code + delta
            if offset:
                index = _word(data, offsets + 2 * i + offset + 2 * (code - first))
                glyph = index + delta if index else 0
            if glyph % 65536:
                yield code
