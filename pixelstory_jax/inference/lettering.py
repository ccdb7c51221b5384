"""Text in boxes: cut into lines, as large as fits, in any script that the fonts have.

Letters are joined and placed by Raqm where Pillow has it. Without it Arabic letters are joined by their presentation
forms, and scripts of India and its neighbours are refused, for they would be unreadable. The order of right-to-left
text follows the Unicode bidirectional algorithm (UAX #9) without its explicit controls. Nothing here knows pages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import ImageDraw, features

from pixelstory_jax.inference.fonts import FontError, Fonts, characters_of, sized

ELLIPSIS = "…"
LINE_PITCH, ASCENT, DESCENT, LINE_GAP = 1.16, 0.72, 0.2, 0.1
"""In font sizes: from baseline to baseline, the least above the first and below the last, the least between ink."""
SHRINK = 0.93  # from one font size that is tried to the next

_DROPPED = re.compile("[\ufe00-\ufe0f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\u00ad]")
_NO_START = frozenset("、。，．・：；？！ー」』）】〕》〉”’…‥々％ぁぃぅぇぉっゃゅょァィゥェォッャュョ)]}!?,.:;%»")
_NO_END = frozenset("「『（【〔《〈“‘([{«")
_MIRRORED = str.maketrans("()[]{}<>«»‹›", ")(][}{><»«›‹")
_UNREADABLE_UNJOINED = ((0x900, 0xDFF), (0xF00, 0x109F), (0x1780, 0x17FF))
_ZWJ, _VIRAMA_CLASS = "\u200d", 9


class NoRoomError(ValueError):
    """A box is too small for a single line."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring characters of one font and one direction."""

    font: Path
    text: str
    backwards: bool


@dataclasses.dataclass(frozen=True)
class Line:
    """Runs from left to right, and the ink in pixels (left, top, right, bottom) from the start of the baseline."""

    runs: tuple[Run, ...]
    ink: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        return self.ink[2] - self.ink[0]


@dataclasses.dataclass(frozen=True)
class TextBlock:
    """Lines at one font size, with their baselines from the top of the block; cut: words are missing at the end."""

    lines: tuple[Line, ...]
    baselines: tuple[int, ...]
    size: int
    width: int
    height: int
    backwards: bool
    cut: bool


@dataclasses.dataclass(frozen=True)
class Lettering:
    """Sets text in `fonts`; shaped: by Raqm.

    All methods raise FontError for a character that no font has.
    """

    fonts: Fonts
    shaped: bool = dataclasses.field(default_factory=lambda: bool(features.check("raqm")))

    def fit(self, text: str, width: int, height: int, largest: int, smallest: int, balanced: bool = True) -> TextBlock:
        """The text in a box of width x height pixels, at the largest of the font sizes that fits.

        Words are broken only at the smallest size; what does not fit there either ends in an ellipsis. Lines of
        balanced text are about equally long, in as few lines as the box allows.

        Raises:
          ValueError: there are no words.
          NoRoomError: the box has no room for a single line of the smallest size.
        """
        text = prepared(text)
        if not text:
            raise ValueError("There is no text to be put in a box.")
        size = largest
        while size > smallest:
            lines, broken = self._wrap(text, width, size)
            if not broken and (block := self._block(lines, text, size)).height <= height and block.width <= width:
                return self._balance(block, text, size) if balanced else block
            size = max(smallest, min(size - 1, round(size * SHRINK)))
        lines, _ = self._wrap(text, width, smallest)
        block = self._block(lines, text, smallest)
        if block.height <= height:
            return block
        return self._cut(lines, text, width, height, smallest)

    def _cut(self, lines: list[str], text: str, width: int, height: int, size: int) -> TextBlock:
        for count in range(len(lines) - 1, 0, -1):
            words, characters = list(_pieces(lines[count - 1])), clusters(lines[count - 1])
            shorter = [words[:k] for k in range(len(words), 0, -1)]
            shorter += [characters[:k] for k in range(len(characters), -1, -1)]  # of a word longer than the line
            for parts in shorter:
                last = "".join(parts).rstrip(" ,;:-") + ELLIPSIS
                if self._measure(last, is_backwards(text), size) <= width:
                    break
            block = self._block([*lines[: count - 1], last], text, size, cut=True)
            if block.height <= height and block.width <= width:
                return block
        raise NoRoomError(f"A box of {width} x {height} pixels has no room for a line of text of {size} pixels.")

    def _balance(self, block: TextBlock, text: str, size: int) -> TextBlock:
        """The same number of lines in the narrowest box."""
        low, high = block.width // len(block.lines), block.width
        while high - low > max(2, size // 4):
            middle = (low + high) // 2
            lines, broken = self._wrap(text, middle, size)
            if broken or len(lines) > len(block.lines):
                low = middle
            else:
                high, block = middle, self._block(lines, text, size)
        return block

    def _wrap(self, text: str, width: int, size: int) -> tuple[list[str], bool]:
        """Lines of at most `width` pixels, and whether a word had to be broken."""
        backwards = is_backwards(text)
        lines: list[str] = []
        line, broken = "", False
        for piece in _pieces(text):
            if self._measure((line + piece).rstrip(), backwards, size) <= width:
                line += piece
                continue
            if line:
                lines.append(line.rstrip())
            line = piece
            if self._measure(piece.rstrip(), backwards, size) > width:
                *full, line = self._break_word(piece, width, size)
                lines += full
                broken = True
        return [*lines, line.rstrip()], broken

    def _break_word(self, word: str, width: int, size: int) -> list[str]:
        parts = [""]
        for cluster in clusters(word):
            if parts[-1] and self._measure((parts[-1] + cluster).rstrip(), is_backwards(word), size) > width:
                parts.append("")
            parts[-1] += cluster
        return parts

    def _measure(self, text: str, backwards: bool, size: int) -> int:
        return self.line(text, backwards, size).width if text else 0

    def line(self, text: str, backwards: bool, size: int) -> Line:
        """One line of a paragraph that runs backwards or not."""
        return _line(self, text, backwards, size)

    def _runs(self, text: str, backwards: bool) -> tuple[Run, ...]:
        """Runs from left to right."""
        if not self.shaped:
            text = _joined(text)
            for low, high in _UNREADABLE_UNJOINED:
                if any(low <= ord(character) <= high for character in text):
                    raise FontError(
                        f"The text {text[:40]!r} needs a Pillow with Raqm to be readable: install the library fribidi "
                        "(on Debian and Ubuntu: libfribidi0)."
                    )
        pieces = clusters(text)
        fonts = _chosen(self.fonts, pieces)
        levels = _levels(pieces, backwards)
        runs, run_levels = [], []
        for (level, font), group in itertools.groupby(zip(levels, fonts, pieces, strict=True), key=lambda x: x[:2]):
            members = [piece for _, _, piece in group]
            if level % 2 and not self.shaped:  # drawn as it is read
                members = [piece.translate(_MIRRORED) for piece in reversed(members)]
            runs.append(Run(font, "".join(members), bool(level % 2)))
            run_levels.append(level)
        return tuple(runs[i] for i in _visual_order(run_levels))

    def _block(self, lines: Sequence[str], text: str, size: int, cut: bool = False) -> TextBlock:
        backwards = is_backwards(text)
        set_lines = tuple(self.line(line, backwards, size) for line in lines)
        baselines: list[int] = []
        for i, line in enumerate(set_lines):
            if i == 0:
                baselines.append(max(round(ASCENT * size), -line.ink[1]))
            else:
                touching = set_lines[i - 1].ink[3] - line.ink[1]
                baselines.append(baselines[-1] + max(round(LINE_PITCH * size), touching + round(LINE_GAP * size)))
        height = baselines[-1] + max(round(DESCENT * size), set_lines[-1].ink[3])
        width = max(line.width for line in set_lines)
        return TextBlock(set_lines, tuple(baselines), size, width, height, backwards, cut)

    def draw(
        self, draw: ImageDraw.ImageDraw, block: TextBlock, left: int, top: int, ink: str, centred: bool = False
    ) -> None:
        """Draws the block with its upper left corner at (left, top): lines centred, or beginning at one edge."""
        for line, baseline in zip(block.lines, block.baselines, strict=True):
            free = block.width - line.width
            x = float(left - line.ink[0] + (free // 2 if centred else free if block.backwards else 0))
            for run in line.runs:
                font = sized(run.font, block.size, self.shaped)
                direction = self.direction(run)
                draw.text((round(x), top + baseline), run.text, ink, font, anchor="ls", direction=direction)
                x = round(x) + font.getlength(run.text, direction=direction)

    def direction(self, run: Run) -> str | None:
        """What Pillow is told; without Raqm it draws everything to the right."""
        return ("rtl" if run.backwards else "ltr") if self.shaped else None


@functools.lru_cache(maxsize=65536)
def _line(lettering: Lettering, text: str, backwards: bool, size: int) -> Line:
    runs = lettering._runs(text, backwards)
    x, boxes = 0.0, []
    for run in runs:
        font = sized(run.font, size, lettering.shaped)
        direction = lettering.direction(run)
        left, top, right, bottom = map(int, font.getbbox(run.text, anchor="ls", direction=direction))
        boxes.append((round(x) + left, top, round(x) + right, bottom))
        x = round(x) + font.getlength(run.text, direction=direction)
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return Line(runs, (min(lefts), min(tops), max(rights), max(bottoms)))


def prepared(text: str) -> str:
    """Composed characters, single spaces, no invisible controls."""
    return " ".join(_DROPPED.sub("", unicodedata.normalize("NFC", text)).split())


def clusters(text: str) -> list[str]:
    """What a reader takes for one character each: letters with their marks, joined emoji, syllables of India.

    A simplified form of the extended grapheme clusters of Unicode (UAX #29); vowels of Thai and Lao that stand before
    or after their consonant belong to it.
    """
    found: list[str] = []
    for character in text:
        if found and _belongs(found[-1], character):
            found[-1] += character
        else:
            found.append(character)
    return found


def _belongs(cluster: str, character: str) -> bool:
    code, last = ord(character), ord(cluster[-1])
    if unicodedata.category(character).startswith("M") or character in "\u200c\u200d" or cluster[-1] == _ZWJ:
        return True
    if unicodedata.combining(cluster[-1]) == _VIRAMA_CLASS and unicodedata.category(character) == "Lo":
        return True
    if 0x1F3FB <= code <= 0x1F3FF:  # skin tones
        return True
    if 0x1F1E6 <= code <= 0x1F1FF:  # flags are pairs of letters
        return 0x1F1E6 <= last <= 0x1F1FF and len(cluster) % 2 == 1
    if 0x1160 <= code <= 0x11FF:  # vowels and finals of Korean
        return 0x1100 <= last <= 0x11FF
    thai = character in "\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3"
    return thai or (len(cluster) == 1 and (0xE40 <= last <= 0xE44 or 0xEC0 <= last <= 0xEC4))


def is_backwards(text: str) -> bool:
    """Whether the first letter of the text is of a script that runs from right to left."""
    strong = (unicodedata.bidirectional(character) for character in text)
    return next((kind in ("R", "AL") for kind in strong if kind in ("L", "R", "AL")), False)


def _pieces(text: str) -> Iterator[str]:
    """The text in the smallest pieces between which a line may end; a piece keeps the space behind it."""
    piece = ""
    for before, cluster in itertools.pairwise(["", *clusters(text)]):
        if piece and _may_break(before, cluster):
            yield piece
            piece = ""
        piece += cluster
    yield piece


def _may_break(before: str, after: str) -> bool:
    if before == " " or after == " ":
        return before == " "
    if after[0] in _NO_START or before[0] in _NO_END:
        return False
    return before in ("-", "—", "–") or _stands_alone(before) or _stands_alone(after)


def _stands_alone(cluster: str) -> bool:
    """Whether lines may end beside it without a space: Chinese, Japanese and Thai, but not Korean."""
    code = ord(cluster[0])
    if 0xE00 <= code <= 0xEFF:
        return True
    korean = 0x1100 <= code <= 0x11FF or 0xAC00 <= code <= 0xD7FF
    return unicodedata.east_asian_width(cluster[0]) in ("W", "F") and not korean


def _chosen(fonts: Fonts, pieces: Sequence[str]) -> list[Path]:
    """A font for each cluster: the same for a whole word where one has it; punctuation stays in the font before it."""
    chosen: list[Path] = []
    for _, word in itertools.groupby(pieces, key=lambda piece: piece == " "):
        members = list(word)
        common = fonts.covering("".join(piece for piece in members if not _is_punctuation(piece)))
        for piece in members:
            usual = common
            if _is_punctuation(piece):
                usual = chosen[-1] if chosen else None
            if usual is None or not characters_of(usual).issuperset(map(ord, piece)):
                usual = fonts.choose(piece)
            chosen.append(usual)
    return chosen


def _is_punctuation(piece: str) -> bool:
    return all(unicodedata.category(character)[0] in "ZP" for character in piece)


def _levels(pieces: Sequence[str], backwards: bool) -> list[int]:
    """Embedding levels: even ones run to the right, odd ones to the left (rules W2 to I2 of UAX #9, simplified)."""
    kinds = [unicodedata.bidirectional(piece[0]) for piece in pieces]
    numbers = [kind in ("EN", "AN") for kind in kinds]
    for i, kind in enumerate(kinds):  # separators within numbers, signs beside them
        around = [0 <= j < len(kinds) and kinds[j] in ("EN", "AN") for j in (i - 1, i + 1)]
        numbers[i] |= (kind in ("CS", "ES") and all(around)) or (kind == "ET" and any(around))
    base = int(backwards)
    sides: list[int | None] = []
    strong = base
    for kind, number in zip(kinds, numbers, strict=True):
        if kind in ("L", "R", "AL"):
            strong = int(kind != "L")
        sides.append(strong if number or kind in ("L", "R", "AL") else None)
    for start, end in _gaps(sides):
        before = sides[start - 1] if start else base
        after = sides[end] if end < len(sides) else base
        sides[start:end] = [before if before == after else base] * (end - start)
    return [(2 if number and side else 1 if side else 2 * base) for side, number in zip(sides, numbers, strict=True)]


def _gaps(sides: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    start = 0
    for empty, group in itertools.groupby(list(sides), key=lambda side: side is None):
        end = start + len(list(group))
        if empty:
            yield start, end
        start = end


def _visual_order(levels: Sequence[int]) -> list[int]:
    """Numbers of the runs from left to right (rule L2 of UAX #9)."""
    order = list(range(len(levels)))
    for level in range(max(levels, default=0), 0, -1):
        start = 0
        for inside, group in itertools.groupby([levels[i] >= level for i in order]):
            end = start + len(list(group))
            if inside:
                order[start:end] = order[start:end][::-1]
            start = end
    return order


@functools.cache
def _presentation_forms() -> dict[str, dict[str, str]]:
    """Arabic letters and ligatures with their shapes: {letter: {"isolated", "final", "initial", "medial": shape}}."""
    forms: dict[str, dict[str, str]] = {}
    for code in (*range(0xFB50, 0xFBB2), *range(0xFBD3, 0xFC00), *range(0xFE80, 0xFEFD)):
        kind, *letters = unicodedata.decomposition(chr(code)).split() or [""]
        if kind.strip("<>") in ("isolated", "final", "initial", "medial"):
            letter = "".join(chr(int(letter, 16)) for letter in letters)
            forms.setdefault(letter, {}).setdefault(kind.strip("<>"), chr(code))
    return forms


def _joined(text: str) -> str:
    """Arabic letters replaced by the shapes that they have between their neighbours."""
    forms = _presentation_forms()
    letters = re.findall("\u0644[\u0622\u0623\u0625\u0627]|.", text)  # lam and alef are one shape

    def joins(letter: str, forward: bool) -> bool:
        shapes = forms.get(letter, {})
        return letter == "\u0640" or ("initial" in shapes if forward else "final" in shapes)

    def neighbour(i: int, step: int) -> str:
        i += step
        while 0 <= i < len(letters) and unicodedata.category(letters[i][0]) == "Mn":
            i += step
        return letters[i] if 0 <= i < len(letters) else ""

    shown = []
    for i, letter in enumerate(letters):
        before = joins(neighbour(i, -1), True) and joins(letter, False)
        after = joins(letter, True) and joins(neighbour(i, 1), False)
        kind = {(0, 0): "isolated", (1, 0): "final", (0, 1): "initial", (1, 1): "medial"}[before, after]
        shown.append(forms.get(letter, {}).get(kind, letter))
    return "".join(shown)
