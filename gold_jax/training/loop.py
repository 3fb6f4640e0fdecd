"""The training loop, from top to bottom: what happens in a run, whatever is learned."""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from gold_jax.config import SFTConfig
from gold_jax.host_memory import release_freed_memory
from gold_jax.loading import LoadedModel
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import Params, merge, split
from gold_jax.parallel import agreement, beats, processes
from gold_jax.parallel.watch import make_watchdog
from gold_jax.step_ranges import read_steps
from gold_jax.text.data import Example
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training.annotations import DISPATCH, EVALUATION, SAVING, WAITING, annotate
from gold_jax.training.batches import BatchBuilder, RowOrder, with_text_completion
from gold_jax.training.checkpoint import checkpoints_in, current_run, earlier_names, save_final_model, set_current_run
from gold_jax.training.checkpointing import Checkpoints, describe_error
from gold_jax.training.evaluation import measures
from gold_jax.training.logging import MetricLog, RunningMean, plain_value
from gold_jax.training.nonfinite import Diverged, NonFiniteCounter, describe_divergence
from gold_jax.training.optimizer import make_optimizer, make_schedule
from gold_jax.training.resume import IGNORED_ON_RESUME, describe_run, find_and_restore, truncate_log
from gold_jax.training.signals import Preempted, SignalHandler
from gold_jax.training.step import LossFn, Step, TrainState, optimizer_shardings
from gold_jax.training.tables import before_after, completions_table
from gold_jax.training.trackers import make_trackers

LOGS = ("metrics.jsonl", "completions.jsonl")


@dataclasses.dataclass
class Task:
    """What a run is made of, beside its settings.

    `student` is without its model, which is `graph` and `params`; the run donates `params`, so nobody else may hold
    them.
    """

    student: LoadedModel
    graph: nnx.GraphDef
    params: Params
    loss: LossFn
    constants: Any
    batch_builder: BatchBuilder
    train: Sequence[Example]
    kept: list[int]
    digests: Mapping[str, str]  # of what the run depends on beside its settings, for checkpoints
    eval: Sequence[Example] | None
    teacher_score: Callable[[], Mapping[str, float]] | None = None
    without_effect: Collection[str] = ()  # settings that have no effect beside the others
    restart: Callable[[], Any] | None = None  # called before each further training of the same student


class Loop:
    """One training run.

    Attributes:
        history: every logged line of the last `train`, oldest first.
        state: the student's parameters and, once `train` was called, the optimizer's state.
    """

    def __init__(
        self,
        task: Task,
        args: SFTConfig,
        *,
        prompts_per_step: int,
        batch_size: int,
        console: Console,
        max_new_tokens: int,
        save_dtype: str = "auto",
    ):
        """Sets a run up.

        Args:
            task: what it is made of.
            args: its settings.
            prompts_per_step: rows of the data that an update reads.
            batch_size: rows of a micro-batch, on all devices.
            console: where it tells what it does; nowhere in all processes but the first.
            max_new_tokens: bounds greedy completions in evaluation.
            save_dtype: as in `save_model`.
        """
        self.args, self.console = args, console
        self.max_new_tokens, self.save_dtype = max_new_tokens, save_dtype
        self.output = pathlib.Path(args.output_dir)
        self.order = RowOrder(len(task.kept), prompts_per_step, args.seed)
        self.total_steps = args.max_steps
        if args.max_steps < 0:
            self.total_steps = max(1, int(np.ceil(args.num_train_epochs * self.order.steps_per_epoch)))
        self.watch = make_watchdog(args.process_timeout)  # a no-op watchdog until training starts
        batch_builder = task.batch_builder
        if processes.count() > 1:
            batch_builder = dataclasses.replace(
                batch_builder, process_shard=self._with_wait_marked(batch_builder.process_shard)
            )
        self.profile_steps = read_steps("profile_steps", args.profile_steps, self.total_steps)
        self.profile_steps = self.profile_steps if processes.is_first() else []
        self.schedule = make_schedule(args, self.total_steps)
        self.optimizer = make_optimizer(args, self.total_steps)
        self.graph, params = task.graph, task.params
        self.task = dataclasses.replace(
            task, batch_builder=batch_builder, params=None
        )  # the state alone owns what steps donate
        placement = merge(self.graph, params).placement
        shardings = None
        if placement is not None:
            kept = jax.tree.map(lambda x: x.sharding, params)
            shardings = TrainState(kept, optimizer_shardings(self.optimizer, params, kept))
        self._shardings = shardings
        self._init_optimizer = jax.jit(self.optimizer.init, out_shardings=shardings and shardings.optimizer)
        self.state = TrainState(params, None)
        self.run_id = ""  # tells the checkpoints of one run from those of others in the same folder
        self.step = Step(task.loss, self.optimizer, shardings, placement and placement.put_rows)
        self.run = describe_run(args, task.digests, len(task.kept), prompts_per_step, batch_size, task.without_effect)
        agreement.assert_same_across_processes(
            "the settings or the data", {k: v for k, v in self.run.items() if k not in IGNORED_ON_RESUME}
        )
        self._trained = False
        self.nonfinite = NonFiniteCounter()
        self.unmeasured = False  # whether an evaluation was due after the last update and cut short
        self.done = 0
        self.history: list[dict[str, Any]] = []

    def train(self, resume: str | None = None) -> dict[str, float]:
        """Runs all updates and saves the student to `output_dir`; returns the closing metrics.

        A second call trains again, from the parameters as they are: optimizer, schedule and order of rows begin anew. A
        run that Ctrl-C or SIGTERM ends saves a checkpoint; `resume` goes on from one, as `--resume_from_checkpoint`
        does. What it refuses leaves all as it was.

        Raises:
            FileNotFoundError, ValueError: as `find_and_restore`.
            Preempted: SIGTERM came.
            Diverged: `max_skipped_updates` updates in a row were left out.
            OSError: the student cannot be written; the text says where it still is.
        """
        if processes.is_first():
            self.output.mkdir(parents=True, exist_ok=True)
        with make_watchdog(self.args.process_timeout) as self.watch:
            self.checkpoints = Checkpoints(
                self.args.checkpoint_dir or self.output, limit=self.args.save_total_limit, say=self._say
            )
            try:
                return self._train(resume)
            finally:
                self.checkpoints.close()

    def _train(self, resume: str | None) -> dict[str, float]:
        args = self.args
        means = RunningMean()
        found = self._find(resume) if resume else None
        self._begin()
        unmeasured = False
        if found is None:
            self._start_anew()
        else:
            unmeasured = self._go_on(*found, means)
        self.checkpoints.remove_unfinished()
        begun = [row for row in self.history if row["step"] == 0]
        before = begun[0] if begun else self.evaluate() if args.eval_on_start and self.done == 0 else {}
        with self._log() as log:
            if before and not begun:
                self._record(log, before)
            if unmeasured and self.done < self.total_steps:
                self._record(log, self.evaluate())
            with SignalHandler() as stop:
                try:
                    self._updates(log, means, stop)
                except KeyboardInterrupt:
                    if stop.interrupted_twice:
                        raise
                    stop.request("interrupt")
                if stop.requested:
                    self._leave(log, means, stop)
            self._save_student()  # before anything else is measured: whatever goes wrong then, this is not lost
            after = self.evaluate() if self.task.eval is not None else {}
            if after:
                self._record(log, after)
        self._close(before, after)
        return after

    def _begin(self) -> None:
        """Forgets what an earlier `train` left, but for the parameters."""
        if self._trained and self.task.restart is not None:
            self.task.restart()
        self._trained = True
        self.state = self.state._replace(optimizer=None)  # let go of before another one is made
        self.done, self.nonfinite, self.unmeasured, self.history = 0, NonFiniteCounter(), False, []

    def _start_anew(self) -> None:
        """A run's state before its first update: the parameters as they are, all else new."""
        self.state = TrainState(self.state.params, self._init_optimizer(self.state.params))
        release_freed_memory()
        self.run_id = uuid.uuid4().hex
        if not processes.is_first():
            return
        self._set_logs_aside()
        old = sorted(path.name for path in checkpoints_in(self.checkpoints.folder))
        if old:
            shown = ", ".join(old[:3]) + (f" and {len(old) - 3} more" if len(old) > 3 else "")
            self._say(
                f"{self.checkpoints.folder} holds checkpoints of an earlier run ({shown}): one of this run replaces that of the "
                "same step, --save_total_limit counts them too, and --resume_from_checkpoint latest passes them over."
            )
        self._record_run_id()

    def _record_run_id(self) -> None:
        """Writes down whose logs and checkpoints these are from now on, where they lie."""
        for folder in (self.output, self.checkpoints.folder):
            set_current_run(folder, self.run_id)

    def _set_logs_aside(self) -> None:
        """Renames the logs of another run in `output_dir`, and says so."""
        logs = [name for name in LOGS if (self.output / name).exists()]
        for name, earlier in zip(logs, earlier_names(self.output, logs)):
            os.replace(self.output / name, self.output / earlier)
            self._say(f"Renamed {name} of another run in {self.output} to {earlier}.")

    def _log(self) -> MetricLog:
        """Where metrics go; nowhere in all processes but the first."""
        if not processes.is_first():
            return MetricLog(None)
        return MetricLog(self.output / "metrics.jsonl", self.console, make_trackers(self.args.report_to, self.args))

    def _updates(self, log: MetricLog, means: RunningMean, stop: SignalHandler) -> None:
        args, total = self.args, self.total_steps
        log_every, eval_every, save_every = (
            args.interval(name, total) for name in ("logging_steps", "eval_steps", "save_steps")
        )
        per_epoch = self.order.steps_per_epoch
        batch = stop.interruptible(self._build_batch, self.done) if self.done < total else None
        since, tokens, table_due = time.perf_counter(), 0, 0
        for step in self._steps(log):
            if batch is None:  # asked to end
                return
            with annotate(DISPATCH):
                self.state, metrics = self.step.train(self.state, self.task.constants, batch.batches)
                current, self.done = batch, step + 1
            # The device works on this update; the host meanwhile draws up the next one.
            batch = stop.interruptible(self._build_batch, step + 1) if step + 1 < total else None
            with annotate(WAITING):
                self.watch.at(step + 1, beats.WAITING)
                jax.block_until_ready(metrics["loss"])

            learning_rate = float(self.schedule(step - self.nonfinite.total))  # an update that is left out takes none
            self.nonfinite.add(metrics.pop("skipped"))
            means.add({**metrics, **{k: v for k, v in current.stats.items() if k != "tokens"}})
            tokens += current.stats["tokens"]
            due = self.done % log_every == 0 or self.done == total or (step == 0 and args.logging_first_step)
            if due:
                now = time.perf_counter()
                speed = {"tokens_per_second": tokens / (now - since), "learning_rate": learning_rate}
                skipped = {"skipped": self.nonfinite.total} if self.nonfinite.total else {}
                self._record(log, {**means.take(), **speed, **skipped})
                since, tokens = now, 0
            if self.nonfinite.in_a_row >= args.max_skipped_updates:
                self._give_up(log, means, metrics, step)
            if current.samples and args.log_completions and processes.is_first():
                self._keep(current.samples)
                if step >= table_due:
                    table_due = step - step % args.log_completions_steps + args.log_completions_steps
                    log.flush()
                    completions_table(self.console, current.samples, args.num_completions_to_print, step=self.done)
            ends = self.done % per_epoch == 0
            self.unmeasured = (
                self._due(args.eval_strategy, eval_every, ends) and self.done < total and self.task.eval is not None
            )
            if self.unmeasured:
                measured = stop.interruptible(self.evaluate)
                if measured is not None:
                    self._record(log, measured)
                    self.unmeasured = False
                since, tokens = time.perf_counter(), 0
            stop.poll_preemption(self.done)
            if stop.requested:
                return
            if self._due(args.save_strategy, save_every, ends) and self.done < total:
                self._checkpoint(log, means)
                since, tokens = time.perf_counter(), 0
            self.checkpoints.poll()

    def _with_wait_marked(self, process_shard: ProcessShard) -> ProcessShard:
        """A share whose exchanges the watch knows of: who comes first there waits for the others."""

        def waited(exchange: Callable) -> Callable:
            def exchanged(values):
                with self.watch.waiting():
                    return exchange(values)

            return exchanged

        return process_shard._replace(
            all_reduce_sum=waited(process_shard.all_reduce_sum),
            all_reduce_max=waited(process_shard.all_reduce_max),
            all_gather=waited(process_shard.all_gather),
        )

    def _steps(self, log: MetricLog) -> Iterable[int]:
        """The updates that are left, those of `profile_steps` traced."""
        steps = range(self.done, self.total_steps)
        if not self.profile_steps:
            return steps
        # Looked up by name, and only here: the core does not depend on what reads its traces.
        profiling = importlib.import_module("gold_jax.profiling")
        folder = self.output / "profile"

        def report(summary):
            log.flush()
            profiling.print_summary(self.console, summary, folder)

        return profiling.trace_steps(
            steps, self.profile_steps, folder, block=lambda: jax.block_until_ready(self.state), report=report
        )

    def _find(self, wanted: str) -> tuple[Any, dict[str, Any], Any] | None:
        """The checkpoint to go on from, as `find_and_restore` gives it, its arrays as a `TrainState`."""
        self.state = self.state._replace(optimizer=None)  # of an earlier `train`: no run goes on from it
        shapes = self._shapes()
        abstract = self._named_for_checkpoints(shapes)
        folder = self.checkpoints.folder
        found = find_and_restore(wanted, folder, self.run, abstract, self._say, self.total_steps)
        agreement.assert_same_across_processes(
            "the checkpoint that they go on from", None if found is None else str(found[0])
        )
        if found is None:
            return None
        path, metadata, arrays = found
        parts = shapes._asdict().items()
        return (
            path,
            metadata,
            TrainState(
                *(jax.tree.unflatten(jax.tree.structure(part), jax.tree.leaves(arrays[name])) for name, part in parts)
            ),
        )

    def _go_on(self, path: Any, metadata: Mapping[str, Any], state: TrainState, means: RunningMean) -> bool:
        """Puts the run where a checkpoint was saved; returns whether an evaluation was due there and not made."""
        self.state = state
        self.done, self.nonfinite = metadata["step"], NonFiniteCounter(**metadata["skips"])
        means.restore(metadata["means"])
        self.checkpoints.read(path)
        self.run_id = metadata.get("run_id", "")
        if processes.is_first():
            if (current_run(self.output) or "") == self.run_id:
                self.history, _ = (
                    truncate_log(self.output / name, self.done, ended=self.done == self.total_steps) for name in LOGS
                )
            else:  # the logs are of another run than the checkpoint
                self._set_logs_aside()
            self._record_run_id()
        self._say(f"Resumed from {path}: {self.done} of {self.total_steps} updates are done.")
        return metadata["unmeasured"]

    def _shapes(self) -> TrainState:
        """The state that a run begins with, as shapes with their shardings."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state.params)
        optimizer = jax.eval_shape(self.optimizer.init, params)
        if self._shardings is None:
            here = jax.tree.leaves(params)[0].sharding
            shardings = jax.tree.map(lambda _: here, optimizer)
        else:
            shardings = self._shardings.optimizer
        placed = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), optimizer, shardings)
        return TrainState(params, placed)

    def _named_for_checkpoints(self, state: TrainState) -> dict[str, Any]:
        """A state, or its shapes, as checkpoints name it: a parameter, and what the optimizer keeps of one, ends with `.value`."""

        def boxed(x):
            return {"value": x}

        optimizer = optax.tree.map_params(self.optimizer, boxed, state.optimizer)
        return {"params": jax.tree.map(boxed, state.params), "optimizer": optimizer}

    @annotate(SAVING)
    def _checkpoint(self, log: MetricLog, means: RunningMean) -> None:
        """Begins to save all that the run needs to go on; the device goes on meanwhile."""
        self.watch.at(self.done, "saving a checkpoint")
        log.flush()  # no line up to here may be missing where the run goes on
        student = None
        if jax.process_count() == 1:
            host = jax.tree.map(lambda x: np.array(x), self.state.params)  # a copy: steps donate what is on the device
            model = merge(self.graph, host)
            student = functools.partial(
                save_final_model, model, self.task.student.chat_tokenizer.tokenizer, dtype=self.save_dtype
            )
        metadata = {
            "run": self.run,
            "run_id": self.run_id,
            "means": means.state(),
            "skips": self.nonfinite.state(),
            "unmeasured": self.unmeasured,
        }
        self.checkpoints.save(self.done, self._named_for_checkpoints(self.state), metadata, student)

    def _leave(self, log: MetricLog, means: RunningMean, stop: SignalHandler) -> None:
        """Saves and ends the run, as Ctrl-C or SIGTERM asked for."""
        log.flush()
        what = "Interrupted" if stop.requested == "interrupt" else "Preempted"
        if self.done:
            self._checkpoint(log, means)
        saved = self.checkpoints.finish() and self.done > 0
        outcome = f"the student and all that the run needs to go on are saved in {self.checkpoints.last}"
        if not saved:
            outcome = f"the last checkpoint is {self.checkpoints.last}" if self.checkpoints.last else "nothing is saved"
        further = " --resume_from_checkpoint latest goes on." if self.checkpoints.last else ""
        self._say(f"{what} after {self.done} updates; {outcome}.{further}")
        raise KeyboardInterrupt if stop.requested == "interrupt" else Preempted

    def _give_up(self, log: MetricLog, means: RunningMean, metrics: Mapping[str, Any], step: int) -> None:
        log.flush()
        rows = [self.task.kept[i] for i in self.order(step)]
        why = describe_divergence(self.done, self.nonfinite, metrics, self.state.params, rows, self.args)
        if self.nonfinite.total < self.done:  # the state of the last good update, to go on from with other settings
            self.nonfinite = NonFiniteCounter(self.nonfinite.total)
            self._checkpoint(log, means)
        self.checkpoints.finish()
        raise Diverged(why + (f" The last checkpoint is {self.checkpoints.last}." if self.checkpoints.last else ""))

    def _save_student(self) -> None:
        self.watch.at(self.done, "saving the student")
        self.checkpoints.finish()
        try:
            self.save(self.output)
        except OSError as error:
            last = self.checkpoints.last
            still = f"its last checkpoint is {last}" if last else "no checkpoint of it was saved"
            raise OSError(
                f"the student could not be saved in {self.output} ({describe_error(error)}) after {self.done} updates; {still}. Make "
                "room, then run the same command with --resume_from_checkpoint latest."
            ) from error

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def _due(self, strategy: str, every: int, epoch_ends: bool) -> bool:
        return strategy == "epoch" and epoch_ends or strategy == "steps" and self.done % every == 0

    def _build_batch(self, step: int):
        self.watch.at(step, "making the batch")
        examples = [self.task.train[self.task.kept[i]] for i in self.order(step)]
        return self.task.batch_builder.build(step, examples, self.state.params)

    @annotate(EVALUATION)
    def evaluate(self) -> dict[str, float]:
        """`eval_loss`, `eval_bits_per_byte`, and with `predict_with_generate` `eval_exact_match`, on the evaluation rows."""
        self.watch.at(self.done, "evaluating")
        if self.task.eval is None:
            raise ValueError(
                "there is no data to evaluate on: give an eval_dataset, or --eval_strategy and a test split"
            )
        examples = with_text_completion(self.task.eval)
        if not examples:
            raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
        totals: dict[str, float] = {}
        for batch in self.task.batch_builder.build_evaluation(examples):
            for name, value in self.step.evaluate(self.state.params, self.task.constants, batch).items():
                totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + plain_value(value)
        return totals | measures(self.student, examples, self.args, self.max_new_tokens)

    def copy_model(self) -> Decoder:
        """A copy of the student's model as it stands now, whose arrays nobody else holds."""
        student = self.student.model
        return student.replace(jax.tree.map(jnp.copy, split(student)[1]))

    @property
    def student(self) -> LoadedModel:
        """The student as it stands now, to be used at once: the next update takes its arrays."""
        return self.task.student._replace(model=merge(self.graph, self.state.params))

    @annotate(SAVING)
    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the student as it stands now, with its tokenizer, so that transformers opens the folder."""
        return save_final_model(
            self.student.model, self.task.student.chat_tokenizer.tokenizer, folder, dtype=self.save_dtype
        )

    def _record(self, log: MetricLog, values: Mapping[str, Any]) -> None:
        epoch = round(self.done / self.order.steps_per_epoch, 4)
        plain = {name: plain_value(value) for name, value in values.items()}
        self.history.append({"step": self.done, "epoch": epoch, **plain})
        log.log(self.done, plain, epoch=epoch)

    def _keep(self, samples: Sequence[tuple[str, str]]) -> None:
        with open(self.output / "completions.jsonl", "a", encoding="utf-8") as file:
            for prompt, completion in samples:
                row = {"step": self.done, "prompt": prompt, "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _close(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.console.print(f"{self.done} updates done; {self.step.compiled} programs compiled for them.")
        if not after:
            return
        teacher = self.task.teacher_score() if self.task.teacher_score else {}
        names = [n for n in after if n in ("eval_loss", "eval_bits_per_byte", "eval_exact_match")]
        before_after(
            self.console,
            [(n.removeprefix("eval_").replace("_", " "), before.get(n), after[n], teacher.get(n)) for n in names],
        )
