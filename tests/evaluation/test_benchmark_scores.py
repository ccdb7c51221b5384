"""Records and scores against a second implementation: pycocotools for IoU, SciPy for matching, loops for the rest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

from pixelstory_jax.data.annotations import Annotation, AnnotationError, Provenance, Region, Request
from pixelstory_jax.data.conversations import Turn
from pixelstory_jax.data.masks import decode_rle
from pixelstory_jax.data.tokenizers import small_tokenizer
from pixelstory_jax.evaluation import released
from pixelstory_jax.evaluation.answer_judge import agreement
from pixelstory_jax.evaluation.benchmark_records import make_records, pair_masks
from pixelstory_jax.evaluation.benchmark_scores import normalise, score_records, word_scores
from pixelstory_jax.evaluation.benchmarks import BENCHMARKS
from tests.evaluation.toy_benchmark import SIDE, ToyAnswerer, ToyReader, annotation, guessing, random_masks, raw

TASKS = {"reason_seg": "reasoning", "muse": "questions", "multi_refcoco": "several"}
MANY = {"muse": 5, "grefcoco": 3}


def made(name, form, count=12, ignored=False, batch=5, answerer=None, seed=3):
    rng = np.random.default_rng(seed)
    reader = ToyReader(
        annotation(rng, TASKS.get(name, "names"), targets=MANY.get(name, 1), ignored=ignored) for _ in range(count)
    )
    return reader, make_records(BENCHMARKS[name], form, reader, range(count), answerer or guessing(), batch, seed=7)


def coco_iou(first, second) -> float:
    """Of bool [H, W], by pycocotools; two empty masks are 1."""
    if not first.any() and not second.any():
        return 1.0
    runs = [coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in (first, second)]
    return float(coco.iou([runs[0]], [runs[1]], [0])[0, 0])


def truth(reader, record, asked):
    own = reader[record["index"]]
    masks = [np.any([np.zeros(own.size, bool), *(own.mask(k) for k in mask)], axis=0) for mask in asked.masks]
    return masks, own.ignored_mask()


def predictions(record, question):
    return [decode_rle({"size": record["size"], "counts": counts}) for counts in question["masks"]]


def pairs_again(pairing, predicted, true):
    """(prediction, true mask) of every pair, empty masks for those that are missing."""
    empty = np.zeros((SIDE, SIDE), bool)
    if pairing == "united":
        return [(np.any([empty, *predicted], axis=0), np.any([empty, *true], axis=0))]
    if pairing == "ordered":
        return list(itertools.zip_longest(predicted, true, fillvalue=empty))
    cost = np.array([[-coco_iou(p, t) for t in true] for p in predicted]).reshape(len(predicted), len(true))
    rows, columns = linear_sum_assignment(cost)
    pairs = [(predicted[p], true[t]) for p, t in zip(rows, columns, strict=True)]
    pairs += [(mask, empty) for k, mask in enumerate(predicted) if k not in rows]
    pairs += [(empty, mask) for k, mask in enumerate(true) if k not in columns]
    return pairs or [(empty, empty)]


@pytest.mark.parametrize("name", ["refcoco", "grefcoco", "reason_seg", "multi_refcoco", "muse"])
def test_the_paper_form_counts_as_a_second_implementation_does(name):
    reader, records = made(name, "paper")
    scores = score_records(name, "val", records).scores["paper"]
    benchmark = BENCHMARKS[name]
    ious, over, under, hits, no_target, with_target = [], 0, 0, [], [], []
    by_group = {}
    for record in records:
        for asked, question in zip(
            benchmark.ask["paper"](reader[record["index"]], np.random.default_rng()), record["questions"], strict=True
        ):
            true, _ = truth(reader, record, asked)
            pairs = pairs_again(benchmark.pairing, predictions(record, question), true)
            here = [coco_iou(*pair) for pair in pairs]
            ious += here
            over += sum((p & t).sum() for p, t in pairs)
            under += sum((p | t).sum() for p, t in pairs)
            points = any(p.any() for p, _ in pairs)
            (with_target if asked.targets else no_target).append(points)
            hits += here if asked.targets else []
            for group in asked.groups:
                by_group.setdefault(group, []).extend(here)
    assert scores["all"]["giou"] == pytest.approx(np.mean(ious), rel=1e-12)
    assert scores["all"]["ciou"] == pytest.approx(over / under, rel=1e-12)
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert scores["all"][f"pr@{threshold}"] == pytest.approx(np.mean(np.array(hits) >= threshold))
    if name == "grefcoco":
        assert scores["all"]["n_acc"] == pytest.approx(1 - np.mean(no_target)) and len(no_target) > 5
        assert scores["all"]["t_acc"] == pytest.approx(np.mean(with_target))
    assert set(scores) == {"all", *by_group}
    for group, values in by_group.items():
        assert scores[group]["giou"] == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("pairing", ["united", "ordered", "matched"])
def test_ignored_pixels_count_where_they_are_part_of_the_true_mask_only(pairing):
    rng = np.random.default_rng(1)
    for _ in range(50):
        predicted, true = random_masks(rng, int(rng.integers(0, 4))), random_masks(rng, int(rng.integers(0, 4)))
        ignored = random_masks(rng, 1)[0]
        pairs = pair_masks(pairing, predicted, true, ignored)
        empty = np.zeros((SIDE, SIDE), bool)
        for p, t, *counts in pairs:
            united = pairing == "united"
            target = true.any(0) if united else empty if t is None else true[t]
            prediction = predicted.any(0) if united else empty if p is None else predicted[p]
            counted = [place for place in np.ndindex(SIDE, SIDE) if target[place] or not ignored[place]]
            expected = [
                sum(bool(rule(prediction[at], target[at])) for at in counted)
                for rule in (lambda a, b: a and b, lambda a, b: a or b, lambda a, b: a, lambda a, b: b)
            ]
            assert counts == expected
        numbers = [p for p, *_ in pairs if p is not None], [t for _, t, *_ in pairs if t is not None]
        if pairing != "united":
            assert sorted(numbers[0]) == list(range(len(predicted))) and sorted(numbers[1]) == list(range(len(true)))


def reference_row(output, target):
    """intersectionAndUnionGPU of the reference with torch.histc written as loops, foreground only."""
    kept = [(float(o), int(t)) for o, t in zip(output.ravel(), target.ravel(), strict=True) if t != 255]
    inter = sum(o == t and 0.5 <= o <= 1 for o, t in kept)
    area_output, area_target = (sum(0.5 <= value <= 1 for value in column) for column in zip(*kept, strict=True))
    return inter, area_output + area_target - inter


@pytest.mark.parametrize("name", ["refcoco", "multi_refcoco", "reason_seg"])
def test_the_released_form_gives_the_true_answers_and_counts_as_the_script_does(name):
    answerer = guessing()
    reader, records = made(name, "released", ignored=True, answerer=answerer)
    assert answerer.forced and not answerer.calls
    again = guessing()
    total, weights, over, under = 0.0, 0, 0, 0
    for record in records:
        own = reader[record["index"]]
        rows = []
        for asked in BENCHMARKS[name].ask["released"](own, np.random.default_rng()):
            answer = again.answer(record["index"], [Turn(asked.text, asked.answer)])
            true, ignored = truth(reader, record, asked)
            rows += [
                reference_row(logits > 0, np.where(ignored & ~mask, 255, mask.astype(int)))
                for logits, mask in zip(answer.logits, true, strict=True)
            ]
        mean = sum(i / (u + 1e-5) if u else 1.0 for i, u in rows) / len(rows)
        total, weights = total + mean * len(rows), weights + len(rows)
        over, under = over + sum(i for i, _ in rows), under + sum(u for _, u in rows)
    scores = score_records(name, "val", records).scores["released"]["all"]
    assert scores["giou"] == pytest.approx(total / weights, rel=1e-5)
    assert scores["ciou"] == pytest.approx(over / under, rel=1e-6)
    if name == "reason_seg":
        assert scores["questions"] == len(records)  # the first sentence of each picture
    else:
        assert weights == 8 * len(records)


def test_the_released_form_of_muse_is_ar_validate_with_points_and_wordings_of_each_picture():
    reader, records = made("muse", "released")
    again = guessing()
    scores = []
    for record in records:
        own = reader[record["index"]]
        asked = list(BENCHMARKS["muse"].ask["released"](own, np.random.default_rng((7, record["index"]))))
        assert [question["question"] for question in record["questions"]] == [one.text for one in asked]
        answers = [again.answer(record["index"], [Turn(one.text)]) for one in asked]
        points = np.array([released.random_points((7, record["index"], k)) for k in range(len(asked))])
        score = released.ar_validate_image(
            np.concatenate([answer.logits for answer in answers]),
            np.array([own.mask(k) for one in asked for mask in one.masks for k in mask], np.uint8).reshape(
                -1, SIDE, SIDE
            ),
            [len(answer.logits) for answer in answers],
            [len(one.masks) for one in asked],
            points,
        )
        scores.append(score)
        np.testing.assert_array_equal(record["rows"], score.rows)
    giou, ciou = released.summarise([score for score in scores if score.weight])
    found = score_records("muse", "val", records).scores["released"]["all"]
    assert (found["giou"], found["ciou"]) == (giou, ciou)
    wordings = {question["question"].split("? ")[1] for record in records for question in record["questions"]}
    assert len(wordings) > 4


def test_points_may_differ_by_question():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(5, 9, 9)).astype(np.float32), rng.random((4, 9, 9)) < 0.5
    points = np.array([released.random_points(k, 40) for k in range(2)])
    both = released.ar_validate_image(logits, targets, (3, 2), (2, 2), points)
    alone = [
        released.ar_validate_image(logits[a], targets[b], (a.stop - a.start,), (2,), own)
        for a, b, own in ((slice(0, 3), slice(0, 2), points[0]), (slice(3, 5), slice(2, 4), points[1]))
    ]
    np.testing.assert_array_equal(both.rows, np.concatenate([one.rows for one in alone]))


def test_the_released_form_adds_polygons_up():
    square = [2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]
    shifted = [value + 3 for value in square]
    rng = np.random.default_rng(0)
    one = annotation(rng, "names", regions=1, requests=1)
    twice = type(one)(one.size, one.task, (Region([square, shifted], "thing"),), one.requests, one.provenance)
    summed = released.summed_mask(twice, 0)
    assert summed.max() == 2 and (summed > 0).tolist() == twice.mask(0).tolist()
    assert (summed == 2).sum() == 9
    record = make_records(BENCHMARKS["refcoco"], "released", ToyReader([twice]), [0], guessing(), 4)[0]
    # What holds 2 is neither background nor object, as in the reference's histogram.
    assert record["rows"][0][0][1] + record["rows"][0][1][1] <= 2 * (SIDE**2 - 9)


def test_target_tokens_of_the_released_code():
    tokenizer = small_tokenizer(6)
    a, b, c, d, e, f = tokenizer.codebook_ids
    word = tokenizer.encode("cat")[0]
    assert released.target_tokens([word, b, a, c, word, d, e, f, tokenizer.eos_id, a], tokenizer).tolist() == [
        [1, 2, 3, 5, 6, 7]
    ]
    assert released.target_tokens([a, b, c, d, e, f, a], tokenizer).shape == (0, 6)


def test_generalised_scores_as_relas_script_counts_them():
    rng = np.random.default_rng(0)
    counters = dict.fromkeys(("TP", "TN", "FP", "FN"), 0)
    samples, total_iou, over, under, hits, targeted = [], 0.0, 0, 0, 0, 0
    for _ in range(300):
        union = int(rng.integers(1, 50))
        sample = (int(rng.integers(0, union + 1)), union, bool(rng.random() < 0.6), bool(rng.random() < 0.7))
        samples.append(sample)
        overlap, union, has_target, gives = sample
        if not has_target and not gives:
            counters["TP"] += 1
            total_iou += 1
        elif not has_target:
            counters["FN"] += 1
            under += union
        else:
            counters["TN" if gives else "FP"] += 1
            overlap = overlap if gives else 0
            total_iou, over, under, targeted = total_iou + overlap / union, over + overlap, under + union, targeted + 1
            hits += overlap / union >= 0.7
    scores = released.summarise_generalised(samples)
    assert scores["giou"] == pytest.approx(total_iou / 300) and scores["ciou"] == over / under
    assert scores["n_acc"] == counters["TP"] / (counters["TP"] + counters["FN"])
    assert scores["t_acc"] == counters["TN"] / (counters["TN"] + counters["FP"])
    assert scores["pr@0.7"] == hits / targeted


def test_right_words_keep_their_pair_and_wrong_ones_lose_it():
    """Two true things; of three masks one is matched and rightly named, one matched and misnamed, one is left over."""
    rng = np.random.default_rng(0)
    own = annotation(rng, "questions", regions=2, requests=0)
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, :4], masks[1, 8:12] = True, True
    regions = (Region(masks[0], "cup", "the cup on the table"), Region(masks[1], "dog", "a sleeping dog"))
    own = type(own)(own.size, "questions", regions, (Request(("What?",), (0, 1), True),), own.provenance)
    extra = np.zeros((1, SIDE, SIDE), bool)
    extra[0, 14:] = True
    said = raw(("The cat ", 0, ", the big cup ", 1, " and a rug ", 2, "."), np.concatenate([masks[::-1], extra]))
    records = make_records(BENCHMARKS["muse"], "paper", ToyReader([own]), [0], ToyAnswerer(lambda *_: said), 1)
    scores = score_records("muse", "val", records).scores["paper"]["all"]
    pixels = 4 * SIDE
    assert scores["giou"] == pytest.approx(2 / 3) and scores["ciou"] == 2 * pixels / (2 * pixels + 2 * SIDE)
    assert scores["giou_names"] == pytest.approx(1 / 3)
    assert scores["ciou_names"] == pixels / (pixels + 2 * pixels + 2 * SIDE)
    assert scores["words_names"] == 0.5 and "giou_judged" not in scores
    judged = score_records("muse", "val", records, judged={(0, 0): [True, True, False]}).scores["paper"]["all"]
    assert judged["giou_judged"] == judged["giou"] and judged["words_judged"] == 1.0
    question = records[0]["questions"][0]
    assert question["called"] == [["the cup on the table", "cup"], ["a sleeping dog", "dog"]]
    assert question["boxes"] == [[0, 0, 16, 4], [0, 8, 16, 12]] and question["groups"] == ["few targets", "2 targets"]


@pytest.mark.parametrize(
    ("phrase", "names", "right"),
    [
        ("the red cars on the left", ["a car that is red", "car"], True),
        ("a sofa with flowers", ["the couch with flowers", "couch"], True),
        ("dog", ["a cat on a mat", "cat"], False),
        ("", ["a cat", "cat"], False),
        ("traffic sign", ["a traffic light by the road", "traffic light"], False),
    ],
)
def test_agreement_of_names(phrase, names, right):
    assert (agreement(phrase, names) > 0.5) is right


def test_answers_in_words():
    said = [("Two dogs.", "Two dogs."), ("the dog", "A dog!"), ("a cat and a dog", "one dog"), ("", "yes")]
    scores = word_scores([{"answer": a, "expected": b} for a, b in said])
    assert scores["exact"] == 0.25 and scores["normalised"] == 0.5
    assert scores["token_f1"] == pytest.approx((1 + 1 + 2 / 5 + 0) / 4)
    assert normalise("The  Dog's, (big)") == "dog s big"


def test_vqa_asks_each_turn_after_the_true_ones():
    turns = tuple(Request((f"{k}?",), answer=(f"It is {k}.",)) for k in range(3))
    own = Annotation((SIDE, SIDE), "dialogue", (), turns, Provenance("toy", "train", "a.jpg"))
    asked = []

    def answer(number, conversation):
        asked.append([(turn.question, turn.answer) for turn in conversation])
        return raw((f"it is {len(conversation)}",), np.zeros((0, SIDE, SIDE), bool))

    records = make_records(BENCHMARKS["vqa"], "paper", ToyReader([own]), [0], ToyAnswerer(answer), 2)
    assert asked[2] == [("0?", ("It is 0.",)), ("1?", ("It is 1.",)), ("2?", None)]
    assert score_records("vqa", "train", records).scores["paper"]["all"]["questions"] == 3


def test_unusable_pictures_and_questions_that_are_too_long():
    rng = np.random.default_rng(0)
    reader = ToyReader([annotation(rng, "names"), AnnotationError("mask 7 is damaged"), annotation(rng, "names")])
    first = reader.annotations[0]
    long = (Request(("too long",), (0,)), *first.requests)
    reader.annotations[0] = type(first)(first.size, first.task, first.regions, long, first.provenance)
    for form in ("paper", "released"):
        records = make_records(BENCHMARKS["refcoco"], form, reader, range(3), guessing(), 4)
        assert [record.get("skipped") for record in records] == [None, "mask 7 is damaged", None]
        report = score_records("refcoco", "val", records)
        assert report.skipped == 1 and "1 pictures could not be used" in report.table
        assert report.scores[form]["all"]["questions"] == 9 + 8
    assert records[0]["rows"][0][0][1] == 0  # nothing is found


def test_only_masks_that_are_asked_for_have_to_be_whole():
    good, bad = Region(np.ones((SIDE, SIDE), bool), "rug"), Region([[1.0, 2.0]], "fly", id="7")
    for target, skipped in ((0, False), (1, True)):
        request = Request(("What?",), (target,), True)
        own = Annotation((SIDE, SIDE), "questions", (good, bad), (request,), Provenance("toy", "val", "a.jpg"))
        (record,) = make_records(BENCHMARKS["muse"], "paper", ToyReader([own]), [0], guessing(), 1)
        assert ("mask 7 cannot be decoded" in record.get("skipped", "")) is skipped
        assert skipped or record["instances"] == [["rug", [0, 0, SIDE, SIDE]]]


def test_the_table_says_which_form_it_is():
    _, paper = made("refcoco", "paper", 2)
    _, forced = made("refcoco", "released", 2)
    report = score_records("refcoco", "testA", [*forced, *paper])
    assert "refcoco testA, form paper: generated answers" in report.table
    assert "form released: as the published scripts" in report.table and "true answers are given" in report.table
    assert report.metrics["paper/all/giou"] == report.scores["paper"]["all"]["giou"]


def test_pairs_of_the_paper_form_are_those_of_the_reference_run():
    """With 255 in the targets of `validate`, and the leftovers of `ar_validate` thresholded."""
    path = Path(__file__).parents[1] / "golden" / "match_eval.npz"
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))
    for number in range(meta["validate_images"]):
        logits, targets = golden[f"in/validate/pred_logits_{number}"], golden[f"in/validate/gt_masks_{number}"]
        pairs = [
            pair_masks("ordered", one[None] > 0, target[None] == 1, target == released.IGNORED)[0]
            for one, target in zip(logits, targets, strict=True)
        ]
        assert sum(pair[2] for pair in pairs) == golden[f"out/validate/intersection_{number}"][1]
        assert sum(pair[3] for pair in pairs) == golden[f"out/validate/union_{number}"][1]
    every, weight = [], 0
    for number in range(meta["ar_images"]):
        logits, targets = golden[f"in/ar/pred_logits_{number}"], golden[f"in/ar/gt_masks_{number}"]
        counts = [np.cumsum(golden[f"in/ar/{name}_counts_{number}"]) for name in ("pred", "gt")]
        parts = (np.split(masks, ends[:-1]) for masks, ends in zip((logits > 0, targets > 0), counts, strict=True))
        pairs = [pair for both in zip(*parts, strict=True) for pair in pair_masks("matched", *both, None)]
        rows = golden[f"out/ar_binarised/row_intersection_union_{number}"][:, :, 1]
        assert sorted(pair[2:4] for pair in pairs) == sorted(rows.astype(int).tolist())
        every, weight = every + pairs, weight + int(golden[f"out/ar_binarised/n_{number}"])
    # The script divides by the larger number of masks, though there are more pairs; ours is the mean over the pairs.
    questions = [{"pairs": every, "targets": 1, "groups": []}]
    scores = score_records("muse", "val", [{"form": "paper", "index": 0, "questions": _judgeable(questions)}]).scores
    giou = scores["paper"]["all"]["giou"]
    assert giou * len(every) / weight == pytest.approx(float(golden["out/ar_binarised/giou"]), rel=1e-4)
    assert scores["paper"]["all"]["ciou"] == pytest.approx(float(golden["out/ar_binarised/ciou"]), rel=1e-5)
    assert len(every) > weight


def _judgeable(questions):
    """Nothing is said about the masks."""
    return [question | {"said": [""] * 99, "called": [["x"]] * 99} for question in questions]
