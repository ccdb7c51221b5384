"""Text in boxes: its ink stays inside, in every script, and nothing is ever drawn as an empty box."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from pixelstory_jax.inference.fonts import FOLDER, SHIPPED, FontError, Fonts, characters_of, sized
from pixelstory_jax.inference.lettering import (
    ELLIPSIS,
    Lettering,
    NoRoomError,
    _joined,
    _levels,
    clusters,
    is_backwards,
    prepared,
)

TEXTS = {
    "English": "He was alone, and the night was very, very long for a little robot.",
    "Chinese": "夜幕降临，月亮升起来了。“你好，朋友！”小机器人说道。他一个人在沙滩上走了很久。",
    "Japanese": "ロボットは一人で海辺を歩いていました。「誰かいますか？」と叫びました。",
    "Korean": "로봇은 혼자 해변을 걷고 있었다. 아무도 없었다.",
    "Arabic": "كان الروبوت وحيدًا على الشاطئ، ومعه 12 صديقًا (robot 7) في الليل.",
    "Hebrew": 'הרובוט הלך לבד על החוף (בשעה 10:30) ואמר "Hello" לכולם!',
    "Hindi": "रोबोट अकेला समुद्र तट पर चल रहा था। क्षत्रिय ज्ञान",
    "Russian": "Робот шёл один по берегу моря, и никого вокруг не было.",
    "Greek": "Το ρομπότ ήταν μόνο του στην παραλία.",
    "Thai": "หุ่นยนต์เดินอยู่คนเดียวบนชายหาดที่เงียบสงบ",
    "Vietnamese": "Người máy đi một mình trên bãi biển vắng.",
    "marks": "♥ ★ → ♪ «Ça va?» — naïve… 3/4 €",
}
needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no Raqm")


@pytest.fixture(scope="module", params=[pytest.param(True, marks=needs_raqm), False], ids=["raqm", "plain"])
def lettering(request) -> Lettering:
    return Lettering(Fonts.with_shipped(), shaped=request.param)


def ink(lettering: Lettering, block, centred: bool = False) -> tuple[int, int, int, int]:
    """Bounding box of what is drawn at (100, 100)."""
    page = Image.new("L", (block.width + 200, block.height + 200))
    lettering.draw(ImageDraw.Draw(page), block, 100, 100, "white", centred)
    box = page.getbbox()
    assert box is not None
    return box


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("width", "height"), [(400, 150), (150, 240), (90, 60)])
def test_ink_stays_in_the_box(lettering, name, width, height):
    if name == "Hindi" and not lettering.shaped:
        pytest.skip("refused without Raqm, see below")
    block = lettering.fit(TEXTS[name], width, height, 36, 12)
    assert block.width <= width and block.height <= height and 12 <= block.size <= 36
    for centred in (False, True):
        left, top, right, bottom = ink(lettering, block, centred)
        assert left >= 100 and top >= 100 and right <= 100 + block.width and bottom <= 100 + block.height
        assert right - left >= block.width - 0.3 * block.size  # the block is no wider than its ink and its advance
    if width == 400:
        assert not block.cut


def text_of(block) -> str:
    """The words of a block in the order in which they are drawn."""
    return " ".join("".join(run.text for run in line.runs) for line in block.lines)


def test_lines_break_at_spaces_and_are_balanced(lettering):
    block = lettering.fit(TEXTS["English"], 400, 150, 36, 14)
    assert text_of(block) == TEXTS["English"]
    widths = [line.width for line in block.lines]
    assert len(widths) == 3 and min(widths) > 0.75 * max(widths)


def test_letters_shrink_until_the_text_fits(lettering):
    sizes = [lettering.fit(TEXTS["English"], width, 120, 40, 8).size for width in (900, 400, 300, 200)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 40 and sizes[-1] < 30


def test_what_does_not_fit_ends_in_an_ellipsis(lettering):
    block = lettering.fit("word " * 200, 200, 60, 30, 14)
    assert block.cut and block.size == 14 and text_of(block).endswith("word" + ELLIPSIS)
    assert block.width <= 200 and block.height <= 60
    with pytest.raises(NoRoomError, match="no room"):
        lettering.fit("word", 200, 8, 30, 14)
    with pytest.raises(ValueError, match="no text"):
        lettering.fit(" \n", 200, 60, 30, 14)


def test_a_word_is_broken_only_where_it_must_be(lettering):
    word = "Donaudampfschifffahrtsgesellschaftskapitän"
    assert len(lettering.fit(word, 400, 100, 40, 12).lines) == 1
    broken = lettering.fit(word, 120, 100, 40, 12)
    assert len(broken.lines) > 1 and broken.size == 12 and text_of(broken).replace(" ", "") == word


def test_chinese_breaks_between_characters_but_not_before_a_full_stop(lettering):
    for width in range(100, 400, 9):
        block = lettering.fit(TEXTS["Chinese"], width, 400, 30, 10, balanced=False)
        for line in block.lines:
            text = "".join(run.text for run in line.runs)
            assert text[0] not in "，。！”" and text[-1] != "“"


def test_a_cluster_is_never_broken(lettering):
    text = "é" * 30 + "ộ" * 30
    decomposed = "q\u0301" * 60  # there is no composed form
    for sample in (text, decomposed):
        block = lettering.fit(sample, 70, 400, 20, 12)
        for line in block.lines:
            assert "".join(run.text for run in line.runs)[0] not in "\u0301\u0302\u0323"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("abc", ["a", "b", "c"]),
        ("e\u0301x", ["e\u0301", "x"]),
        ("क्षत्रि", ["क्ष", "त्रि"]),
        ("👩\u200d🚀!", ["👩\u200d🚀", "!"]),
        ("👍🏽🇩🇪🇫🇷", ["👍🏽", "🇩🇪", "🇫🇷"]),
        ("เดินที่", ["เดิ", "น", "ที่"]),
        ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"]),
    ],
)
def test_clusters(text, parts):
    assert clusters(text) == parts


def test_prepared():
    assert prepared("  e\u0301 \n\t a\u200b\ufe0f ") == "é a"


def test_direction_and_levels():
    assert is_backwards("12 שלום abc") and not is_backwards("abc שלום") and not is_backwards("12")
    assert _levels(list("ab אב 12 c"), False) == [0, 0, 0, 1, 1, 1, 2, 2, 0, 0]
    assert _levels(list("אב ab 1.5!"), True) == [1, 1, 1, 2, 2, 2, 2, 2, 2, 1]


def test_right_to_left_lines_are_in_visual_order(lettering):
    line = lettering.line("שלום abc 12!", True, 20)
    shown = [(run.text.strip(), run.backwards) for run in line.runs]
    hebrew = "שלום" if lettering.shaped else "םולש"
    assert shown[0] == ("!", True) and shown[1] == ("abc 12", False) and shown[-1] == (hebrew, True)
    block = lettering.fit("קצר וארוך יותר מאוד", 110, 100, 24, 12)
    assert len(block.lines) > 1
    page = Image.new("L", (block.width, block.height))
    lettering.draw(ImageDraw.Draw(page), block, 0, 0, "white")
    top = np.asarray(page)[: block.baselines[0]].any(axis=0)
    assert top[-1:].any() or np.asarray(page)[block.baselines[0] :].any(axis=0)[-1]  # flush right


def test_arabic_letters_are_joined_without_raqm():
    assert _joined("بيت") == "\ufe91\ufef4\ufe96"  # initial, medial, final
    assert _joined("دار") == "\ufea9\ufe8d\ufead"  # none of these joins the next one
    assert _joined("سلام") == "\ufeb3\ufefc\ufee1"  # lam and alef are one shape
    assert _joined("abc 12") == "abc 12"


def test_scripts_of_india_are_refused_without_raqm():
    with pytest.raises(FontError, match="needs a Pillow with Raqm"):
        Lettering(Fonts.with_shipped(), shaped=False).fit(TEXTS["Hindi"], 400, 200, 30, 12)


@pytest.mark.parametrize("character", ["😀", "ꙮ", "\ue000"])
def test_a_character_without_font_is_named(lettering, character):
    with pytest.raises(FontError, match=f"U\\+{ord(character):04X}"):
        lettering.fit(f"Hello {character}", 400, 200, 30, 12)


def test_no_shipped_font_draws_empty_boxes():
    """What the character map of a shipped font has differs from its picture of a missing character."""
    for name in SHIPPED:
        font = sized(FOLDER / name, 40, False)
        missing = bytes(font.getmask("\U0010fffd"))
        known = sorted(code for code in characters_of(FOLDER / name) if chr(code).isalnum())
        assert known or "Symbols" in name
        for code in known[:: max(1, len(known) // 40)]:
            assert bytes(font.getmask(chr(code))) != missing, (name, hex(code))


def test_shipped_fonts_are_small_and_cover_common_characters():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2_500_000
    assert (FOLDER / "NOTICE").is_file()
    fonts = Fonts.with_shipped()
    hangul = "".join(map(chr, range(0xAC00, 0xD7A4, 1)))
    kana = "".join(map(chr, [*range(0x3041, 0x3097), *range(0x30A1, 0x30FB)]))
    assert fonts.covering(kana) and fonts.covering("的一是不了人我在有他这中大来上国這個們說時國會") is not None
    assert sum(fonts.covering(syllable) is not None for syllable in hangul) >= 2350


def test_own_fonts_come_first(tmp_path):
    own = tmp_path / "own.ttf"
    own.write_bytes((FOLDER / "NotoSans-Bold.ttf").read_bytes())
    assert Fonts.with_shipped([own]).choose("a") == own
    assert Fonts.with_shipped([own]).choose("你").name == "NotoSansCJK-Bold.otf"
    assert Fonts.with_shipped().choose("a").name == "ComicNeue-Bold.otf"


@pytest.mark.parametrize("content", [b"", b"not a font at all", b"\x00\x01\x00\x00\xff\xff" + b"\xff" * 64, None])
def test_files_that_are_no_fonts_are_named(tmp_path, content):
    path = tmp_path / "bad.ttf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FontError, match="bad.ttf"):
        Fonts((path,))


def test_a_damaged_character_map_is_refused(tmp_path):
    good = bytearray((FOLDER / "NotoSansHebrew-Bold.ttf").read_bytes())
    for k in range(0, len(good), 97):
        bad = bytearray(good)
        bad[k : k + 8] = b"\xff" * min(8, len(bad) - k)
        path = Path(tmp_path / f"{k}.ttf")
        path.write_bytes(bad)
        try:
            Fonts((path,))
        except FontError as error:
            assert path.name in str(error)
