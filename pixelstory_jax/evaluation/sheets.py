"""Pages of scored answers: what was asked, said and expected, with true and predicted masks side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pixelstory_jax.evaluation.matching import match_masks
from pixelstory_jax.evaluation.protocol import ScoredAnswer
from pixelstory_jax.inference.answers import phrase_spans, readable
from pixelstory_jax.inference.overlay import (
    INK,
    MARGIN,
    PALE_INK,
    PAPER,
    draw_lines,
    font_of,
    overlay_masks,
    page_of,
    scaled,
    wrap,
)

GOOD, BAD = (0, 120, 80), (190, 50, 20)


def answer_sheet(scored: Sequence[ScoredAnswer], title: str = "", columns: int = 2, side: int = 256) -> np.ndarray:
    """A page of scored answers: picture, true masks and predicted masks, question, generated and expected answer, IoU.

    Predicted masks have the colours of the targets that they are matched to, and phrases those of their masks.
    """
    width = 3 * side + 4 * MARGIN
    return page_of([_draw_scored(item, side, width) for item in scored], columns, title)


def _draw_scored(item: ScoredAnswer, side: int, width: int) -> Image.Image:
    true_masks = item.true_masks
    predicted = [target.mask for target in item.answer.targets]
    stacked = np.array(predicted).reshape(-1, *item.example.image.shape[:2])
    chosen, matched, ious = match_masks(stacked, true_masks)
    numbers = _colour_numbers(len(predicted), len(true_masks), chosen, matched)
    panels = []
    picture, shown = scaled(item.example.image, [*true_masks, *predicted], least=side, most=side)
    panels.append(picture)
    panels.append(overlay_masks(picture, shown[: len(true_masks)]))
    panels.append(overlay_masks(picture, shown[len(true_masks) :], numbers))
    text_width = width - 2 * MARGIN
    said = [(text, None if k is None else numbers[k]) for text, k in phrase_spans(item.answer.pieces)]
    before = "".join(f"{turn.question}  {readable(turn.answer or ())}  " for turn in item.history)
    earlier = wrap([(f"before: {before}", None)], font_of(14), text_width) if before else []
    question = wrap([(item.question.text, None)], font_of(18), text_width)
    answer = wrap(said or [("(no words)", None)], font_of(18), text_width)
    expected = wrap([("expected: " + readable(item.question.answer), None)], font_of(14), text_width)
    step = 28
    picture_height = picture.shape[0]
    text_height = step * (len(question) + len(answer)) + 20 * (len(earlier) + len(expected))
    cell = Image.new("RGB", (width, 40 + picture_height + 20 + text_height + 30), PAPER)
    draw = ImageDraw.Draw(cell)
    top = draw_lines(draw, (MARGIN, 10), earlier, font_of(14), 20, PALE_INK)
    top = draw_lines(draw, (MARGIN, top), question, font_of(18), step, INK) + 6
    for number, (panel, name) in enumerate(zip(panels, ("picture", "true masks", "predicted masks"), strict=True)):
        left = MARGIN + number * (side + MARGIN)
        cell.paste(Image.fromarray(panel), (left, top))
        draw.text((left, top + picture_height + 3), name, PALE_INK, font_of(13))
    top += picture_height + 26
    top = draw_lines(draw, (MARGIN, top), answer, font_of(18), step, INK)
    top = draw_lines(draw, (MARGIN, top), expected, font_of(14), 20, PALE_INK) + 2
    small = f"{item.example.split.replace('_', ' ')}  |  {item.question.kind.replace('_', ' ')}  |  "
    draw.text((MARGIN, top), small, PALE_INK, font_of(14))
    verdict, good = _verdict(item, ious)
    draw.text((MARGIN + font_of(14).getlength(small), top), verdict, GOOD if good else BAD, font_of(14))
    return cell


def _verdict(item: ScoredAnswer, ious: np.ndarray) -> tuple[str, bool]:
    if item.score.rejected is not None:
        return ("rightly rejected", True) if item.score.rejected else ("not rejected", False)
    listed = ", ".join(f"{iou:.2f}" for iou in item.score.ious)
    names = "" if item.score.named is None else "  |  right names" if item.score.named else "  |  other names"
    return f"IoU {listed}{names}", item.score.giou >= 0.5 and item.score.named is not False


def _colour_numbers(predictions: int, targets: int, chosen: np.ndarray, matched: np.ndarray) -> list[int]:
    """The colour number of each prediction: that of its target; those left over get numbers after the targets'."""
    numbers = dict(zip(chosen.tolist(), matched.tolist(), strict=True))
    left_over = iter(range(targets, targets + predictions))
    return [numbers[i] if i in numbers else next(left_over) for i in range(predictions)]
