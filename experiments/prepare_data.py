"""Check a data set, look at it, and pack it for training on pods.

  python -m experiments.prepare_data --dataset=ade20k --source=dataset
  python -m experiments.prepare_data --dataset=ade20k --source=dataset --inspect --limit=500
  python -m experiments.prepare_data --dataset=ade20k --source=dataset --out=dataset --processes=8

--source is the folder below which the data sets are (docs/data.md), as config.data.folder of training. The check reads
every annotation, every mask and every picture; what cannot be used is listed in --report, and passed over in training.
With --out the rest is packed into FOLDER/packed/NAME-SPLIT; training with --config.data.folder=FOLDER reads that. The
same command goes on where it was stopped. Exit code 2 where nothing can be used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pixelstory_jax.data.checking import Report
    from pixelstory_jax.data.readers.reader import Reader

DATASET = flags.DEFINE_string("dataset", "", "Name of the data set, as ade20k.")
SOURCE = flags.DEFINE_string("source", "", "Folder below which the data sets are.")
SPLIT = flags.DEFINE_string("split", "train", "Which part of it.")
OUT = flags.DEFINE_string("out", "", "Folder that gets packed/NAME-SPLIT; without it nothing is packed.")
REPORT = flags.DEFINE_string("report", "", "Folder of report.json and sheets; reports/NAME-SPLIT if not given.")
INSPECT = flags.DEFINE_bool("inspect", False, "Also draw pages of examples with masks, questions and answers.")
EXAMPLES = flags.DEFINE_integer("examples", 24, "Examples on the pages, eight on each.", lower_bound=1)
WORDING = flags.DEFINE_enum("wording", "released", ["released", "varied"], "Of the questions on the pages.")
LIMIT = flags.DEFINE_integer("limit", 0, "Only so many pictures, from the first; 0 for all.", lower_bound=0)
PROCESSES = flags.DEFINE_integer("processes", 0, "Processes that read; 0: this one does.", lower_bound=0)
SHARD = flags.DEFINE_integer(
    "shard", 1000, "Pictures of a file; as many may be lost where a run is stopped.", lower_bound=1
)
SIDE = flags.DEFINE_integer(
    "side",
    0,
    "Pictures with a longer side are stored as JPEGs of this one, masks fitted; 0: as they are.",
    lower_bound=0,
)

PAGE = 8  # examples


def main() -> None:
    if not DATASET.value or not SOURCE.value:
        raise ConfigError("--dataset and --source are needed, as --dataset=ade20k --source=dataset (see --help)")

    from pixelstory_jax.data.packing import check
    from pixelstory_jax.data.readers import open_folder, open_reader
    from pixelstory_jax.data.readers.packed import set_name

    open_ = open_folder if OUT.value else open_reader  # what is packed already can be checked, too
    reader = command_line.explain(lambda: open_(DATASET.value, SOURCE.value, SPLIT.value))
    numbers = range(min(LIMIT.value or len(reader), len(reader)))
    folder = Path(REPORT.value or Path("reports") / set_name(reader.name, reader.split))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--report={folder} is a file, but a folder is needed")
    with progress_bar(len(numbers)) as progress:
        if OUT.value:
            report = command_line.explain(lambda: pack_to(Path(OUT.value), reader, numbers, progress))
        else:
            report = check(reader, numbers, PROCESSES.value, progress)
    print(f"{reader.name}, {reader.split}, of {getattr(reader, 'folder', SOURCE.value)}:\n{report.table()}")
    command_line.explain(lambda: write_report(folder, report))
    if not report.usable:
        raise UserError(f"None of the {len(numbers)} pictures can be used; {folder / 'report.json'} says why")
    if OUT.value:
        print(f"Packed. To train on it: --config.data.folder={OUT.value}")
    if INSPECT.value:
        command_line.explain(lambda: draw_sheets(folder, reader))
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def pack_to(out: Path, reader: Reader, numbers: range, progress: Callable[[int], None]) -> Report:
    """Packs below `out`; UserError where it was stopped."""
    from pixelstory_jax.data.packing import pack
    from pixelstory_jax.data.readers.registry import packed_folder

    folder = packed_folder(reader.name, out, reader.split)
    try:
        return pack(
            reader,
            numbers,
            folder,
            source=SOURCE.value,
            side=SIDE.value,
            per_shard=SHARD.value,
            processes=PROCESSES.value,
            progress=progress,
        )
    except KeyboardInterrupt:
        raise UserError(f"Stopped. The same command goes on with {folder}") from None


def write_report(folder: Path, report: Report) -> None:
    """Writes report.json; sheets of an earlier call go."""
    from pixelstory_jax.training.files import replacing

    folder.mkdir(parents=True, exist_ok=True)
    for page in folder.glob("examples-*.png"):
        page.unlink()
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report.summary(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_sheets(folder: Path, reader: Reader) -> None:
    """Pages of examples as training draws them."""
    from pixelstory_jax.data.asking import Asking
    from pixelstory_jax.data.mixture import Group, Mixture
    from pixelstory_jax.evaluation.example_sheets import example_sheet
    from pixelstory_jax.inference.saving import png_bytes, write_whole

    mixture = Mixture([Group(reader.name, 1.0, (reader,))], Asking(WORDING.value), seed=0)
    count = min(EXAMPLES.value, len(reader))
    for start in range(0, count, PAGE):
        shown = range(start, min(start + PAGE, count))
        title = f"{reader.name}, {reader.split}: examples {shown.start + 1} to {shown.stop}"
        sheet = example_sheet([mixture[index][0] for index in shown], title)
        write_whole(folder / f"examples-{start // PAGE + 1}.png", png_bytes(sheet))


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, moved by the yielded function; elsewhere than on a terminal, now and then."""
    from tqdm import tqdm

    seconds = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit=" pictures", mininterval=seconds, dynamic_ncols=True) as bar:
        yield lambda done: bar.update(done) and None


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
