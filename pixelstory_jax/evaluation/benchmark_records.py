"""Asks the questions of a benchmark and writes down what came out: one record for each picture and form.

A record is JSON without floats: counts of pixels, words and run lengths. All scores are functions of the records
(`benchmark_scores.py`), so records that were made by different processes, or before and after an interruption, give the
same numbers. Masks are compared at the size of the picture.

{"form", "index", "picture", "id", "size": [H, W], "questions": [...]}, or "skipped": why, in place of the questions.
Questions of the paper form (and of gRefCOCO's released form) hold
  question, expected, answer, said   words; `said` is the phrase of each predicted mask
  groups, targets                    headings, and how many regions are asked for
  masks                              predicted masks as COCO run lengths
  pairs                              [prediction or null, true mask or null, intersection, union, |prediction|, |true|]
and those of the other released forms only words, beside the rows and the weight of `released.ImageRows`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pixelstory_jax.data.annotations import Annotation, AnnotationError
from pixelstory_jax.data.conversations import Turn
from pixelstory_jax.data.images import ImageError
from pixelstory_jax.data.masks import encode_rle, mask_box
from pixelstory_jax.data.readers.reader import Reader, open_picture
from pixelstory_jax.evaluation import released
from pixelstory_jax.evaluation.benchmarks import Asked, Benchmark
from pixelstory_jax.evaluation.matching import match_masks
from pixelstory_jax.inference.answers import RawAnswer, phrases, readable
from pixelstory_jax.inference.segmenter import TokensOf, target_tokens

Record = dict[str, Any]


class Answerer(Protocol):
    """What is asked; `inference.segmenter.Segmenter` is one."""

    def fits(self, conversation: Sequence[Turn]) -> bool: ...

    def ask_raw(
        self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]], tokens_of: TokensOf = ...
    ) -> list[RawAnswer]: ...

    def point_raw(self, images: Sequence[np.ndarray], conversations: Sequence[Sequence[Turn]]) -> list[RawAnswer]: ...


@dataclass(frozen=True)
class _Picture:
    """An annotated picture with its questions."""

    index: int
    image: np.ndarray
    annotation: Annotation
    asked: tuple[Asked, ...]


def make_records(
    benchmark: Benchmark,
    form: str,
    reader: Reader,
    indices: Sequence[int],
    answerer: Answerer,
    batch_size: int,
    seed: int = 0,
) -> list[Record]:
    """The records of some pictures, in order; a function of its arguments and of nothing that was asked before.

    Args:
      batch_size: questions in one batch.
      seed: of the wordings and sample points that MUSE's released form draws; each picture has draws of its own.
    """
    opened = [_open(benchmark, form, reader, index, seed) for index in indices]
    pictures = [picture for picture in opened if isinstance(picture, _Picture)]
    flat = [(picture.image, asked) for picture in pictures for asked in picture.asked]
    answers = iter(_answers(benchmark, form, answerer, flat, batch_size))
    records = []
    for picture in opened:
        if not isinstance(picture, _Picture):
            records.append(picture)
            continue
        own = list(itertools.islice(answers, len(picture.asked)))
        if form == "released" and benchmark.released_writes == "rows":
            records.append(_released_record(benchmark, picture, own, seed))
        else:
            records.append(_paired_record(benchmark, form, picture, own))
    return records


def _open(benchmark: Benchmark, form: str, reader: Reader, index: int, seed: int) -> _Picture | Record:
    name = f"picture {index}"
    try:
        annotation = reader[index]
        name = annotation.provenance.picture
        image = open_picture(reader, index, name)
        annotation.check_size(image)
        asked = tuple(benchmark.ask[form](annotation, np.random.default_rng((seed, index))))
        for number in {region for question in asked for mask in question.masks for region in mask}:
            annotation.mask(number)  # a damaged one shows here, before anything is asked
        return _Picture(index, image, annotation, asked)
    except (AnnotationError, ImageError) as error:
        return {"form": form, "index": index, "picture": name, "skipped": str(error)}


def _answers(
    benchmark: Benchmark, form: str, answerer: Answerer, flat: Sequence[tuple[np.ndarray, Asked]], batch_size: int
) -> Iterator[RawAnswer]:
    """Answers in order; a question that is too long for the model has one without words and masks."""
    forced = form == "released" and benchmark.forced
    tokens_of = released.target_tokens if form == "released" else target_tokens
    for batch in (flat[start : start + batch_size] for start in range(0, len(flat), batch_size)):
        conversations = [[*asked.history, Turn(asked.text, asked.answer if forced else None)] for _, asked in batch]
        fitting = [k for k, conversation in enumerate(conversations) if answerer.fits(conversation)]
        images, fitted = [batch[k][0] for k in fitting], [conversations[k] for k in fitting]
        raw = answerer.point_raw(images, fitted) if forced else answerer.ask_raw(images, fitted, tokens_of)
        by_place = dict(zip(fitting, raw, strict=True))
        for k in range(len(batch)):
            yield by_place.get(k) or RawAnswer((), np.zeros((0, 1, 1), np.float32), 1)


def _head(form: str, picture: _Picture) -> Record:
    provenance = picture.annotation.provenance
    size = list(picture.annotation.size)
    return {"form": form, "index": picture.index, "picture": provenance.picture, "id": provenance.id, "size": size}


def _paired_record(benchmark: Benchmark, form: str, picture: _Picture, answers: Sequence[RawAnswer]) -> Record:
    record = _head(form, picture)
    annotation = picture.annotation
    record["questions"] = [
        _question(benchmark, annotation, asked, raw) for asked, raw in zip(picture.asked, answers, strict=True)
    ]
    if benchmark.pairing == "matched":  # what a judge of the words has to know
        record["instances"] = _instances(annotation)
        for asked, question in zip(picture.asked, record["questions"], strict=True):
            regions = [region for mask in asked.masks for region in mask]
            names = ([annotation.regions[k].rephrased, annotation.regions[k].name] for k in regions)
            question["called"] = [[name for name in pair if name] for pair in names]
            question["boxes"] = [_corners(annotation.mask(k)) for k in regions]
    return record


def _instances(annotation: Annotation) -> list[list[Any]]:
    """[name, box] of all regions but those, not asked for, whose mask is damaged."""
    instances = []
    for number, region in enumerate(annotation.regions):
        with contextlib.suppress(AnnotationError):
            instances.append([region.rephrased or region.name, _corners(annotation.mask(number))])
    return instances


def _question(benchmark: Benchmark, annotation: Annotation, asked: Asked, raw: RawAnswer) -> Record:
    """One question with its answer; see the module."""
    words = {
        "question": asked.text,
        "expected": readable(asked.answer),
        "answer": readable(raw.pieces),
        "groups": list(asked.groups),
    }
    if benchmark.pairing == "words":
        return words
    predicted = raw.picture_logits(annotation.size) > 0
    true = np.array([_united(annotation, mask) for mask in asked.masks], bool).reshape(-1, *annotation.size)
    return {
        **words,
        "words": asked.words,
        "pieces": list(raw.pieces),
        "said": phrases(raw.pieces),
        "targets": asked.targets,
        "masks": [encode_rle(mask)["counts"] for mask in predicted],
        "pairs": pair_masks(benchmark.pairing, predicted, true, annotation.ignored_mask()),
    }


def pair_masks(pairing: str, predicted: np.ndarray, true: np.ndarray, ignored: np.ndarray | None) -> list[list[Any]]:
    """The pairs of a question, see the module. Ignored pixels count where they belong to the true mask only.

    Args:
      pairing: of the `Benchmark`.
      predicted, true: bool [P, H, W] and [T, H, W]. ignored: bool [H, W] or None.
    """
    size = (predicted if len(predicted) else true).shape[1:] if len(predicted) + len(true) else (1, 1)
    if pairing == "united":
        predicted, true = np.any(predicted, axis=0, keepdims=True), np.any(true, axis=0, keepdims=True)
    if pairing == "matched":
        seen = predicted if ignored is None else predicted & ~(ignored & ~true.any(axis=0))
        chosen, matched, _ = match_masks(seen, true)
        places = list(zip(chosen.tolist(), matched.tolist(), strict=True))
        places += [(p, None) for p in range(len(predicted)) if p not in chosen]
        places += [(None, t) for t in range(len(true)) if t not in matched]
    else:
        longest = range(max(len(predicted), len(true)))
        places = [(k if k < len(predicted) else None, k if k < len(true) else None) for k in longest]
    pairs: list[list[Any]] = []
    for p, t in places or [(None, None)]:
        prediction = np.zeros(size, bool) if p is None else predicted[p]
        target = np.zeros(size, bool) if t is None else true[t]
        if ignored is not None:
            prediction = prediction & ~(ignored & ~target)
        counts = (prediction & target, prediction | target, prediction, target)
        pairs.append([p, t, *(int(np.count_nonzero(mask)) for mask in counts)])
    return pairs


def _released_record(benchmark: Benchmark, picture: _Picture, answers: Sequence[RawAnswer], seed: int) -> Record:
    annotation, asked = picture.annotation, picture.asked
    ignored = annotation.ignored_mask()
    targets = [_summed(annotation, mask, ignored) for question in asked for mask in question.masks]
    true = np.array(targets, np.uint8).reshape(-1, *annotation.size)
    logits = [raw.picture_logits(annotation.size) for raw in answers]
    if benchmark.forced:
        for number, question in enumerate(asked):
            if len(logits[number]) != len(question.masks):  # it was too long for the model
                logits[number] = np.zeros((len(question.masks), *annotation.size), np.float32)
        score = released.validate_image(_stacked(logits, annotation.size), true)
    else:
        points = [released.random_points((seed, picture.index, number)) for number in range(len(asked))]
        counts = [len(one) for one in logits], [len(question.masks) for question in asked]
        score = released.ar_validate_image(_stacked(logits, annotation.size), true, *counts, np.array(points))
    questions = [
        {"question": question.text, "answer": readable(raw.pieces)}
        for question, raw in zip(asked, answers, strict=True)
    ]
    return {
        **_head("released", picture),
        "questions": questions,
        "groups": [group for group in asked[0].groups if all(group in question.groups for question in asked)],
        "rows": score.rows.astype(int).tolist(),
        "weight": score.weight,
    }


def _stacked(logits: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.zeros((0, *size), np.float32), *logits])


def _united(annotation: Annotation, regions: Sequence[int]) -> np.ndarray:
    return np.any([np.zeros(annotation.size, bool), *(annotation.mask(number) for number in regions)], axis=0)


def _summed(annotation: Annotation, regions: Sequence[int], ignored: np.ndarray | None) -> np.ndarray:
    """The true mask as the reference has it: the sum of its polygons, 255 where a pixel is ignored."""
    mask = np.zeros(annotation.size, np.uint8)
    for number in regions:
        mask += released.summed_mask(annotation, number)
    if ignored is not None:
        mask[(mask == 0) & ignored] = released.IGNORED
    return mask


def _corners(mask: np.ndarray) -> list[int]:
    left, top, width, height = mask_box(mask)
    return [left, top, left + width, top + height]
