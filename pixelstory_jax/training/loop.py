"""The training loop, for every objective.

Order of a step: hand out the batch, start the step on the devices, and only then wait for the scalars of the step
before, so that the devices always have work. Keys are folded from the step and the position in the data is saved with
the weights: a run that is killed and resumed gives the losses of an unbroken one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from pixelstory_jax.data.pipeline import BatchIterator, DataError, Source, make_iterator
from pixelstory_jax.objectives.flops import flops_of_step
from pixelstory_jax.objectives.objective import Evaluation, Objective, Params
from pixelstory_jax.training import finite, overview, processes, sharding
from pixelstory_jax.training.checkpoints import Checkpoints
from pixelstory_jax.training.chips import peak_flops
from pixelstory_jax.training.compilation_cache import set_compilation_cache
from pixelstory_jax.training.errors import ConfigError, TrainingStopped, UserError, first_line, is_disk_full
from pixelstory_jax.training.files import replacing
from pixelstory_jax.training.goodput import DeviceWatch, SlowData, Stopwatch
from pixelstory_jax.training.host_memory import keep_freed_memory
from pixelstory_jax.training.metrics import MetricWriter
from pixelstory_jax.training.optimizer import build_optimizer
from pixelstory_jax.training.options import ProfileOptions, TrainOptions
from pixelstory_jax.training.profiling import Profiler
from pixelstory_jax.training.progress import Progress, Work, say
from pixelstory_jax.training.state import (
    TrainState,
    averaged_params,
    build_step,
    check_trained,
    make_state,
    place_starting_weights,
    split_trained,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    step: steps done. finished: False if a signal stopped it (it can be resumed). evaluation: the last one, if any; of
    a finished run that of the best parameters. scores: its folder, also where an earlier call has made it.
    scalars: of the last step. seconds: per section of the stopwatch. workdir: where everything is.
    """

    step: int
    finished: bool
    evaluation: Evaluation | None
    scores: Path | None
    scalars: dict[str, float]
    seconds: dict[str, float]
    workdir: Path


def train(config: Any, objective: Objective, source: Source, workdir: str | Path) -> Result:
    """Trains `objective` on `source` and leaves everything in `workdir`; resumes if there is a checkpoint in it.

    Args:
      config: ml_collections ConfigDict or dict with `seed` and `train` (see TrainOptions); saved as it is.
      objective: what is trained (objectives/objective.py).
      source: random-access training examples, whose stacks of `train.batch_size` fit `objective.batch_spec`.
      workdir: output folder.

    Raises:
      UserError: one sentence on what went wrong and what to do (ConfigError, CheckpointError, TrainingStopped).
    """
    keep_freed_memory()
    watch = Stopwatch()
    try:
        with watch.section("init"), _Signals() as signals, contextlib.ExitStack() as stack:
            run = _Run(config, objective, source, Path(workdir), watch, stack)
            return run.train(signals)
    except OSError as error:
        if is_disk_full(error):
            raise TrainingStopped(
                f"The disk or the quota of {workdir} is full; training has stopped; checkpoints that are complete stay "
                "usable: make room and run the same command again"
            ) from error
        raise
    except (ValueError, RuntimeError) as error:  # what JAX raises for a computation that failed
        if processes.is_loss_of_another(error):
            raise TrainingStopped(
                f"Another process of this run has ended or cannot be reached ({first_line(error)}); {processes.AGAIN}"
            ) from error
        raise


class _Run:
    """One run: what `train` sets up once, and the pieces of its loop."""

    def __init__(
        self,
        config: Any,
        objective: Objective,
        source: Source,
        workdir: Path,
        watch: Stopwatch,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        self.options = options = TrainOptions.from_config(self.config["train"])
        profile = ProfileOptions.from_config(self.config.get("profile", {}), options.steps)
        self.seed = int(self.config.get("seed", 0))
        self.objective, self.workdir, self.watch = objective, workdir, watch
        set_compilation_cache()
        _make_workdir(workdir)
        self.mesh = sharding.build_mesh(options.mesh)
        stack.enter_context(jax.sharding.set_mesh(self.mesh))
        processes.check_shared(workdir)
        self.checkpoints = Checkpoints(workdir, self.config)
        previous = _previous_config(workdir) if self.checkpoints.newest else None
        notes = compare_configs(previous, self.config) if previous is not None else []
        stack.enter_context(self.checkpoints)

        abstract = jax.eval_shape(objective.init, jax.random.key(0))
        check_trained(abstract, objective)
        optimizer = build_optimizer(options, split_trained(abstract, objective.trainable)[0])

        def initial() -> TrainState:
            return make_state(objective, optimizer, options.ema, self.seed)

        shapes = jax.eval_shape(initial)
        self.shardings = state_shardings(shapes, objective.sharding_rules, self.mesh)
        index, count = sharding.process_rows(self.mesh, options.batch_size)
        self.data: BatchIterator = make_iterator(
            source,
            options.batch_size,
            self.seed,
            process_index=index,
            process_count=count,
            threads=options.data_threads,
            prefetch=options.prefetch,
            processes=options.data_processes,
        )
        stack.callback(self.data.close)
        self.batch_parts = count

        restored = self.checkpoints.restore(shapes, self.shardings)
        if restored is None:
            weights = objective.starting_weights()  # first: a wrong file is to be refused at once
            self.state = jax.jit(initial, out_shardings=self.shardings)()
            if weights:
                self.state = place_starting_weights(self.state, weights, self.shardings)
        else:
            self.state = restored.state
            self.data.set_state(restored.data)
            notes = restored.notes + notes
        self.step = int(self.state.step)
        _write_text(workdir / "config.json", json.dumps(self.config, indent=2) + "\n")
        self.writer = MetricWriter(workdir, self.step)
        stack.callback(self.writer.close)
        self.compute = jax.jit(
            build_step(objective, optimizer, options, self.seed),
            donate_argnums=0,
            out_shardings=(self.shardings, sharding.replicated(self.mesh)),
        )
        self._describe(shapes, notes, resumed=restored is not None)
        self.profiler = Profiler(profile, workdir)
        stack.callback(self.profiler.close)
        self.devices = DeviceWatch()
        stack.callback(self.devices.close)
        self.slow_data = SlowData(options)
        self.pending: tuple[int, dict[str, jax.Array], dict[str, jax.Array]] | None = None  # step, scalars, batch
        self.scalars: dict[str, float] = {}
        self.evaluation: Evaluation | None = None
        self.cut_short = False  # a signal came before or within the evaluation of this step

    def _describe(self, shapes: TrainState, notes: list[str], resumed: bool) -> None:
        table, summary = overview.parameter_table(shapes, self.shardings, self.objective.trainable)
        self.parameter_table = table
        say(f"{self.objective.name}: {self.objective.describe()}")
        say(summary)
        devices = jax.devices()
        say(
            f"{len(devices)} {devices[0].platform} device(s), {jax.process_count()} process(es), mesh "
            + " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        )
        for note in notes:
            say(note)
        say(f"{'Resuming at step ' + str(self.step) if resumed else 'Training from step 0'}; output in {self.workdir}")

    def train(self, signals: _Signals) -> Result:
        """Steps, evaluations and checkpoints up to `train.steps` or a signal, which may have come already."""
        options, watch = self.options, self.watch
        if self.step >= options.steps:
            say(f"All {options.steps} steps are done already")
        compiled, flops = None, 0.0
        if self.step < options.steps and not signals.asked:
            compiled, flops = self._compile()
        devices = self.mesh.devices.flatten().tolist()
        work = Work(options.batch_size, self.objective.contents, flops, peak_flops(devices))
        progress = Progress(self.step, options.steps, work)
        with contextlib.closing(progress), watch.section("step"):
            if self._evaluation_is_missing():
                with progress.pause():
                    self._evaluate(signals)
            while compiled is not None and self.step < options.steps and not signals.stop(self.step):
                self._start_step(compiled, progress)
                self.checkpoints.check()
                due = _due(self.step, options.eval_every) or self.step == options.steps
                if due or _due(self.step, options.checkpoint_every):
                    self._finish_pending(progress)
                    with progress.pause():
                        self._save()
                        if due:
                            self._evaluate(signals)
            self._finish_pending(progress)
            self._save()
            with watch.section("checkpoint"):
                self.checkpoints.wait()
        finished = self.step >= options.steps and not self.cut_short
        scores = self._reported_folder()
        self._report(finished, scores)
        return Result(self.step, finished, self.evaluation, scores, self.scalars, dict(watch.seconds), self.workdir)

    def _start_step(self, compiled: Any, progress: Progress) -> None:
        """Hands the next step to the devices, then waits for the results of the one before."""
        step = self.step + 1
        if self.profiler.begins(step):
            self._finish_pending(progress)
            with progress.pause():
                self.profiler.start()
        section = "step" if step > self.writer.reached else "repeat"
        with self.watch.section(section), jax.profiler.StepTraceAnnotation("train", step_num=step):
            batch = self._next_batch(section)
            with jax.transfer_guard("disallow"):  # what is not on the devices yet would make them wait
                self.state, scalars = compiled(self.state, batch)
            self.devices.started(scalars["loss"])
            self._finish_pending(progress)
        self.step = step
        self.pending = (step, scalars, batch)
        if self.profiler.ends(step):
            self._finish_pending(progress)
            with progress.pause():
                say(self.profiler.stop())

    def _compile(self) -> tuple[Any, float]:
        """The compiled step, and the model operations that it does."""
        with self.watch.section("compile"):
            spec = {
                name: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(self.mesh, self.options.batch_size)
                )
                for name, leaf in self.objective.batch_spec.items()
            }
            traced = self.compute.trace(self.state, spec)
            compiled = traced.lower().compile()
            flops = flops_of_step(traced.jaxpr, self.objective)
            processes.meet("compiled")  # on CPUs, where computations give up when others come 30 s later to the first
        summary = overview.flops_summary(flops, self.options.batch_size)
        if jax.process_index() == 0:
            _write_text(self.workdir / "parameters.txt", f"{self.parameter_table}\n{summary}\n")
        say(f"{summary}; compiled in {self.watch.seconds['compile']:.1f} s")
        return compiled, flops

    def _next_batch(self, section: str) -> dict[str, jax.Array]:
        begin = time.perf_counter()
        with self.watch.section("data"):
            try:
                local = next(self.data)
            except DataError as error:
                raise TrainingStopped(f"{error}; training has stopped after step {self.step}") from error
            sharding.check_batch(local, self.objective.batch_spec, self.batch_parts)
            batch = sharding.global_batch(local, self.mesh, self.options.batch_size)
        self.watch.move(self.devices.busy_seconds(begin, time.perf_counter()), "data", section)
        return batch

    def _finish_pending(self, progress: Progress) -> None:
        """Waits for the scalars of the last started step, checks and reports them."""
        if self.pending is None:
            return
        step, arrays, batch = self.pending
        self.pending = None
        arrays = jax.device_get(arrays)
        flags = arrays.pop("finite")
        scalars = {name: float(value) for name, value in arrays.items()}
        scalars = {"loss": scalars.pop("loss"), **scalars}
        if not (flags.all() and np.isfinite(list(scalars.values())).all()):
            raise TrainingStopped(self._explain_not_finite(step, scalars, flags, batch))
        self.scalars = scalars
        rates = progress.update(step, scalars, self.watch.shares())
        warning = self.slow_data.after_step(step, self.watch.seconds)
        if warning:
            say(warning)
        if _due(step, self.options.log_every) or step == self.options.steps or step == 1:
            self.writer.scalars(step, "train", {**scalars, **rates})

    def _explain_not_finite(
        self, step: int, scalars: dict[str, float], flags: np.ndarray, batch: dict[str, jax.Array]
    ) -> str:
        self.checkpoints.wait()
        newest = self.checkpoints.newest
        what = finite.explain(scalars, flags, batch, *split_trained(self.state.params, self.objective.trainable))
        text = f"Step {step}: {what}; training has stopped, "
        text += f"the last checkpoint is {newest}" if newest else "there is no checkpoint yet"
        if what.startswith(("the batch", "the frozen")):
            return text
        rate = f"{scalars['learning_rate']:.3g}"
        return f"{text}; a lower train.learning_rate (now {rate}) or train.clip_norm usually helps"

    def _save(self) -> None:
        with self.watch.section("checkpoint"):
            self.checkpoints.save_last(self.state, self.data.get_state())

    def _evaluation_folder(self, step: int) -> Path:
        return self.workdir / "evaluations" / f"step_{step:06d}"

    def _reported_folder(self) -> Path | None:
        """Where the evaluation of the best parameters is, else that of the newest ones; None if there is neither."""
        steps = [step for step in (self.checkpoints.best_step, self.step) if step is not None]
        folders = [self._evaluation_folder(step) for step in steps]
        return next((folder for folder in folders if (folder / "table.txt").is_file()), None)

    def _evaluation_is_missing(self) -> bool:
        """True where a run was killed between the checkpoint of this step and the end of its evaluation."""
        due = _due(self.step, self.options.eval_every) or self.step >= self.options.steps
        return self.step > 0 and due and not self._evaluation_folder(self.step).exists()

    def _evaluate(self, signals: _Signals) -> None:
        """Evaluates the newest parameters, and after the last step the best ones where these are older.

        Only the evaluation of the last step is complete (see the objectives), and the table at the end is to describe
        the parameters that are used from then on. The folder of this step is written last: where it is missing, all of
        this is done again on resume.
        """
        with self.watch.section("eval"), signals.interrupting() as interrupted:
            params = averaged_params(self.state)
            if not interrupted:
                evaluation = self._evaluation_of(params)
        if interrupted:
            self.cut_short = True  # done when the run is resumed, since its folder is not there
            return
        self.evaluation = evaluation
        self.writer.scalars(self.step, "evaluation", {**evaluation.metrics, "score": evaluation.score})
        self.writer.images(self.step, "evaluation", evaluation.images)
        with self.watch.section("checkpoint"):
            best = self.checkpoints.save_best(self.step, params, float(evaluation.score), evaluation.metrics)
        say(f"Evaluation at step {self.step}: score {evaluation.score:.4g}{' (best so far)' if best else ''}")
        best_step = self.checkpoints.best_step
        if self.step >= self.options.steps and best_step not in (None, self.step):
            say(f"The best score is that of step {best_step}: its parameters are evaluated for the table")
            if not self._evaluate_best(best_step, signals):
                return
        self._write_evaluation(evaluation, self.step)

    def _evaluation_of(self, params: Params) -> Evaluation:
        with processes.own_copy(params, self.objective.sharding_rules) as own:
            return self.objective.evaluate(own, self.step)

    def _evaluate_best(self, step: int, signals: _Signals) -> bool:
        """The complete evaluation of the best parameters, those of `step`; False if a signal came."""
        with self.watch.section("eval"), signals.interrupting() as interrupted:
            params = self.checkpoints.restore_best(self.shardings.params)
            if not interrupted:
                evaluation = self._evaluation_of(params)
        if interrupted:
            self.cut_short = True
            return False
        self.evaluation = evaluation
        self._write_evaluation(evaluation, step)
        return True

    def _write_evaluation(self, evaluation: Evaluation, step: int) -> None:
        with self.watch.section("checkpoint"):
            self.checkpoints.wait()  # where the folder exists nothing is evaluated again, so the best must be saved
        if jax.process_index() == 0:
            write_evaluation(evaluation, self._evaluation_folder(step))

    def _report(self, finished: bool, scores: Path | None) -> None:
        seconds = {f"{name}_seconds": value for name, value in self.watch.seconds.items()}
        totals = {"total_seconds": self.watch.total, "goodput": self.watch.goodput}
        self.writer.scalars(self.step, "time", {**seconds, **totals})
        if not finished:
            say(f"Stopped by a signal at step {self.step}, saved; to resume, run it with --workdir={self.workdir}")
            say(self.watch.table())
            return
        if scores and jax.process_index() == 0:
            table = (scores / "table.txt").read_text(encoding="utf-8").rstrip("\n")
            say(f"\nScores of the parameters of step {int(scores.name.removeprefix('step_'))}:\n\n{table}")
        say("\n" + self.watch.table())
        say("Written:")
        for path, what in (
            ("checkpoints/best", "best parameters by score"),
            ("checkpoints/last", "newest state, to resume from"),
            ("evaluations", "pictures, answers and scores of each evaluation"),
            ("metrics.jsonl", "scalars"),
            ("tensorboard", "the same for `tensorboard --logdir`"),
            ("parameters.txt", "parameters and FLOPs per step"),
            ("config.json", "the resolved config"),
            ("profile", "trace of chosen steps"),
        ):
            if (self.workdir / path).exists():
                say(f"  {self.workdir / path}: {what}")
        following = getattr(self.objective, "next_command", "")
        if following:
            say("Next: " + following.replace("{workdir}", str(self.workdir)))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Signals:
    """SIGTERM and SIGINT ask the run to stop after what it is doing (a step, the set-up, the compilation); a second
    SIGINT stops at once.

    With several processes the coordination service carries the notice, so that all stop after the same step; `asked`
    is then never set.
    """

    def __init__(self) -> None:
        self.asked = False
        self._in_evaluation = False
        self._old: dict[int, Any] = {}
        # Asking for the number of processes starts the devices, which takes long: not before the handlers are there.
        self._distributed = jax.distributed.is_initialized() and jax.process_count() > 1

    def __enter__(self) -> _Signals:
        if not self._distributed and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if self._in_evaluation:
            self._in_evaluation = False
            raise _EvaluationInterrupted

    def stop(self, step: int) -> bool:
        """Whether to stop before the next step."""
        if self._distributed:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[list[bool]]:
        """An evaluation within may be cut short by a signal; the list it yields is then not empty."""
        interrupted: list[bool] = []
        self._in_evaluation = True
        try:
            if self.asked:
                interrupted.append(True)
            yield interrupted
        except _EvaluationInterrupted:
            interrupted.append(True)
        finally:
            self._in_evaluation = False


class _EvaluationInterrupted(BaseException):
    """Raised by the signal handler within an evaluation."""


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Pictures (PNG), table, metrics and records of one evaluation; the folder appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        for name, picture in evaluation.images.items():
            path = temporary / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(picture, np.uint8)).save(path)
        (temporary / "table.txt").write_text(evaluation.table + "\n", encoding="utf-8")
        scores = {"score": evaluation.score, "metrics": dict(evaluation.metrics)}
        (temporary / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        if evaluation.records:
            lines = "".join(json.dumps(record) + "\n" for record in evaluation.records)
            (temporary / "records.jsonl").write_text(lines, encoding="utf-8")


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Sentences on what differs from the config of the checkpoint; ConfigError if the model does."""
    before, after = _flat_config(old), _flat_config(new)
    names = [key for key in sorted(before.keys() | after.keys()) if not key.startswith(("profile.", "dry_run"))]
    changed = [key for key in names if before.get(key) != after.get(key)]
    texts = {key: f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed}
    fixed = [key for key in changed if key == "objective" or key.split(".")[0] == "model"]
    if fixed:
        raise ConfigError(
            f"The workdir holds a run of another model: {'; '.join(texts[key] for key in fixed)}; "
            "use its config, or a new --workdir"
        )
    return [f"Resuming with a changed config: {'; '.join(texts.values())}"] if changed else []


def _flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(config)).items():
        if isinstance(value, dict):
            flat.update(_flat_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _previous_config(workdir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _make_workdir(workdir: Path) -> None:
    if re.match(r"\w+:/", str(workdir)):  # Path has made gs:/bucket of gs://bucket
        raise UserError(
            f"The workdir {workdir} is the address of a bucket, and has to be a folder: mount the bucket or a shared "
            "disk in every host and name the folder in it (docs/slices.md)"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(
            f"The workdir {workdir} cannot be used ({first_line(error)}); choose another --workdir"
        ) from error


def _write_text(path: Path, text: str) -> None:
    if jax.process_index() == 0:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
