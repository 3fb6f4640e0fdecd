"""The training loop, from top to bottom: what happens in a run, whatever is learned."""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
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
from rich.console import Console
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from gold_jax.config import SFTConfig
from gold_jax.cpu import release_freed_memory
from gold_jax.distributed import watchdog
from gold_jax.distributed.consensus import assert_same_across_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.loading import LoadedModel
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.scoring import evaluate_model
from gold_jax.step_ranges import read_steps
from gold_jax.text.checks import with_text_completion
from gold_jax.text.data import Example
from gold_jax.text.process_shard import ProcessShard
from gold_jax.training.annotations import DISPATCH, EVALUATION, SAVING, WAITING, annotate
from gold_jax.training.batches import RowOrder, UpdateBatch
from gold_jax.training.build import Run
from gold_jax.training.callbacks import Callbacks
from gold_jax.training.checkpointing import Checkpoints, checkpoints_in, current_run, describe_error, set_current_run
from gold_jax.training.export import save_final_model
from gold_jax.training.logging import MetricLog, RunningMean, plain_value
from gold_jax.training.nonfinite import Diverged, NonFiniteCounter, describe_divergence
from gold_jax.training.resume import IGNORED_ON_RESUME, describe_run, earlier_names, find_and_restore, truncate_log
from gold_jax.training.signals import Preempted, SignalHandler
from gold_jax.training.step import TrainState
from gold_jax.training.tables import before_after, completions_table
from gold_jax.training.trackers import make_trackers

LOGS = ("metrics.jsonl", "completions.jsonl")


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows that a run learns from and is measured on.

    Attributes:
        train: all rows.
        kept: numbers of those that can be learned from.
        eval: rows to evaluate on, or None.
        rows_per_step: rows of the data that an update reads.
        batch_size: rows of a micro-batch, on all devices.
        seed: of their order.
        digests: of what the run depends on beside its settings, for checkpoints.
        without_effect: settings that have no effect beside the others.
    """

    train: Sequence[Example]
    kept: list[int]
    eval: Sequence[Example] | None
    rows_per_step: int
    batch_size: int
    seed: int
    digests: Mapping[str, str]
    without_effect: Collection[str] = ()

    @property
    def order(self) -> RowOrder:
        """Which of the kept rows each update reads."""
        return RowOrder(len(self.kept), self.rows_per_step, self.seed)

    def total_steps(self, args: SFTConfig) -> int:
        """Updates of the whole run: `max_steps`, or as many as `num_train_epochs` come to."""
        if args.max_steps >= 0:
            return args.max_steps
        return max(1, math.ceil(args.num_train_epochs * self.order.steps_per_epoch))

    def rows(self, step: int) -> list[int]:
        """Numbers of the rows of an update among all rows."""
        return [self.kept[i] for i in self.order(step)]


class Loop:
    """One training run.

    Attributes:
        run: step, batches and optimizer.
        data: its rows.
        history: every logged line of the last `train`, oldest first.
        state: the student's parameters and, once `train` was called, the optimizer's state. Steps donate it.
        done: updates so far.
        nonfinite: how many of them were left out, as Python ints.
    """

    def __init__(
        self,
        run: Run,
        student: LoadedModel,
        data: Data,
        args: SFTConfig,
        *,
        console: Console,
        max_new_tokens: int,
        teacher_score: Callable[[], Mapping[str, float]] | None = None,
        restart: Callable[[], Any] | None = None,
        callbacks: Sequence[Any] | None = None,
    ):
        """Sets a run up; computes nothing.

        Args:
            run: what `build_run` gives. Its parameters must not be used elsewhere, because updates donate them.
            student: name and tokenizer of the student; its model is in `run`.
            data: the rows.
            args: the settings.
            console: where it prints; a quiet one in all processes but the first.
            max_new_tokens: bounds greedy completions in evaluation.
            teacher_score: measures the teacher on the evaluation rows.
            restart: called before each further training of the same student.
            callbacks: transformers' `TrainerCallback`s.
        """
        self.args, self.console, self.data = args, console, data
        self.max_new_tokens, self.save_dtype = max_new_tokens, args.model_init_kwargs.get("dtype", "float32")
        self.output = pathlib.Path(args.output_dir)
        self.order, self.total_steps = data.order, data.total_steps(args)
        self.watchdog = Watchdog(args.process_timeout)  # a no-op until training starts
        batches = run.batches
        if jax.process_count() > 1:
            batches = dataclasses.replace(batches, process_shard=self._with_wait_marked(batches.process_shard))
        self.profile_steps = read_steps("profile_steps", args.profile_steps, self.total_steps)
        self.profile_steps = self.profile_steps if is_main_process() else []
        self.state = TrainState(run.params, None)
        self.run = run._replace(batches=batches, params=None)  # the state alone owns what steps donate
        self._student, self._teacher_score, self._restart = student, teacher_score, restart
        self.run_id = ""  # tells the checkpoints of one run from those of others in the same folder
        self.description = describe_run(
            args.to_dict(), data.digests, len(data.kept), data.rows_per_step, data.batch_size, data.without_effect
        )
        assert_same_across_processes(
            "the settings or the data", {k: v for k, v in self.description.items() if k not in IGNORED_ON_RESUME}
        )
        self._trained = False
        self._reset()
        self.callbacks = Callbacks(callbacks, args, self.trainer_state)
        self.callbacks.call("on_init_end")

    def _reset(self) -> None:
        """Forgets what an earlier `train` left, but for the parameters."""
        self.state = self.state._replace(optimizer=None)  # let go of before another one is made
        self.done, self.nonfinite, self.history = 0, NonFiniteCounter(0, 0), []
        self._means = RunningMean()
        self._losses: list[float] = []  # of the updates made since `train` began
        self.unmeasured = False  # whether an evaluation was due after the last update and cut short

    # the run

    def train(self, resume: str | None = None) -> dict[str, float]:
        """Runs all updates and saves the student to `output_dir`; returns the closing metrics.

        A second call trains again, from the parameters as they are: optimizer, schedule and order of rows are new. A
        run that Ctrl-C or SIGTERM ends saves a checkpoint; `resume` continues from one, as `--resume_from_checkpoint`
        does. What it refuses leaves all as it was.

        Raises:
            FileNotFoundError, ValueError: as `find_and_restore`.
            Preempted: SIGTERM came.
            Diverged: `max_skipped_updates` updates in a row were left out.
            OSError: the student cannot be written; the text says where it still is.
        """
        if is_main_process():
            self.output.mkdir(parents=True, exist_ok=True)
        with (
            Watchdog(self.args.process_timeout) as self.watchdog,
            contextlib.closing(self._open_checkpoints()) as self.checkpoints,
        ):
            found = self._find_checkpoint(resume) if resume else None
            if self._trained and self._restart is not None:
                self._restart()
            self._trained = True
            self._reset()
            if found is None:
                self._start_anew()
            else:
                self._go_on(*found)
            self.checkpoints.remove_unfinished()
            with self._open_log() as self._log:
                self.callbacks.call("on_train_begin")
                before = self._evaluate_before()
                with SignalHandler() as signals:
                    try:
                        self._updates(signals)
                    except KeyboardInterrupt:
                        if signals.interrupted_twice:
                            raise
                        signals.request("interrupt")
                    if signals.requested:
                        self._leave(signals)
                self._save_student()  # before anything else is measured: whatever goes wrong then, this is not lost
                after = self.evaluate() if self.data.eval is not None else {}
                if after:
                    self._record(after)
                    self.callbacks.call("on_evaluate", metrics=after)
                self.callbacks.call("on_train_end")
            self._show_result(before, after)
        return after

    def _updates(self, signals: SignalHandler) -> None:
        """Build batch, step, log, evaluate, save, stop."""
        run, args, total = self.run, self.args, self.total_steps
        self._since, self._tokens, self._table_due = time.perf_counter(), 0, 0
        batch = signals.interruptible(self._build_batch, self.done) if self.done < total else None
        for step in self._steps():
            if batch is None:  # a signal came while it was built
                return
            self.callbacks.call("on_step_begin")
            with annotate(DISPATCH):
                self.state, metrics = run.step(self.state, batch.batches)  # asynchronous: returns before it is computed
                current, self.done = batch, step + 1
            # While the device computes this update, the host prepares the next one.
            batch = signals.interruptible(self._build_batch, step + 1) if step + 1 < total else None
            with annotate(WAITING):
                self.watchdog.report(step + 1, watchdog.WAITING)
                jax.block_until_ready(metrics["loss"])
            self._log_update(step, current, metrics)
            self.callbacks.call("on_step_end")
            if self.nonfinite.in_a_row >= args.max_skipped_updates:
                self._give_up(metrics, step)
            if current.samples and args.log_completions and is_main_process():
                self._log_completions(step, current.samples)
            self.unmeasured = self.data.eval is not None and self._is_due("eval")
            if self.unmeasured:
                measured = signals.interruptible(self.evaluate)
                if measured is not None:
                    self._record(measured)
                    self.unmeasured = False
                    self.callbacks.call("on_evaluate", metrics=measured)
                self._restart_clock()
            signals.poll_preemption(self.done)
            if signals.requested or self.callbacks.stop:
                return
            if self._is_due("save"):
                self._save_checkpoint()
                self.callbacks.call("on_save")
                self._restart_clock()
            self.checkpoints.poll()

    def _build_batch(self, step: int) -> UpdateBatch:
        self.watchdog.report(step, "making the batch")
        return self.run.batches.build(step, [self.data.train[i] for i in self.data.rows(step)], self.state.params)

    def _is_due(self, what: str) -> bool:
        """Whether `eval` or `save` is due after the last update; at the end of the run both are made anyway."""
        strategy = getattr(self.args, f"{what}_strategy")
        if self.done >= self.total_steps or strategy not in ("epoch", "steps"):
            return False
        if strategy == "epoch":
            return self.done % self.order.steps_per_epoch == 0
        return self.done % self.args.interval(f"{what}_steps", self.total_steps) == 0

    def _steps(self) -> Iterable[int]:
        """The updates that are left, those of `profile_steps` traced."""
        steps = range(self.done, self.total_steps)
        if not self.profile_steps:
            return steps
        # Looked up by name, and only here: the core does not depend on what reads its traces.
        profiling = importlib.import_module("gold_jax.profiling")
        folder = self.output / "profile"

        def report(summary):
            self._log.flush()
            profiling.print_summary(self.console, summary, folder)

        return profiling.trace_steps(
            steps, self.profile_steps, folder, block=lambda: jax.block_until_ready(self.state), report=report
        )

    def _with_wait_marked(self, process_shard: ProcessShard) -> ProcessShard:
        """A shard whose collectives tell the watchdog that this process waits for the others."""

        def waited(exchange: Callable) -> Callable:
            def exchanged(values):
                with self.watchdog.waiting():
                    return exchange(values)

            return exchanged

        return process_shard._replace(
            all_reduce_sum=waited(process_shard.all_reduce_sum),
            all_reduce_max=waited(process_shard.all_reduce_max),
            all_gather=waited(process_shard.all_gather),
        )

    def trainer_state(self) -> TrainerState:
        """Where the run stands, in transformers' form."""
        return TrainerState(
            epoch=self.done / self.order.steps_per_epoch,
            global_step=self.done,
            max_steps=self.total_steps,
            num_train_epochs=math.ceil(self.total_steps / self.order.steps_per_epoch),
            logging_steps=self.args.interval("logging_steps", self.total_steps),
            eval_steps=self.args.interval("eval_steps", self.total_steps),
            save_steps=self.args.interval("save_steps", self.total_steps),
            train_batch_size=self.args.per_device_train_batch_size,
            log_history=[dict(row) for row in self.history],
            is_world_process_zero=is_main_process(),
        )

    def output_of(self, metrics: Mapping[str, float]) -> TrainOutput:
        """What `train` comes to, in transformers' form: the mean loss of the updates that were made, and closing metrics."""
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        return TrainOutput(self.done, loss, dict(metrics))

    # logging

    def _open_log(self) -> MetricLog:
        """Where metrics go; nowhere in all processes but the first."""
        if not is_main_process():
            return MetricLog(None)
        return MetricLog(self.output / "metrics.jsonl", self.console, make_trackers(self.args.report_to, self.args))

    def _log_update(self, step: int, batch: UpdateBatch, metrics: dict[str, Any]) -> None:
        """Takes in the metrics of an update; logs their means since the last line where a line is due."""
        rate = {}
        if self.run.schedule is not None:  # an update that is left out takes none
            rate["learning_rate"] = float(self.run.schedule(step - self.nonfinite.total))
        self.nonfinite = NonFiniteCounter(*map(int, self.state.nonfinite))
        if not metrics.pop("skipped"):
            self._losses.append(float(metrics["loss"]))
        self._means.add({**metrics, **{k: v for k, v in batch.stats.items() if k != "tokens"}})
        self._tokens += batch.stats["tokens"]
        every = self.args.interval("logging_steps", self.total_steps)
        first = step == 0 and self.args.logging_first_step
        if self.done % every == 0 or self.done == self.total_steps or first:
            seconds = time.perf_counter() - self._since
            speed = {"tokens_per_second": self._tokens / seconds, **rate}
            skipped = {"skipped": self.nonfinite.total} if self.nonfinite.total else {}
            self._record({**self._means.take(), **speed, **skipped})
            self._restart_clock()

    def _restart_clock(self) -> None:
        """Counts tokens a second from here."""
        self._since, self._tokens = time.perf_counter(), 0

    def _record(self, values: Mapping[str, Any]) -> None:
        epoch = round(self.done / self.order.steps_per_epoch, 4)
        plain = {name: plain_value(value) for name, value in values.items()}
        self.history.append({"step": self.done, "epoch": epoch, **plain})
        self._log.log(self.done, plain, epoch=epoch)
        self.callbacks.call("on_log", logs=dict(self.history[-1]))

    def _log_completions(self, step: int, samples: Sequence[tuple[str | list[dict], str]]) -> None:
        """Appends what the student wrote to `completions.jsonl`, and shows some of it where that is due."""
        samples = [(self._student.chat_tokenizer.render(prompt), completion) for prompt, completion in samples]
        with open(self.output / "completions.jsonl", "a", encoding="utf-8") as file:
            for prompt, completion in samples:
                row = {"step": self.done, "prompt": prompt, "completion": completion}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        every = self.args.log_completions_steps
        if step >= self._table_due:
            self._table_due = step - step % every + every
            self._log.flush()
            completions_table(self.console, samples, self.args.num_completions_to_print, step=self.done)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    # evaluation

    @annotate(EVALUATION)
    def evaluate(self) -> dict[str, float]:
        """`eval_loss`, `eval_bits_per_byte`, and with `predict_with_generate` `eval_exact_match`, on the evaluation rows."""
        self.watchdog.report(self.done, "evaluating")
        if self.data.eval is None:
            raise ValueError(
                "there is no data to evaluate on: give an eval_dataset, or --eval_strategy and a test split"
            )
        examples = with_text_completion(self.data.eval)
        if not examples:
            raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
        totals: dict[str, float] = {}
        for batch in self.run.batches.build_evaluation(examples):
            for name, value in self.run.step.evaluate(self.state.params, batch).items():
                totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + plain_value(value)
        return totals | evaluate_model(
            self.student,
            examples,
            batch_size=self.args.per_device_eval_batch_size,
            chunk=chunk_size(self.args.loss_chunk, self.student.model.platform),
            max_new_tokens=self.max_new_tokens if self.args.predict_with_generate else None,
        )

    def _evaluate_before(self) -> Mapping[str, float]:
        """The measures before the first update where they are requested, or as the log of a resumed run has them."""
        if logged := [row for row in self.history if row["step"] == 0]:
            before = logged[0]
        elif self.args.eval_on_start and self.done == 0:
            before = self.evaluate()
            self._record(before)
        else:
            before = {}
        if self.unmeasured and self.done < self.total_steps:  # an evaluation that was due at the checkpoint
            self._record(self.evaluate())
        return before

    def _show_result(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.console.print(f"{self.done} updates done; {self.run.step.compiled} programs compiled for them.")
        if not after:
            return
        teacher = self._teacher_score() if self._teacher_score else {}
        names = [n for n in after if n in ("eval_loss", "eval_bits_per_byte", "eval_exact_match")]
        before_after(
            self.console,
            [(n.removeprefix("eval_").replace("_", " "), before.get(n), after[n], teacher.get(n)) for n in names],
        )

    # the student

    def copy_model(self) -> Decoder:
        """A copy of the student's model as it stands now, with arrays of its own."""
        student = self.student.model
        return student.replace(jax.tree.map(jnp.copy, split(student)[1]))

    @property
    def student(self) -> LoadedModel:
        """The student as it stands now, to be used at once: the next update takes its arrays."""
        return self._student._replace(model=merge(self.run.graph, self.state.params))

    @annotate(SAVING)
    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the student as it stands now, with its tokenizer, so that transformers opens the folder."""
        tokenizer = self._student.chat_tokenizer.tokenizer
        return save_final_model(self.student.model, tokenizer, folder, dtype=self.save_dtype)

    def _save_student(self) -> None:
        self.watchdog.report(self.done, "saving the student")
        self.checkpoints.finish()
        try:
            self.save(self.output)
        except OSError as error:
            last = self.checkpoints.last
            still = f"its last checkpoint is {last}" if last else "no checkpoint of it was saved"
            raise OSError(
                f"the student could not be saved in {self.output} ({describe_error(error)}) after {self.done} updates; {still}. "
                "Make room, then run the same command with --resume_from_checkpoint latest."
            ) from error

    # checkpoints

    def _open_checkpoints(self) -> Checkpoints:
        folder = self.args.checkpoint_dir or self.output
        return Checkpoints(folder, limit=self.args.save_total_limit, say=self._say)

    def _start_anew(self) -> None:
        """A run's state before its first update: the parameters as they are, all else new."""
        self.state = self.run.init(self.state.params)
        release_freed_memory()
        self.run_id = uuid.uuid4().hex
        if not is_main_process():
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

    def _find_checkpoint(self, wanted: str) -> tuple[Any, dict[str, Any], TrainState] | None:
        """The checkpoint to resume from: its path, metadata and state."""
        self.state = self.state._replace(optimizer=None)  # of an earlier `train`, which no run resumes
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state.params)
        shapes = self.run.shapes(params)
        abstract = self._named_for_checkpoints(shapes)
        folder = self.checkpoints.folder
        found = find_and_restore(wanted, folder, self.description, abstract, self._say, self.total_steps)
        assert_same_across_processes("the checkpoint that they go on from", None if found is None else str(found[0]))
        if found is None:
            return None
        path, metadata, arrays = found
        params, optimizer = (
            jax.tree.unflatten(jax.tree.structure(getattr(shapes, part)), jax.tree.leaves(arrays[part]))
            for part in ("params", "optimizer")
        )
        scalars = metadata["step"], metadata["skips"]["total"], metadata["skips"]["in_a_row"]
        step, total, in_a_row = jax.device_put(
            tuple(np.int32(x) for x in scalars), (shapes.step.sharding, *(x.sharding for x in shapes.nonfinite))
        )
        return path, metadata, TrainState(params, optimizer, step, NonFiniteCounter(total, in_a_row))

    def _go_on(self, path: Any, metadata: Mapping[str, Any], state: TrainState) -> None:
        """Puts the run where a checkpoint was saved."""
        self.state = state
        self.done, self.nonfinite = metadata["step"], NonFiniteCounter(**metadata["skips"])
        self._means.restore(metadata["means"])
        self.unmeasured = metadata["unmeasured"]
        self.checkpoints.go_on_from(path)
        self.run_id = metadata.get("run_id", "")
        if is_main_process():
            if (current_run(self.output) or "") == self.run_id:
                self.history, _ = (
                    truncate_log(self.output / name, self.done, ended=self.done == self.total_steps) for name in LOGS
                )
            else:  # the logs are of another run than the checkpoint
                self._set_logs_aside()
            self._record_run_id()
        self._say(f"Resumed from {path}: {self.done} of {self.total_steps} updates are done.")

    def _record_run_id(self) -> None:
        """Writes the id of this run to the folders of its logs and checkpoints."""
        for folder in (self.output, self.checkpoints.folder):
            set_current_run(folder, self.run_id)

    def _set_logs_aside(self) -> None:
        """Renames the logs of another run in `output_dir`, and says so."""
        logs = [name for name in LOGS if (self.output / name).exists()]
        for name, earlier in zip(logs, earlier_names(self.output, logs)):
            os.replace(self.output / name, self.output / earlier)
            self._say(f"Renamed {name} of another run in {self.output} to {earlier}.")

    def _named_for_checkpoints(self, state: TrainState) -> dict[str, Any]:
        """A state, or its shapes, as checkpoints name it: a parameter, and what the optimizer keeps of one, ends with `.value`."""

        def boxed(x):
            return {"value": x}

        optimizer = optax.tree.map_params(self.run.optimizer, boxed, state.optimizer)
        return {"params": jax.tree.map(boxed, state.params), "optimizer": optimizer}

    @annotate(SAVING)
    def _save_checkpoint(self) -> None:
        """Begins to save all that is needed to resume; asynchronous, the device keeps computing."""
        self.watchdog.report(self.done, "saving a checkpoint")
        self._log.flush()  # a resumed run continues the log from here
        student = None
        if jax.process_count() == 1:
            host = jax.tree.map(lambda x: np.array(x), self.state.params)  # a copy: steps donate what is on the device
            tokenizer = self._student.chat_tokenizer.tokenizer
            student = functools.partial(save_final_model, merge(self.run.graph, host), tokenizer, dtype=self.save_dtype)
        metadata = {
            "run": self.description,
            "run_id": self.run_id,
            "means": self._means.state(),
            "skips": self.nonfinite._asdict(),
            "unmeasured": self.unmeasured,
        }
        self.checkpoints.save(self.done, self._named_for_checkpoints(self.state), metadata, student)

    def _leave(self, signals: SignalHandler) -> None:
        """Saves and ends the run, as Ctrl-C or SIGTERM asked for."""
        self._log.flush()
        what = "Interrupted" if signals.requested == "interrupt" else "Preempted"
        if self.done:
            self._save_checkpoint()
        saved = self.checkpoints.finish() and self.done > 0
        saved_in = f"the student and all that the run needs to go on are saved in {self.checkpoints.last}"
        if not saved:
            saved_in = (
                f"the last checkpoint is {self.checkpoints.last}" if self.checkpoints.last else "nothing is saved"
            )
        further = " --resume_from_checkpoint latest goes on." if self.checkpoints.last else ""
        self._say(f"{what} after {self.done} updates; {saved_in}.{further}")
        raise KeyboardInterrupt if signals.requested == "interrupt" else Preempted

    def _give_up(self, metrics: Mapping[str, Any], step: int) -> None:
        self._log.flush()
        rows = self.data.rows(step)
        why = describe_divergence(
            self.done,
            self.nonfinite,
            metrics,
            self.state.params,
            rows,
            limit=self.args.max_skipped_updates,
            learning_rate=self.args.learning_rate,
            max_grad_norm=self.args.max_grad_norm,
            bf16=self.args.bf16,
        )
        if self.nonfinite.total < self.done:  # the state of the last good update, to resume from with other settings
            self.nonfinite = self.nonfinite._replace(in_a_row=0)
            self._save_checkpoint()
        self.checkpoints.finish()
        raise Diverged(why + (f" The last checkpoint is {self.checkpoints.last}." if self.checkpoints.last else ""))
