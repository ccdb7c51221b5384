"""Comic pages: words stand in their boxes, boxes stand apart, files are whole and always the same."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pixelstory_jax.inference.comic_layout import STYLES, Rectangle, layout
from pixelstory_jax.inference.comic_page import (
    CAPTION_PAPER,
    EDGE,
    ROUNDNESS,
    ComicError,
    Sizes,
    draw_pages,
    fill,
    letter_panel,
    quieter_side,
    save_comic,
)
from pixelstory_jax.inference.fonts import FOLDER, FontError, Fonts
from pixelstory_jax.inference.lettering import Lettering

LONG = "So he walked into the forest, where the trees were taller than anything that he had ever seen before. " * 3
CAPTIONS = (
    "",
    "He was alone.",
    "夜幕降临，月亮升起来了。小机器人一个人在沙滩上走了很久。",
    LONG,
    "כך הוא הלך לבד על החוף",
)
SPEECH = ("Hi!", "Where is everybody?", "I can see the moon, and it looks so close!", "你好，朋友！")
LETTERING = Lettering(Fonts.with_shipped())


def pictures(count: int, side: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(60, 200, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def drawn_box(words) -> tuple[int, int, int, int]:
    """Bounding box on the page of the ink of a text."""
    page = Image.new("L", (words.box.right + 100, words.box.bottom + 100))
    LETTERING.draw(ImageDraw.Draw(page), words.block, words.left, words.top, "white")
    box = page.getbbox()
    assert box is not None
    return box


def check_panel(panel: Rectangle, caption: str, bubbles: tuple[str, ...], sizes: Sizes, side: int) -> None:
    words = letter_panel(panel, caption, bubbles, LETTERING, sizes, side)
    assert (words.caption is None) == (not caption) and len(words.balloons) == len(bubbles)
    texts = [*([words.caption] if words.caption else []), *(balloon.words for balloon in words.balloons)]
    boxes = [text.box for text in texts]
    assert all(panel.contains(box) for box in boxes)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))
    middle = Rectangle(
        panel.left, panel.top + math.ceil(EDGE * panel.height), panel.width, math.floor((1 - 2 * EDGE) * panel.height)
    )
    assert not any(box.overlaps(middle) for box in boxes)
    for text in texts:
        left, top, right, bottom = drawn_box(text)
        assert text.box.inset(sizes.stroke).contains(Rectangle(left, top, right - left, bottom - top))
    for balloon in words.balloons:
        box, block = balloon.words.box, balloon.words.block
        inside = (block.width / (box.width - 2 * sizes.stroke)) ** ROUNDNESS
        inside += (block.height / (box.height - 2 * sizes.stroke)) ** ROUNDNESS
        assert inside <= 1 + 1e-9  # the corners of the text are inside of the curved outline
        assert panel.left < balloon.tip[0] < panel.right and panel.top < balloon.tip[1] < panel.bottom
        assert not any(other.overlaps(Rectangle(*map(round, balloon.tip), 1, 1)) for other in boxes)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [700, 1400])
def test_words_stand_in_their_boxes(style, width):
    sizes = Sizes.of(width)
    seen = set()
    for count in range(1, 21):
        for page in layout(count, style, width, title_height=sizes.title):
            for number, panel in enumerate(page.panels):
                size = panel.width, panel.height
                if size not in seen:
                    seen.add(size)
                    for k in range(5):
                        bubbles = tuple(SPEECH[(number + i) % 4] for i in range(k))
                        check_panel(panel, CAPTIONS[(number + k) % 5], bubbles, sizes, number % 2)


def test_the_hardest_panel():
    """Long words in every corner."""
    sizes = Sizes.of(1400)
    for k in range(5):
        for side in (400, 800):
            check_panel(Rectangle(10, 20, side, side), LONG, (LONG,) * k, sizes, 1)


def test_a_lone_balloon_stands_where_it_is_told():
    panel, sizes = Rectangle(100, 100, 400, 400), Sizes.of(1400)
    left, right = (letter_panel(panel, "", ("Hi!",), LETTERING, sizes, side).balloons[0].words.box for side in (0, 1))
    assert left.left - panel.left == panel.right - right.right < 30


def test_a_balloon_hides_what_has_less_to_show():
    busy = np.zeros((96, 96, 3), np.uint8)
    busy[:, :48] = np.random.default_rng(0).integers(0, 255, (96, 48, 3))
    assert quieter_side(Image.fromarray(busy)) == 1
    assert quieter_side(Image.fromarray(busy[:, ::-1])) == 0 == quieter_side(Image.new("RGB", (96, 96)))


@pytest.mark.parametrize("style", STYLES)
def test_pages_have_all_panels_in_frames(style):
    """Each picture is of one colour, so that its panel can be found on the page."""
    sizes = Sizes.of(1000)
    for count in (1, 2, 5, 9, 20):
        colours = [(40 + 9 * i, 200 - 7 * i, 90) for i in range(count)]
        pages = draw_pages([Image.new("RGB", (16, 16), colour) for colour in colours], style=style, width=1000, seed=2)
        plan = layout(count, style, 1000, seed=2)
        assert [page.size for page in pages] == [(place.width, place.height) for place in plan]
        seen = []
        for page, place in zip(pages, plan, strict=True):
            pixels = np.asarray(page)
            outside = np.ones(pixels.shape[:2], bool)
            for box in place.panels:
                shown = pixels[box.top : box.bottom, box.left : box.right]
                inner = shown[sizes.frame : -sizes.frame, sizes.frame : -sizes.frame].reshape(-1, 3)
                assert (inner == inner[0]).all() and (shown[0] == 17).all() and (shown[:, -1] == 17).all()
                seen.append(tuple(map(int, inner[0])))
                outside[box.top : box.bottom, box.left : box.right] = False
            assert (pixels[outside] == 255).all()
        assert seen == colours


def test_words_change_nothing_outside_of_their_boxes():
    """The page with words differs from the page without only where the words and the tails of the balloons are."""
    count = 6
    captions, bubbles = [CAPTIONS[i % 5] for i in range(count)], [SPEECH[: i % 5] for i in range(count)]
    plain = draw_pages(pictures(count))[0]
    lettered = draw_pages(pictures(count), captions, bubbles)[0]
    changed = (np.asarray(plain) != np.asarray(lettered)).any(axis=-1)
    sizes, plan = Sizes.of(1400), layout(count)[0]
    for number, panel in enumerate(plan.panels):
        side = quieter_side(fill(pictures(count)[number], panel.width, panel.height))
        words = letter_panel(panel, captions[number], bubbles[number], LETTERING, sizes, side)
        for text in [words.caption, *(balloon.words for balloon in words.balloons)]:
            if text:
                box = text.box
                assert changed[box.top : box.bottom, box.left : box.right].mean() > 0.5
                changed[box.top : box.bottom, box.left : box.right] = False
        for balloon in words.balloons:
            box = balloon.words.box
            (x, y), reach = balloon.tip, round(0.5 * balloon.words.block.size)
            left, right = min(box.left, round(x) - reach), max(box.right, round(x) + reach)
            top, bottom = min(box.top, round(y)), max(box.bottom, round(y) + 1)
            changed[top:bottom, left:right] = False
    assert not changed.any()


def test_the_title_stands_in_its_box():
    for title in ("Moon", LONG, "月亮上的机器人", "الروبوت والقمر"):
        page = np.asarray(draw_pages(pictures(3), title=title)[0]).astype(int)
        box = layout(3, title_height=Sizes.of(1400).title)[0].title
        assert box is not None
        frame = Sizes.of(1400).frame
        inner = page[box.top + frame : box.bottom - frame, box.left + frame : box.right - frame]
        ink = (inner.sum(axis=-1) < 200).nonzero()
        assert len(ink[0]) > 500
        assert ink[0].min() > 5 and ink[0].max() < inner.shape[0] - 6
        assert ink[1].min() > 5 and ink[1].max() < inner.shape[1] - 6
    assert len({page.width for page in draw_pages(pictures(12), title="Moon")}) == 1


def test_captions_have_their_colour():
    page = np.asarray(draw_pages(pictures(1), ["He was alone."])[0])
    paper = tuple(bytes.fromhex(CAPTION_PAPER[1:]))
    assert (page == paper).all(axis=-1).sum() > 2000


def test_small_pictures_are_enlarged_smoothly_and_wide_ones_are_not_stretched():
    step = np.zeros((24, 24, 3), np.uint8)
    step[:, 12:] = 255
    page = np.asarray(draw_pages([Image.fromarray(step)], width=1000)[0].convert("L")).astype(int)
    row = page[page.shape[0] // 2, 100:900]
    assert np.abs(np.diff(row)).max() < 60  # not a staircase of large pixels
    circle = Image.new("RGB", (64, 48), "white")
    ImageDraw.Draw(circle).ellipse((12, 4, 52, 44), "red")
    for count in range(1, 10):
        for place, page in zip(layout(count, aspect=4 / 3), draw_pages([circle] * count), strict=True):
            for box in place.panels:
                pixels = np.asarray(page.crop((box.left, box.top, box.right, box.bottom))).astype(int)
                red = (pixels[..., 0] > 200) & (pixels[..., 1] < 100)
                rows, columns = red.any(axis=1).sum(), red.any(axis=0).sum()
                if rows < box.height - 20 and columns < box.width - 20:
                    assert abs(rows / columns - 1) < 0.06


def test_files_are_whole_and_always_the_same(tmp_path):
    captions = [CAPTIONS[i % 5] for i in range(11)]
    for run in ("a", "b"):
        save_comic(draw_pages(pictures(11), captions, title="Moon", width=700), tmp_path / run, "Moon")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["comic.pdf", "page_1.png", "page_2.png"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    pdf = (tmp_path / "a" / "comic.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") == 2 and b"Date" not in pdf
    with Image.open(tmp_path / "a" / "page_1.png") as page:
        assert page.size[0] == 700


def test_a_shorter_comic_leaves_no_old_pages(tmp_path):
    (tmp_path / "page_of_mine.png").write_bytes(b"mine")
    save_comic(draw_pages(pictures(20), width=600), tmp_path)
    paths = save_comic(draw_pages(pictures(2), width=600), tmp_path)
    assert [path.name for path in paths] == ["page_1.png", "comic.pdf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comic.pdf", "page_1.png", "page_of_mine.png"]


def test_own_fonts_are_used():
    usual, own = (draw_pages(pictures(1), ["alone"], fonts=fonts)[0] for fonts in ([], [FOLDER / "NotoSans-Bold.ttf"]))
    assert usual.tobytes() != own.tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"captions": ["one"]}, "2 panels, 1 captions"),
        ({"bubbles": [["a"], ["b"], ["c"]]}, "3 lists of bubbles"),
        ({"bubbles": [[], ["a"] * 5]}, "Panel 2 has 5 bubbles"),
        ({"width": 300}, "at least 600 pixels"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ComicError, match=words):
        draw_pages(pictures(2), **arguments)


def test_a_character_without_font_is_named():
    for words in ({"captions": ["Hi 😀"]}, {"bubbles": [["Hi 😀"]]}, {"title": "Hi 😀"}):
        with pytest.raises(FontError, match=r"U\+1F600, GRINNING FACE"):
            draw_pages(pictures(1), **words)


def test_no_pages_no_files(tmp_path):
    with pytest.raises(ComicError, match="without pages"):
        save_comic([], tmp_path / "none")
    assert not (tmp_path / "none").exists()
