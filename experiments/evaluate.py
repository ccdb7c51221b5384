"""Score a checkpoint: the table, figures and pictures that training ends with, made again.

  python -m experiments.evaluate --config=configs/pixellm.py --checkpoint=runs/pixellm
  python -m experiments.evaluate --config=configs/pixellm.py --checkpoint=runs/pixellm --config.eval.examples=500

Without --config the config saved in the checkpoint is used. Written into --out: metrics.json, table.txt, records.jsonl
(one line per scored example) and the pictures.
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


def main() -> None:
    if not CHECKPOINT.value:
        raise UserError("--checkpoint is needed, as --checkpoint=runs/pixellm (see --help)")

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


def check_replaceable(out: Path) -> None:
    """Refuses an existing folder that holds anything but scores: it would be deleted as a whole."""
    ours = all((out / name).is_file() for name in ("metrics.json", "table.txt"))
    if out.exists() and not ours and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and holds no scores of an earlier evaluation; choose another --out")


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
