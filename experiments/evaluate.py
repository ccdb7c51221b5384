"""Score a checkpoint: the table, figures and pictures that training ends with, made again, or a published benchmark.

  python -m experiments.evaluate --config=configs/pixellm.py --checkpoint=runs/pixellm
  python -m experiments.evaluate --config=configs/pixellm.py --checkpoint=runs/pixellm --config.eval.examples=500
  python -m experiments.evaluate --benchmark=reason_seg --split=val --data=dataset --checkpoint=runs/pixellm
  python -m experiments.evaluate --benchmark=muse --split=test_many --data=dataset --checkpoint=runs/pixellm \\
    --form=paper --judge=openai:gpt-3.5-turbo
  python -m experiments.evaluate --flops

Without --config the config saved in the checkpoint is used. Written into --out: metrics.json, table.txt, records.jsonl
(one line per scored example, of a benchmark per picture) and the pictures. A benchmark that was interrupted goes on
where it was; several processes (--coordinator, --processes, --process, or experiments.launch) share its pictures.
docs/evaluation.md says what is asked, and how the two forms of a benchmark differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from experiments import command_line
from pixelstory_jax.training.errors import UserError

CONFIG = command_line.define_config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Folder of a training run (its best checkpoint), or one checkpoint.")
OUT = flags.DEFINE_string("out", "", "Output folder, earlier scores in it are replaced; scores/NAME-STEP if not given.")
BENCHMARK = flags.DEFINE_string("benchmark", "", "A published benchmark, as refcoco, muse or vqa (docs/evaluation.md).")
SPLIT = flags.DEFINE_string("split", "", "Its split; the first that it is scored on if not given.")
DATA = flags.DEFINE_string("data", "dataset", "The folder that the data sets lie in (docs/data.md).")
FORM = flags.DEFINE_string("form", "both", "paper, released or both.")
LIMIT = flags.DEFINE_integer("limit", 0, "Asks about the first so many pictures only; 0: all.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 8, "Questions in a batch.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 0, "Longest answer; 0: eval.max_new_tokens of the checkpoint.", lower_bound=0
)
SEED = flags.DEFINE_integer("seed", 0, "Of the wordings and sample points that MUSE's released form draws.")
SHOW = flags.DEFINE_integer("show", 10, "Answers on each of the pages best.png and worst.png.", lower_bound=0)
DEVICES_PER_COPY = flags.DEFINE_integer("devices_per_copy", 1, "Devices that share one copy of the model.")
JUDGE = flags.DEFINE_string("judge", "", "A language model that judges MUSE's answers, as openai:gpt-3.5-turbo.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes.")
PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", -1, "Index of this process, with --coordinator.")
FLOPS = flags.DEFINE_bool("flops", False, "Prints how many operations an answer takes, and needs no checkpoint.")


def main() -> None:
    if FLOPS.value:
        from pixelstory_jax.evaluation.answer_flops import flops_report

        print(flops_report())
        return
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is needed, as --checkpoint=runs/pixellm (see --help)")
    if not BENCHMARK.value:
        score_as_training_does()
    elif CONFIG.value is not None:
        raise UserError("--benchmark takes the config of the checkpoint; leave --config out")
    else:
        score_benchmark()


def score_as_training_does() -> None:
    from ml_collections import ConfigDict

    from pixelstory_jax.models.paths import flatten
    from pixelstory_jax.objectives import build_objective
    from pixelstory_jax.training.checkpoints import check_tree, find_checkpoint, load_params
    from pixelstory_jax.training.compilation_cache import set_compilation_cache
    from pixelstory_jax.training.loop import write_evaluation

    set_compilation_cache()
    params, saved = load_params(CHECKPOINT.value)
    folder = find_checkpoint(CHECKPOINT.value)
    step = int(folder.name) if folder.name.isdigit() else 0
    out = Path(OUT.value) if OUT.value else Path("scores") / f"{Path(CHECKPOINT.value).name}-{step}"
    check_replaceable(out)
    config = ConfigDict(saved) if CONFIG.value is None else CONFIG.value
    objective = command_line.explain(lambda: build_objective(config))

    import jax

    expected = jax.eval_shape(objective.init, jax.random.key(0))
    check_tree(flatten(params), flatten(expected), folder)
    print(f"Scoring {folder}: {objective.describe()}", flush=True)
    # The evaluation of the last step is the full one; those before it are quick.
    evaluation = objective.evaluate(jax.device_put(params), max(step, config.train.steps))
    print(evaluation.table)
    try:
        write_evaluation(evaluation, out)
    except OSError as error:
        raise UserError(f"The scores cannot be written to {out}: {error.strerror or error}") from error
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def score_benchmark() -> None:
    """Asks what is missing; process 0 then puts the records together, scores and shows them."""
    import jax

    from experiments.copies import copies_on_devices
    from pixelstory_jax.data.readers.packed import set_name
    from pixelstory_jax.evaluation import benchmark_run
    from pixelstory_jax.evaluation.benchmarks import choose_forms, find_benchmark, open_benchmark
    from pixelstory_jax.inference.language_client import check_client
    from pixelstory_jax.inference.segmenter import read_trained
    from pixelstory_jax.training.checkpoints import find_checkpoint
    from pixelstory_jax.training.compilation_cache import set_compilation_cache
    from pixelstory_jax.training.processes import check_shared, initialize_distributed, meet

    initialize_distributed(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    set_compilation_cache()
    benchmark = command_line.explain(lambda: find_benchmark(BENCHMARK.value))
    split = SPLIT.value or benchmark.splits[0]
    reader = command_line.explain(lambda: open_benchmark(BENCHMARK.value, DATA.value, split))
    forms = command_line.explain(lambda: choose_forms(BENCHMARK.value, FORM.value))
    if JUDGE.value and (benchmark.pairing != "matched" or "paper" not in forms):
        raise UserError("--judge is for the paper form of muse")
    if JUDGE.value:  # its model is opened when the records are there; what is wrong already is said now
        command_line.explain(lambda: check_client(JUDGE.value))
    trained = command_line.explain(lambda: read_trained(CHECKPOINT.value))
    run = benchmark_run.BenchmarkRun(
        benchmark=BENCHMARK.value,
        split=split,
        forms=forms,
        checkpoint=str(find_checkpoint(CHECKPOINT.value)),
        max_new_tokens=MAX_TOKENS.value or trained.settings.eval.max_new_tokens,
        pictures=min(LIMIT.value or len(reader), len(reader)),
        batch_size=BATCH.value,
        seed=SEED.value,
    )
    name = f"{Path(CHECKPOINT.value).name}-{set_name(run.benchmark, split)}"
    out = Path(OUT.value) if OUT.value else Path("scores") / name
    if jax.process_index() == 0:
        command_line.explain(lambda: benchmark_run.claim_folder(run, out))
    meet("folder")
    check_shared(out)
    copies = command_line.explain(lambda: copies_on_devices(trained, run.max_new_tokens, DEVICES_PER_COPY.value))
    print(f"{run.benchmark} {split}: {run.pictures} pictures, {' and '.join(forms)}, into {out}", flush=True)
    benchmark_run.ask_missing(run, reader, copies, out, jax.process_index(), jax.process_count(), say)
    meet("records")
    if jax.process_index() == 0:
        finish_benchmark(run, reader, out)
    meet("scores")  # a process that has ended would end the others


def say(line: str) -> None:
    print(line, flush=True)


def finish_benchmark(run, reader, out: Path) -> None:
    from PIL import Image

    from pixelstory_jax.evaluation import benchmark_run
    from pixelstory_jax.evaluation.benchmark_scores import score_records

    records = benchmark_run.merge_records(run, out)
    judged, about = judge(records, out) if JUDGE.value else (None, {})
    report = score_records(run.benchmark, run.split, records, judged)
    about |= {"benchmark": run.benchmark, "split": run.split, "checkpoint": run.checkpoint, "pictures": run.pictures}
    benchmark_run.write_report(report, out, about)
    pages = benchmark_run.answer_pages(run.benchmark, run.split, run.seed, reader, records, SHOW.value)
    for name, page in pages.items():
        Image.fromarray(page).save(out / f"{name}.png")
    print(report.table)
    print(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")


def judge(records, out: Path):
    """Verdicts of the language model on MUSE's answers; its replies are kept, so none is asked for twice."""
    from pixelstory_jax.evaluation.answer_judge import MOST_POINTS, judge_records
    from pixelstory_jax.evaluation.benchmark_run import write_lines
    from pixelstory_jax.inference.language_client import Asking, open_client
    from pixelstory_jax.inference.reply_journal import ReplyJournal

    client = command_line.explain(lambda: open_client(JUDGE.value, Asking(max_tokens=400, temperature=0.0)))
    own = [record for record in records if record["form"] == "paper"]
    with command_line.explain(lambda: ReplyJournal(client, out / "judge_replies.jsonl")) as journal:
        judged = command_line.explain(lambda: judge_records(own, journal))
    lines = [{"index": place[0], "question": place[1], "points": points} for place, points in judged.points.items()]
    write_lines(out / "judged.jsonl", lines)
    rule = f"more than half of {MOST_POINTS} points are right; no usable reply counts as wrong"
    return judged.verdicts, {"judge": {"model": client.name, "failed": judged.failed, "rule": rule}}


def check_replaceable(out: Path) -> None:
    """Refuses an existing folder that holds anything but scores: it would be deleted as a whole."""
    ours = all((out / name).is_file() for name in ("metrics.json", "table.txt"))
    if out.exists() and not ours and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no scores of an earlier evaluation; choose another --out")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
