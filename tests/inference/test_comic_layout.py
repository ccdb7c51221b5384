"""Panels on pages: all of them, in order, without overlap, with equal gutters, and nothing cropped much."""

from __future__ import annotations

import itertools

import pytest

from pixelstory_jax.inference.comic_layout import MOST_PANELS, STYLES, Page, Rectangle, Spacing, layout

COUNTS = range(1, 21)


def gaps(page: Page) -> set[int]:
    """Distances between neighbours that face each other, to the right and below."""
    found = set()
    boxes = [*page.panels, *([page.title] if page.title else [])]
    for first, second in itertools.permutations(boxes, 2):
        beside = min(first.bottom, second.bottom) > max(first.top, second.top)
        below = min(first.right, second.right) > max(first.left, second.left)
        between = [box for box in boxes if box not in (first, second)]
        if beside and second.left >= first.right:
            gap = Rectangle(first.right, max(first.top, second.top), second.left - first.right, 1)
        elif below and second.top >= first.bottom:
            gap = Rectangle(max(first.left, second.left), first.bottom, 1, second.top - first.bottom)
        else:
            continue
        if not any(gap.overlaps(box) for box in between):
            found.add(max(gap.width, gap.height))
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("aspect", [1.0, 16 / 9, 9 / 16])
@pytest.mark.parametrize("title_height", [0, 140])
def test_panels_fill_pages(style, aspect, title_height):
    for count in COUNTS:
        pages = layout(count, style, 1400, aspect, title_height, seed=count)
        assert sum(len(page.panels) for page in pages) == count and all(page.panels for page in pages)
        assert [page.title is not None for page in pages] == [bool(title_height)] + [False] * (len(pages) - 1)
        spacing = Spacing.of(1400)
        for page in pages:
            boxes = [*page.panels, *([page.title] if page.title else [])]
            inside = Rectangle(0, 0, page.width, page.height).inset(spacing.margin)
            assert page.width == 1400 and all(inside.contains(box) for box in boxes)
            assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))
            assert gaps(page) <= {spacing.gutter}
            assert max(box.right for box in page.panels) == inside.right
            assert max(box.bottom for box in page.panels) == inside.bottom
            for box in page.panels:
                ratio = box.width / box.height / aspect
                assert min(ratio, 1 / ratio) >= 0.8, (count, box)


@pytest.mark.parametrize("style", STYLES)
def test_panels_are_in_reading_order(style):
    for count in COUNTS:
        for page in layout(count, style, seed=count):
            for first, second in itertools.pairwise(page.panels):
                assert second.top >= first.bottom or second.left >= first.right


@pytest.mark.parametrize("style", STYLES)
def test_nothing_is_left_over(style):
    """Panels and gutters tile the page, so a panel alone in its row is as wide as the page; and no page of a longer
    story holds a single panel, except where pages of four leave one."""
    gutter = Spacing.of(1400).gutter
    for count in COUNTS:
        pages = layout(count, style, seed=count)
        for page in pages:
            tiles = sum((box.width + gutter) * (box.height + gutter) for box in page.panels)
            left, right = min(box.left for box in page.panels), max(box.right for box in page.panels)
            top, bottom = min(box.top for box in page.panels), max(box.bottom for box in page.panels)
            assert tiles == (right - left + gutter) * (bottom - top + gutter)
        if style != "four":
            assert count == 1 or all(len(page.panels) > 1 for page in pages)
        if style in MOST_PANELS:
            assert len(pages) == -(-count // MOST_PANELS[style])


def test_grid_pages_have_one_height_and_different_rows():
    for count in (6, 7, 8, 9, 10, 14, 18, 20):
        pages = layout(count, "grid", 1400)
        assert len({page.height for page in pages}) == 1
        assert all(len({(box.width, box.height) for box in page.panels}) > 1 for page in pages)
        rows = [tuple((box.left, box.top) for box in page.panels) for page in pages]
        assert all(first != second for first, second in itertools.pairwise(rows))


def test_classic_is_mixed_by_the_seed_alone():
    plans = [layout(20, "classic", seed=seed) for seed in range(8)]
    assert layout(20, "classic", seed=3) == plans[3] and len(set(plans)) > 4
    assert len({box.width for box in plans[0][0].panels}) > 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "at least one panel"),
        ({"count": 3, "style": "gird"}, "choose one of grid, four, classic, strip"),
        ({"count": 3, "width": 100}, "400 to 8000"),
        ({"count": 3, "aspect": 9.0}, "0.4 to 2.5"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        layout(**arguments)
