"""Makes the fonts of comic pages again from the Debian packages that they come from.

    apt-get download fonts-comic-neue fonts-noto-core fonts-noto-cjk
    for package in fonts-*.deb; do dpkg -x "$package" debian; done
    pip install fonttools
    python -m pixelstory_jax.inference.prepare_fonts --debian=debian

Comic Neue is copied whole. The Noto fonts are cut to the characters named here, without hints and vertical layout. The
same packages and the same fontTools give the same bytes.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Iterable, Iterator

from absl import app, flags

from pixelstory_jax.inference.fonts import FOLDER

COPIED = ("opentype/comic-neue/ComicNeue-Bold.otf",)
NOTO = "truetype/noto/NotoSans{}-Bold.ttf"
CJK, CJK_FACE = "opentype/noto/NotoSansCJK-Bold.ttc", "Noto Sans CJK SC"

JOINERS = (0x200C, 0x200D)
PUNCTUATION = (*range(0x20, 0x7F), *range(0xA0, 0x100), *range(0x2010, 0x2028), *range(0x2030, 0x205F), 0x25CC)
SCRIPTS: dict[str, tuple[int, ...]] = {
    "": (
        *PUNCTUATION,
        *range(0x100, 0x180),  # Latin Extended-A
        *(0x192, 0x218, 0x219, 0x21A, 0x21B, 0x1A0, 0x1A1, 0x1AF, 0x1B0),
        *range(0x300, 0x30D),  # combining accents
        *(0x323, 0x326, 0x327, 0x328),
        *range(0x370, 0x460),  # Greek, Cyrillic
        *range(0x490, 0x500),
        *range(0x1E80, 0x1E86),  # Welsh
        *range(0x1EA0, 0x1EFA),  # Vietnamese
        *range(0x20A0, 0x20C0),  # currencies
        *(0x2116, 0x2122),
    ),
    "Arabic": (*range(0x600, 0x700), *range(0x750, 0x780), *range(0xFB50, 0xFE00), *range(0xFE70, 0xFEFF), *JOINERS),
    "Armenian": (*range(0x530, 0x590),),
    "Devanagari": (*range(0x900, 0x980), *JOINERS, 0x25CC),
    "Georgian": (*range(0x10A0, 0x1100), *range(0x1C90, 0x1CC0)),
    "Hebrew": (*range(0x590, 0x600), *range(0xFB1D, 0xFB50)),
    "Thai": (*range(0xE00, 0xE80), 0x25CC),
}
"""Characters by the name of their Noto font."""
SYMBOLS = (*range(0x2600, 0x2616), 0x2620, *range(0x2639, 0x263D), *range(0x2660, 0x2670), 0x26A0, 0x26A1, 0x26BD)
SYMBOLS += (0x26C4, 0x26C5, *range(0x2701, 0x27C0))
SYMBOL_FONT = "truetype/noto/NotoSansSymbols2-Regular.ttf"

# Rows of two-byte encodings that hold the characters in common use, as the standards order them.
COMMON_ROWS = (
    ("gb2312", range(16, 56)),  # simplified Chinese, level 1: 3,755
    ("euc_jp", range(16, 48)),  # Japanese, level 1: 2,965
    ("euc_kr", range(16, 41)),  # Korean syllables: 2,350
)


def common_cjk() -> Iterator[int]:
    """Code points of punctuation, kana, and the Chinese, Japanese and Korean characters in common use."""
    yield from (*range(0x2190, 0x2194), 0x203B, 0x266A, 0x266B)  # arrows, reference mark, notes
    yield from (*range(0x3000, 0x3030), *range(0x3040, 0x3100), *range(0x3131, 0x318F), *range(0xFF01, 0xFFE7))
    for encoding, rows in COMMON_ROWS:
        for row in rows:
            for cell in range(1, 95):
                try:
                    yield ord(bytes((0xA0 + row, 0xA0 + cell)).decode(encoding))
                except UnicodeDecodeError:
                    continue  # a cell that the standard leaves empty
    for lead in range(0xA4, 0xC7):  # traditional Chinese, level 1: 5,401
        for trail in (*range(0x40, 0x7F), *range(0xA1, 0xFF)):
            try:
                yield ord(bytes((lead, trail)).decode("big5"))
            except UnicodeDecodeError:
                continue


def prepare_fonts(debian: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the fonts of `FOLDER` into `target`.

    Args:
      debian: folder into which the packages were unpacked.

    Raises:
      FileNotFoundError: a font of the packages is missing; all of them are listed.
    """
    root = debian / "usr" / "share" / "fonts"
    scripts = {name: root / NOTO.format(name) for name in SCRIPTS}
    symbols = root / SYMBOL_FONT
    wanted = [*(root / path for path in COPIED), *scripts.values(), symbols, root / CJK]
    missing = [str(path) for path in wanted if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{debian} lacks the fonts {', '.join(missing)}")
    target.mkdir(parents=True, exist_ok=True)
    for copied in COPIED:
        shutil.copyfile(root / copied, target / pathlib.Path(copied).name)
    for name, path in scripts.items():
        _cut(path, target / path.name, SCRIPTS[name])
    _cut(symbols, target / symbols.name, SYMBOLS)
    _cut(root / CJK, target / "NotoSansCJK-Bold.otf", common_cjk(), face=CJK_FACE)


def _cut(source: pathlib.Path, target: pathlib.Path, characters: Iterable[int], face: str | None = None) -> None:
    """Writes the part of a font that draws `characters`; `face` names the one wanted of a collection."""
    from fontTools import subset, ttLib  # only whoever remakes the fonts needs fontTools

    options = subset.Options(hinting=False, notdef_outline=True, recalc_timestamp=False)
    options.drop_tables += ["BASE", "VORG", "vhea", "vmtx", "DSIG"]
    if face:
        options.layout_features = []  # alternates of thousands of characters would double the file
        names = [font["name"].getDebugName(1) for font in ttLib.TTCollection(str(source), lazy=True).fonts]
        options.font_number = names.index(face)
    font = subset.load_font(str(source), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=set(characters))
    cutter.subset(font)
    subset.save_font(font, str(target), options)


def main(_: list[str]) -> None:
    prepare_fonts(pathlib.Path(flags.FLAGS.debian), FOLDER)
    sizes = {path.name: path.stat().st_size for path in sorted(FOLDER.iterdir())}
    print("\n".join(f"{size:9,} {name}" for name, size in sizes.items()), f"\n{sum(sizes.values()):9,} in all")


if __name__ == "__main__":
    flags.DEFINE_string("debian", None, "folder into which the Debian packages were unpacked", required=True)
    app.run(main)
