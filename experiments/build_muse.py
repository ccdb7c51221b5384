"""Questions about several things at once, written from your own annotated pictures, in the schema of MUSE.

  python -m experiments.build_muse --annotations=instances.json --images=pictures --out=data
  OPENAI_API_KEY=... python -m experiments.build_muse --annotations=instances.json --images=pictures --out=data \\
      --llm=openai:gpt-4o --pictures --limit=20 --price_in=2.5 --price_out=10

--llm says who writes: rules (needs no model), openai:MODEL (any endpoint that speaks OpenAI's chat completions; URL and
key in OPENAI_BASE_URL and OPENAI_API_KEY) or local:CHECKPOINT_OR_FOLDER (a LLaMA-family model run here). Replies are
kept in OUT/replies.jsonl: the same command goes on where it was stopped, and asks for nothing twice.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

if TYPE_CHECKING:
    from pixelstory_jax.data.muse.building import Drafts, Source
    from pixelstory_jax.data.muse.writing import Entry
    from pixelstory_jax.inference.reply_journal import ReplyJournal

ANNOTATIONS = flags.DEFINE_string("annotations", "", "File in COCO's format: images, annotations, categories.")
IMAGES = flags.DEFINE_string("images", "", "Folder of the pictures that it names.")
OUT = flags.DEFINE_string(
    "out", "", "Folder of the data set; of an earlier run, the file of the same split is replaced."
)
SPLIT = flags.DEFINE_enum("split", "train", ["train", "val", "test_few", "test_many"], "Which file of MUSE is written.")
LLM = flags.DEFINE_string("llm", "rules", "Who writes: rules, openai:MODEL or local:CHECKPOINT_OR_FOLDER.")
PAIRS = flags.DEFINE_integer("pairs", 3, "Questions that are written about a picture.", lower_bound=1)
LIMIT = flags.DEFINE_integer("limit", 0, "Only the first so many pictures, to see what comes out; 0 for all.", 0)
SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn by chance.", lower_bound=0)
SHEET = flags.DEFINE_integer("sheet", 12, "Pictures of the contact sheet; 0 for none.", lower_bound=0)

MIN_TARGETS = flags.DEFINE_integer(
    "min_targets", None, "Fewest targets of an answer; 2, of test_many 4.", lower_bound=1
)
MAX_TARGETS = flags.DEFINE_integer("max_targets", None, "Most targets of an answer; 10, of test_few 3.", lower_bound=1)
LEAST_SHARE = flags.DEFINE_float(
    "least_share", 0.002, "Of the picture's area; what covers less is not asked about.", 0, 1
)
REPEATS = flags.DEFINE_integer("repeats", 20, "How often the same question may have the same answer.", 1)
BALANCE = flags.DEFINE_float(
    "balance", 2.0, "No number of targets keeps more than so many times the mean of pairs; 0 keeps all.", 0
)
SIZE = flags.DEFINE_integer("size", 0, "Pairs in all, as even over their targets as they go; 0 for all.", lower_bound=0)

PICTURES = flags.DEFINE_boolean("pictures", False, "Send the pictures too; the model must see pictures.")
CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Requests at a time.", lower_bound=1)
RATE = flags.DEFINE_float("requests_per_minute", 0, "Limit of an endpoint; 0 for none.", lower_bound=0)
TIMEOUT = flags.DEFINE_float("timeout", 120, "Seconds until a request is given up and tried again.", lower_bound=0.1)
RETRIES = flags.DEFINE_integer("retries", 6, "Further attempts at a request that failed.", lower_bound=0)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 2000, "Of a reply.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Of the model; its own if not given.", lower_bound=0)
PRICE_IN = flags.DEFINE_float("price_in", None, "Price of a million tokens that are sent, for the report.", 0)
PRICE_OUT = flags.DEFINE_float("price_out", None, "Price of a million tokens that are received.", 0)


def main() -> None:
    for flag, example in ((ANNOTATIONS, "instances.json"), (IMAGES, "pictures"), (OUT, "data")):
        if not flag.value:
            raise UserError(f"--{flag.name} is needed, as --{flag.name}={example} (see --help)")
    target_limits()
    if LLM.value != "rules" and LLM.value.partition(":")[0] not in ("openai", "local"):
        raise UserError(f"--llm={LLM.value} is unknown; known are rules, openai:MODEL and local:CHECKPOINT_OR_FOLDER")
    if PICTURES.value and not LLM.value.startswith("openai:"):
        raise UserError(f"--pictures is for openai:MODEL; --llm={LLM.value} writes from names and boxes alone")
    out = Path(OUT.value).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file, but a folder is needed")
    sources = command_line.explain(find_sources)

    from pixelstory_jax.data.muse.building import select
    from pixelstory_jax.data.muse.checks import Limits

    drafts = command_line.explain(lambda: drafted(sources, out))
    limits = Limits(targets=target_limits(), repeats=REPEATS.value)
    entries, rejected = select(sources, drafts, limits, BALANCE.value, SIZE.value, SEED.value)
    if drafts.unanswered:
        print(f"{len(drafts.unanswered)} pictures have no answer, as: {drafts.unanswered[0]}")
        print("The same command asks for them again.")
    if not entries:
        raise UserError(f"No question was good enough to be kept; why: {dict(rejected) or 'none was written'}")
    command_line.explain(lambda: write(entries, rejected, out))


def target_limits() -> tuple[int, int]:
    """Fewest and most targets of an answer; the two test files of MUSE differ in them."""
    fewest = MIN_TARGETS.value or (4 if SPLIT.value == "test_many" else 2)
    most = MAX_TARGETS.value or (3 if SPLIT.value == "test_few" else 10)
    if most < fewest:
        raise UserError(f"--max_targets={most} is less than --min_targets={fewest}")
    return fewest, most


def find_sources() -> list[Source]:
    """The pictures that can be asked about and are there."""
    from pixelstory_jax.data.muse.pictures import Choice, picture_file, problem_with, read_pictures

    folder = Path(IMAGES.value).expanduser()
    if not folder.is_dir():
        raise ValueError(f"There is no folder of pictures {folder}.")
    choice = Choice(LEAST_SHARE.value, fewest=max(2, target_limits()[0]))
    pictures, problems = read_pictures(Path(ANNOTATIONS.value).expanduser(), choice)
    if not pictures:
        raise ValueError(f"{ANNOTATIONS.value} has no picture with {choice.fewest} or more clear instances.")
    pictures, sources = pictures[: LIMIT.value or None], []
    with progress_bar("looking", len(pictures)) as progress:
        for number, picture in enumerate(pictures, start=1):
            file = picture_file(picture, folder)
            problem = problem_with(picture, file) if file else f"{picture.file_name} is not in {folder}"
            if file and not problem:
                sources.append((picture, file))
            else:
                problems.append(problem)
            progress(number)
    if problems:
        print(f"{len(problems):,} pictures are left out, as: {problems[-1].rstrip('.')}.")
    if not sources:
        raise ValueError(f"None of the pictures of {ANNOTATIONS.value} can be used.")
    print(f"{len(sources):,} pictures with {choice.fewest} or more clear instances.", flush=True)
    return sources


def drafted(sources: list[Source], out: Path) -> Drafts:
    """What the writer of --llm makes of the pictures."""
    from pixelstory_jax.data.muse.building import write_drafts
    from pixelstory_jax.data.muse.writers import ModelWriter, RuleWriter

    if LLM.value == "rules":
        with progress_bar("writing", len(sources)) as progress:
            return write_drafts(sources, RuleWriter(PAIRS.value, SEED.value), 1, lambda: None, progress)
    with opened_journal(out) as journal:
        known = len(journal)
        writer = ModelWriter(journal, PAIRS.value, SEED.value, target_limits(), bool(PICTURES.value))

        def stop() -> None:
            print("Waiting for the replies that are under way; Ctrl-C ends at once.", file=sys.stderr, flush=True)
            journal.stop()

        try:
            with progress_bar("writing", len(sources)) as progress:
                return write_drafts(sources, writer, CONCURRENCY.value, stop, progress)
        except KeyboardInterrupt:
            raise UserError(f"Stopped. {journal.path} has {len(journal)} replies; the same command goes on") from None
        finally:
            print(cost(journal, known), flush=True)


def opened_journal(out: Path) -> ReplyJournal:
    """The language model, behind the journal of its replies."""
    from pixelstory_jax.inference.language_client import Asking, open_client
    from pixelstory_jax.inference.reply_journal import ReplyJournal

    asking = Asking(MAX_TOKENS.value, TEMPERATURE.value, TIMEOUT.value, RETRIES.value, RATE.value)
    return ReplyJournal(open_client(LLM.value, asking), out / "replies.jsonl")


def cost(journal: ReplyJournal, known: int) -> str:
    """What this run has asked for, and what that costs where the prices are given."""
    text = f"Asked for {journal.asked:,} replies ({known:,} were there): "
    text += f"{journal.prompt_tokens:,} tokens sent, {journal.completion_tokens:,} received"
    if PRICE_IN.value is not None and PRICE_OUT.value is not None:
        price = (journal.prompt_tokens * PRICE_IN.value + journal.completion_tokens * PRICE_OUT.value) / 1e6
        each = f", {1000 * price / journal.asked:.4g} for 1,000 pictures" if journal.asked else ""
        text += f", which cost {price:.4g}{each}"
    return text + "."


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Called with the number of pictures that are done: a bar with the time left; a line now and then elsewhere."""
    from tqdm import tqdm

    seconds = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(desc=title, total=total, unit=" pictures", mininterval=seconds, dynamic_ncols=True) as bar:
        yield lambda done: bar.update(done - bar.n)


def write(entries: list[Entry], rejected: dict[str, int], out: Path) -> None:
    """Writes the file of the split, its statistics and its contact sheet, and says so."""
    from pixelstory_jax.data.muse.statistics import statistics, table
    from pixelstory_jax.data.muse.writing import FILES, write_entries
    from pixelstory_jax.training.files import replacing

    path = write_entries(entries, out, SPLIT.value)
    written = [path]
    numbers = statistics(entries, rejected)
    with replacing(path.with_name(f"{FILES[SPLIT.value]}_statistics.json")) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    written.append(path.with_name(f"{FILES[SPLIT.value]}_statistics.json"))
    if SHEET.value:
        try:
            written.append(write_sheet(entries, path.with_name(f"{FILES[SPLIT.value]}_sheet.png")))
        except ValueError as error:  # one bad mask is no reason to lose what has been written
            print(f"There is no contact sheet: {error}")
    print(table(numbers))
    print(f"Written: {', '.join(map(str, written))}")
    print(
        f"{out} is now a folder of the data set muse, for everything that reads it; its pictures are links into "
        f"{IMAGES.value}."
    )


def write_sheet(entries: list[Entry], path: Path) -> Path:
    """A contact sheet of entries drawn by chance."""
    import numpy as np
    from PIL import Image

    from pixelstory_jax.data.muse.sheet import contact_sheet
    from pixelstory_jax.training.files import replacing

    drawn = np.random.default_rng(SEED.value).permutation(len(entries))[: SHEET.value]
    sheet = contact_sheet([entries[int(number)] for number in sorted(drawn)])
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, "PNG")
    return path


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
