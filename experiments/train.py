"""Train what a config describes: one command from data to scores, pictures and a checkpoint.

  python -m experiments.train --config=configs/pixellm.py
  python -m experiments.train --config=configs/pixellm.py:tiny --workdir=runs/mine --config.train.steps=50

Any field of the config can be overridden with --config.SECTION.FIELD=VALUE. A --workdir that holds a checkpoint is
resumed; Ctrl-C or SIGTERM saves and stops. Several hosts: PIXELSTORY_DISTRIBUTED=1 where the cluster can be asked
(Cloud TPU, Slurm), or --coordinator, --processes and --process on each host. --config.dry_run=True reads the data,
describes the first batch and stops before the model is allocated.
"""

from __future__ import annotations

import datetime
import sys
from functools import cache
from pathlib import Path

import jax
from absl import flags

from experiments import command_line
from pixelstory_jax.training.compilation_cache import set_compilation_cache
from pixelstory_jax.training.errors import ConfigError
from pixelstory_jax.training.loop import train
from pixelstory_jax.training.processes import initialize_distributed

CONFIG = command_line.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Output folder; runs/NAME-DATE if not given.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0, for several processes.")
PROCESSES = flags.DEFINE_integer("processes", 0, "Number of processes, with --coordinator.")
PROCESS = flags.DEFINE_integer("process", -1, "Index of this process, with --coordinator.")


def main() -> None:
    config = CONFIG.value
    if config is None:
        raise ConfigError("Say what to train: --config=configs/pixellm.py (see --help)")
    if config.get("dry_run", False):
        from pixelstory_jax.objectives.dry_run import describe_first_batch

        print(command_line.explain(lambda: describe_first_batch(config)))
        return
    initialize_distributed(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    set_compilation_cache()
    if not WORKDIR.value and jax.process_count() > 1:
        raise ConfigError("Several processes need one --workdir that all of them see")
    name = f"{config.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    workdir = Path(WORKDIR.value or Path("runs") / name)

    from pixelstory_jax.data import build_source
    from pixelstory_jax.objectives import build_objective

    open_source = cache(lambda: build_source(config, "train"))
    objective = command_line.explain(lambda: build_objective(config, open_source))
    train(config, objective, command_line.explain(open_source), workdir)


if __name__ == "__main__":
    command_line.run(main, sys.modules["__main__"].__doc__ or "")
