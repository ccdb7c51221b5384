"""The benchmarks of PixelLM and LISA, and of data with names: what is asked about a picture, and what is to be masked.

Each has up to two forms. "paper": answers are generated, the arithmetic is right. "released": what the published
scripts compute, so that published numbers can be compared: `validate` and the `ValDataset` of PixelLM's `train_ds.py`
give the model the true answer and look at its masks only (teacher forcing); `ar_validate` generates the answers of
MUSE; gRefCOCO's script is ReLA's `refer_evaluation.py`. docs/evaluation.md compares them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixelstory_jax.data import templates
from pixelstory_jax.data.annotations import Annotation, Request
from pixelstory_jax.data.builtin.wording import pick
from pixelstory_jax.data.conversations import Turn
from pixelstory_jax.data.readers import READERS, open_reader, refer
from pixelstory_jax.data.readers.reader import Reader

FORMS = ("paper", "released")
PROMPT = "What is {c} in this image? Please output segmentation mask."
SENTENCE_PROMPT = "{s} Please output segmentation mask."
FEW = 3  # targets of a question of MUSE that are few; its test files say themselves which are
NAMED = (
    *("ade20k", "cocostuff", "mapillary", "paco_lvis", "pascal_part"),
    *("tfds:scene_parse150", "tfds:coco/2017_panoptic"),
)
"""Data sets without a protocol of the papers: everything that has a name is asked for."""
MUSE_TEST = {"test_few": "few targets", "test_many": "many targets"}


@dataclass(frozen=True)
class Asked:
    """One question of a benchmark.

    Attributes:
      text: the question as the model gets it; history: the turns before it, with their true answers.
      masks: for each true mask the numbers of the regions that it unites, none for an empty mask.
      answer: text, and an int for each of `masks`; what is given in teacher forcing.
      groups: headings under which it is counted, beside all.
      words: what is asked for, without the wording around it.
    """

    text: str
    masks: tuple[tuple[int, ...], ...]
    answer: tuple[str | int, ...]
    groups: tuple[str, ...] = ()
    words: str = ""
    history: tuple[Turn, ...] = ()

    @property
    def targets(self) -> int:
        """How many regions are asked for."""
        return sum(map(len, self.masks))


Ask = Callable[[Annotation, np.random.Generator], Iterator[Asked]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      reader: name of the data set; splits: what it is usually scored on, the first by default.
      ask: the questions of each form; forms that are missing do not exist.
      pairing: which predicted mask belongs to which true one in the paper form. "united": the union of the predicted
        masks is the prediction; "ordered": the k-th of the answer to the k-th that was asked for; "matched": one to one
        with the largest sum of IoU; "words": there are no masks.
      forced: whether the released form gives the true answers to the model.
    """

    reader: str
    splits: tuple[str, ...]
    ask: dict[str, Ask]
    pairing: str
    forced: bool = False

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(self.ask)

    @property
    def released_writes(self) -> str:
        """What the scores of the released form need: "rows" of pixel counts by class, or "pairs" as the paper form."""
        return "pairs" if self.pairing == "united" and not self.forced else "rows"


def expressions(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """Every referring expression in a question of its own, stripped and in lower case as the released code has it."""
    for words, request in _worded(annotation):
        yield Asked(PROMPT.format(c=words), (request.targets,), (0, "."), words=words)


def generalised_expressions(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """The same, where an expression may mean several things or nothing."""
    for asked in expressions(annotation, rng):
        count = asked.targets
        group = ("no target", "one target")[count] if count < 2 else "several targets"
        answer = asked.answer if count else (templates.absent([asked.words]),)
        yield Asked(asked.text, asked.masks, answer, (group,), asked.words)


def several_expressions(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """Six, five, four, six, ... of the picture's expressions in one question, as the reader joins them."""
    for request in annotation.requests:
        places = iter(range(len(request.targets)))
        answer = tuple(piece if isinstance(piece, str) else next(places) for piece in request.answer or ())
        masks = tuple((target,) for target in request.targets)
        words = request.words[0]
        yield Asked(PROMPT.format(c=words), masks, answer, (_count_group(len(masks)),), words)


def sentences(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """Every sentence or phrase of ReasonSeg: "long query" and "short query" of LISA's tables."""
    for request in annotation.requests:
        for words in request.words:
            prompt = SENTENCE_PROMPT.format(s=words.strip()) if request.is_sentence else PROMPT.format(c=words.strip())
            group = "long query" if request.is_sentence else "short query"
            yield Asked(prompt, (request.targets,), (0, "."), (group,), words)


def first_sentence(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """The released code asks for the first sentence of a picture only."""
    yield next(sentences(annotation, rng))


def reasoning_questions(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """MUSE's questions in one fixed wording."""
    for request in annotation.requests:
        yield _reasoning(annotation, request, SENTENCE_PROMPT)


def drawn_reasoning_questions(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """The same with the wording drawn for each, as the released code does (there without a seed)."""
    for request in annotation.requests:
        yield _reasoning(annotation, request, pick(rng, templates.LONG_QUESTIONS))


def names(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """Every name of a picture in a question of its own, answered with one mask for each thing of that name."""
    for request in annotation.requests:
        masks = tuple((target,) for target in request.targets)
        answer = tuple(piece for k in range(len(masks)) for piece in ((" and ", k) if k else (k,)))
        words = request.words[0]
        yield Asked(PROMPT.format(c=words), masks, (*answer, "."), (_count_group(len(masks)),), words)


def turns(annotation: Annotation, rng: np.random.Generator) -> Iterator[Asked]:
    """The turns of a dialogue, each after the true ones before it."""
    history: tuple[Turn, ...] = ()
    for request in annotation.requests:
        text, answer = request.words[0], request.answer or ()
        yield Asked(text, (), answer, words=text, history=history)
        history = (*history, Turn(text, answer))


def _reasoning(annotation: Annotation, request: Request, prompt: str) -> Asked:
    """The answer is that of the data set or, where it has none, the names of the targets."""
    words, count = request.words[0], len(request.targets)
    answer = request.answer
    if answer is None:
        regions = [annotation.regions[target] for target in request.targets]
        answer = tuple(
            piece for k, region in enumerate(regions) for piece in (f"{region.rephrased or region.name} ", k)
        )
    numbers = iter(range(count))
    answer = tuple(piece if isinstance(piece, str) else next(numbers) for piece in answer)
    by_count = "few targets" if count <= FEW else "many targets"
    groups = (MUSE_TEST.get(annotation.provenance.split, by_count), _count_group(count))
    return Asked(prompt.format(s=words), tuple((target,) for target in request.targets), answer, groups, words)


def _worded(annotation: Annotation) -> Iterator[tuple[str, Request]]:
    for request in annotation.requests:
        for words in request.words:
            yield words.strip().lower(), request


def _count_group(count: int) -> str:
    return "1 target" if count == 1 else f"{count} targets"


def _referring(reader: str) -> Benchmark:
    return Benchmark(reader, _held_out(reader), {"paper": expressions, "released": expressions}, "united", forced=True)


def _several(reader: str) -> Benchmark:
    asks: dict[str, Ask] = {"paper": several_expressions, "released": several_expressions}
    return Benchmark(reader, _held_out(reader), asks, "ordered", forced=True)


def _named(reader: str) -> Benchmark:
    splits = (*_held_out(reader), "train")  # a file of one's own has no other
    return Benchmark(reader, splits, {"paper": names}, "matched")


def _held_out(reader: str) -> tuple[str, ...]:
    return tuple(split for split in READERS[reader].splits if split != "train")


REFERRING = [name for name in READERS if name in refer.NAMES or name.startswith("tfds:ref_coco/")]

BENCHMARKS: dict[str, Benchmark] = {
    **{name: _referring(name) for name in REFERRING if not name.startswith("grefcoco")},
    **{name: _several(name) for name in refer.MULTI_NAMES},
    "multi_refer": _several("multi_refcoco"),
    "grefcoco": Benchmark(
        "grefcoco",
        _held_out("grefcoco"),
        {"paper": generalised_expressions, "released": generalised_expressions},
        "united",
    ),
    "reason_seg": Benchmark(
        "reason_seg", ("val", "test"), {"paper": sentences, "released": first_sentence}, "united", forced=True
    ),
    "muse": Benchmark(
        "muse",
        ("val", "test", *MUSE_TEST),
        {"paper": reasoning_questions, "released": drawn_reasoning_questions},
        "matched",
    ),
    **{name: _named(name) for name, entry in READERS.items() if name in NAMED or entry.takes},
    "vqa": Benchmark("llava_instruct_150k", ("train",), {"paper": turns}, "words"),
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of this name, behind which the files of `coco_instances` may be named as for its reader.

    Raises:
      ValueError: there is none.
    """
    base = name.partition(":")[0]
    if base in READERS and READERS[base].takes:
        return replace(BENCHMARKS[base], reader=name)
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(BENCHMARKS)}."
        raise ValueError(f"Unknown benchmark {name!r}; {hint}")
    return BENCHMARKS[name]


def choose_forms(name: str, form: str) -> tuple[str, ...]:
    """The forms that "paper", "released" or "both" asks for.

    Raises:
      ValueError: an unknown form, or one that the benchmark does not have.
    """
    has = find_benchmark(name).forms
    if form == "both":
        return has
    if form not in has:
        known = ", ".join((*FORMS, "both"))
        raise ValueError(f"The benchmark {name} has no form {form!r}; it has {', '.join(has)} (of {known}).")
    return (form,)


def open_benchmark(name: str, root: str | Path, split: str) -> Reader:
    """The data of a benchmark below the folder `root`, all of the split.

    Raises:
      ValueError: an unknown benchmark or split, or one that is not scored, or a folder that is not as expected.
    """
    benchmark = find_benchmark(name)
    if split not in benchmark.splits:
        raise ValueError(f"The benchmark {name} has no split {split!r}; it has {', '.join(benchmark.splits)}.")
    if split == "test" and name == "muse":
        return Joined(name, split, [open_reader(benchmark.reader, root, part) for part in MUSE_TEST])
    return open_reader(benchmark.reader, root, split)


class Joined:
    """Several readers as one, one after the other."""

    def __init__(self, name: str, split: str, readers: Sequence[Reader]) -> None:
        self.name, self.split = name, split
        self.places = [(reader, index) for reader in readers for index in range(len(reader))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Annotation:
        reader, place = self.places[index]
        return reader[place]

    def picture(self, index: int) -> bytes:
        reader, place = self.places[index]
        return reader.picture(place)
