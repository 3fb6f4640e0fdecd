"""The training loop, from top to bottom: what happens in a run, whatever is learned."""

import collections
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput, speed_metrics

from gold_jax import progress
from gold_jax.config import SFTConfig
from gold_jax.cpu import release_freed_memory
from gold_jax.distributed import watchdog
from gold_jax.distributed.consensus import assert_same_across_processes, raise_in_all_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.loading import LoadedModel
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge, split
from gold_jax.rollout.engine import NonFiniteLogits
from gold_jax.scoring import greedy_completions, score_completions, share_alike
from gold_jax.step_ranges import read_steps
from gold_jax.text.checks import with_text_completion
from gold_jax.text.data import Example
from gold_jax.text.process_shard import ProcessShard
from gold_jax.text.stream import RowStream, StreamOrder
from gold_jax.training import checkpointing, utilization
from gold_jax.training.annotations import DISPATCH, EVALUATION, SAVING, WAITING, annotate
from gold_jax.training.batches import RowOrder, UpdateBatch
from gold_jax.training.build import Run
from gold_jax.training.callbacks import Callbacks
from gold_jax.training.export import save_final_model
from gold_jax.training.folder_lock import locked
from gold_jax.training.logging import (
    MetricLog,
    RunningMean,
    before_after,
    completions_table,
    named_measures,
    plain_value,
    trl_names,
)
from gold_jax.training.nonfinite import Diverged, NonFiniteCounter, describe_divergence
from gold_jax.training.resume import EVALUATED, IGNORED_ON_RESUME, LOGS, find_and_restore, rename_logs, truncate_log
from gold_jax.training.rollout_buffer import Rollouts, to_bytes
from gold_jax.training.run_summary import RunSummary
from gold_jax.training.signals import InterruptedTwice, Preempted, SignalHandler
from gold_jax.training.step import TrainState, init_state, state_shapes
from gold_jax.training.trackers import make_trackers
from gold_jax.wording import listed

_SAVED = "the student and all that the run needs to go on are saved in"


class Data(NamedTuple):
    """The rows that a run learns from and is measured on."""

    train: Sequence[Example] | RowStream
    eval: Sequence[Example] | Mapping[str, Sequence[Example]] | None  # several sets by their names
    order: RowOrder | StreamOrder  # of those that can be learned from
    description: dict[str, Any]  # all that the run's updates depend on, fit for JSON, for its checkpoints

    def total_steps(self, args: SFTConfig) -> int:
        """Updates of the whole run: `max_steps`, or as many as `num_train_epochs` are. ValueError: 2**31 or more."""
        flag = "max_steps" if args.max_steps >= 0 else "num_train_epochs"
        steps = max(1, math.ceil(args.num_train_epochs * self.order.steps_per_epoch))
        steps = args.max_steps if args.max_steps >= 0 else steps
        if steps >= 2**31:
            most = "at most 2**31 - 1 can be counted"
            raise ValueError(f"--{flag} is {getattr(args, flag):g}, which is {steps:.3g} updates; {most}")
        return steps


class _Measured(NamedTuple):
    """What `metric_for_best_model` was after an update."""

    metric: float
    step: int


class Loop:
    """One training run, made of what `build_run` gives; its parameters must not be used elsewhere: updates donate them.

    `student` has name and tokenizer, `max_new_tokens` bounds greedy completions in evaluation, `teacher_score` measures
    the teacher on the evaluation rows, `restart` is called before each further training of the same student. The
    console is a quiet one in all processes but the first.
    """

    def __init__(
        self,
        run: Run,
        student: LoadedModel,
        data: Data,
        args: SFTConfig,
        console: Console,
        max_new_tokens: int,
        teacher_score: Callable[[], Mapping[str, float]] | None = None,
        restart: Callable[[], Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        summary: RunSummary | None = None,
    ):
        self.args, self.console, self.data, self.total_steps = args, console, data, data.total_steps(args)
        self.say = functools.partial(console.print, markup=False, soft_wrap=not console.is_terminal)
        self._rollout_batches = getattr(args, "rollout_batches", 1)
        self.max_new_tokens, self.save_dtype = max_new_tokens, args.model_init_kwargs.get("dtype", "float32")
        self.output = pathlib.Path(args.output_dir)
        self.watchdog = Watchdog(args.process_timeout)  # a no-op until training starts
        batches = run.batches
        if jax.process_count() > 1:
            batches = dataclasses.replace(batches, process_shard=self._with_wait_marked(batches.process_shard))
        profiled = read_steps("profile_steps", args.profile_steps, self.total_steps)
        self.profile_steps = profiled if is_main_process() else []
        self.state = TrainState(run.params, None)  # the optimizer's state once `train` was called; steps donate it
        self.run = run._replace(batches=batches, params=None)  # the state alone owns what steps donate
        self._student, self._teacher_score, self._restart = student, teacher_score, restart
        self.run_id = ""  # tells the checkpoints of one run from those of others in the same folder
        # How often: of a run that goes on from an older checkpoint, tells the newer ones from those left behind.
        self.resumed = 0
        compared = {k: v for k, v in data.description.items() if k not in IGNORED_ON_RESUME}
        assert_same_across_processes("the settings or the data", compared)
        self._trained, self._log, self._compute_metrics = False, None, compute_metrics
        self._summary = summary or RunSummary(None)
        self._reset()
        held = dict(optimizer=run.optimizer, lr_scheduler=run.schedule)
        held |= dict(processing_class=student.chat_tokenizer.tokenizer, say=self.say)
        self.callbacks = Callbacks(callbacks, args, self.trainer_state, lambda: self.student.model, **held)
        self.callbacks.call("on_init_end")

    def _reset(self) -> None:
        """Forgets what an earlier `train` left, but for the parameters."""
        self.state = self.state._replace(optimizer=None)  # let go of before another one is made
        self.done, self.nonfinite = 0, NonFiniteCounter(0, 0)  # updates so far, and those of them that were left out
        if isinstance(self.data.order, StreamOrder):
            self.data.order.restart()
        self.history: list[dict[str, Any]] = []  # every logged line, oldest first
        self._progress = self._new_progress()
        # For the model card: measures of the student before and after training, and of the teacher.
        self.results: dict[str, Mapping[str, float]] = {}
        self._means, self._compiled_logged = RunningMean(), progress.compiled()
        self._bar = progress.Task("training", self.total_steps)
        self._unwritten: list[dict[str, Any]] = []  # completions of the last update that are not in their file
        self._losses: list[float] = []  # of the updates made since `train` began
        self.shapes: Sequence = ()  # that batches are padded to, up to the last update's
        self.rollouts: Rollouts = {}  # drawn up to the last update, for later ones
        self.unmeasured = False  # whether an evaluation was due after the last update and is not made
        self._evaluated: tuple[int, Mapping[str, float]] | None = (
            None  # the update of the last evaluation, and its measures
        )
        self._newest: _Measured | None = None  # the last evaluation, by `metric_for_best_model`
        self._best_saved: _Measured | None = None  # the best of those whose update is saved
        self._measured = self.data.description.get(EVALUATED)  # a digest of the rows measured before the first update

    # the run

    def train(self, resume: str | None = None) -> TrainOutput:
        """Runs all updates and saves the student; returns updates, the mean loss of those made now, closing metrics.

        A second call trains again, from the parameters as they are: optimizer, schedule and order of rows are new. A
        run that Ctrl-C or SIGTERM ends saves a checkpoint; `resume` continues from one, as `--resume_from_checkpoint`
        does. What it refuses leaves all as it was.

        Raises:
            FileNotFoundError, ValueError: as `find_and_restore`.
            Preempted: SIGTERM came.
            Diverged: `max_skipped_updates` updates in a row were left out, or the student's logits are not finite.
            OSError: the student cannot be written; the text says where it still is.
        """
        args, began = self.args, time.time()
        folder = args.checkpoint_dir or self.output
        with (
            Watchdog(args.process_timeout) as self.watchdog,
            self._locked_folders(),
            contextlib.closing(checkpointing.Checkpoints(folder, args.save_total_limit, self.say)) as self.checkpoints,
        ):
            found = self._find_checkpoint(resume) if resume else None
            if self._trained and self._restart is not None:
                self._restart()
            self._trained = True
            self._reset()
            if found is None:
                self._start()
            else:
                self._resume(*found)
            self.checkpoints.remove_unfinished()
            part = self._summary.part(self.run_id, self.total_steps, lambda: self.done, resumed=found is not None)
            with part, self._open_log() as self._log:
                self.callbacks.call("on_train_begin")
                before = self._evaluate_before()
                updates = progress.task("training", self.total_steps, self.done)
                with SignalHandler(self._say_stopping) as signals, updates as self._bar:
                    try:
                        self._updates_until_stopped(signals)
                    except InterruptedTwice:
                        self.checkpoints.abandon()
                        last = self.checkpoints.last
                        kept = f"the last checkpoint is {last}" if last else "nothing is saved"
                        self.say(f"Interrupted again after {self.done} updates, before they were saved; {kept}.")
                        raise
                if isinstance(self.data.order, StreamOrder):
                    for line in self.data.order.checker.notices():
                        self.say(f"Of the rows that were read: {line}")
                # Before anything else is measured: whatever goes wrong then, this is not lost.
                if args.save_strategy != "no" and self.checkpoints.finish() and not self._is_saved():
                    self._save_checkpoint()
                    self.callbacks.call("on_save")
                self._save_student()
                after = {}
                if self.data.eval is not None:
                    stopped_after_one = self._evaluated is not None and self._evaluated[0] == self.done
                    after = self._evaluated[1] if stopped_after_one else self._evaluate_and_record()
                    if self._load_best():
                        after = self.evaluate()
                self.callbacks.call("on_train_end")
            self._log = None
            self._show_result(before, after)
        loss = float(np.mean(self._losses)) if self._losses else float("nan")
        rows, updates = len(self._losses) * self.data.order.per_step, len(self._losses)
        metrics = {**after, **speed_metrics("train", began, num_samples=rows, num_steps=updates)}
        metrics |= {"train_loss": loss, "train_compiled_programs": self.run.step.compiled}
        if (held := utilization.peak_memory()) is not None:
            metrics["train_peak_memory_bytes"] = held
        return TrainOutput(self.done, loss, metrics)

    def _say_stopping(self, reason: str) -> None:
        again = "; Ctrl-C again ends at once" if reason == "interrupt" else ""
        self._bar.rename(f"stopping after this update{again}")

    def _updates_until_stopped(self, signals: SignalHandler) -> None:
        """All updates; what ends them early has the last one saved."""
        try:
            self._updates(signals)
        except KeyboardInterrupt:
            if signals.interrupted_twice or jax.process_count() > 1:  # to save takes all processes
                raise
            signals.request("interrupt")
        except Diverged:
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # what ends the run is the first error
                self._save_before_error()
            if isinstance(error, NonFiniteLogits) and self.done:
                help = f"a lower --learning_rate than {self.args.learning_rate:g}; --max_grad_norm 1"
                why = f"After {self.done} updates no completions can be drawn, so the run stops: {error}"
                last = f" The last checkpoint is {self.checkpoints.last}." if self.checkpoints.last else ""
                raise Diverged(f"{why} What may help: {help}.{last}") from error
            raise
        if signals.requested:
            self._leave(signals)

    @contextlib.contextmanager
    def _locked_folders(self) -> Iterator[None]:
        """Makes and holds this run's local folders, in the first process; all end where one is another run's."""
        folders, failed = {"output_dir": self.output}, None
        if self.args.checkpoint_dir and "://" not in self.args.checkpoint_dir:
            folders["checkpoint_dir"] = pathlib.Path(self.args.checkpoint_dir)
        with contextlib.ExitStack() as held:
            try:
                for name, folder in folders.items() if is_main_process() else ():
                    folder.mkdir(parents=True, exist_ok=True)
                    if name == "output_dir" or not folder.samefile(self.output):
                        held.enter_context(locked(folder, f"--{name}"))
            except (ValueError, OSError) as error:
                failed = error
            raise_in_all_processes("the folders of the run", failed)
            yield

    def _updates(self, signals: SignalHandler) -> None:
        """Build batch, step, log, evaluate, save, stop."""
        run, args, total = self.run, self.args, self.total_steps
        self._restart_clock()
        self._table_due = 0
        batch = signals.interruptible(self._build_batch, self.done) if self.done < total else None
        per_epoch, first = self.data.order.steps_per_epoch, self.done
        for step in self._steps():
            if batch is None:  # a signal came while it was built
                return
            if step == first or step % per_epoch == 0:
                self.callbacks.call("on_epoch_begin")
            self.callbacks.call("on_step_begin")
            with annotate(DISPATCH):  # asynchronous: returns before it is computed
                if batch.counted:
                    self.state, metrics = run.step(self.state, batch.batches)
                else:
                    self.state, metrics = run.step.skip(self.state)
                    self.say(f"Update {step + 1} is left out: nothing in its rows counts in the loss.")
                current, self.done, self.shapes, self.rollouts = batch, step + 1, batch.shapes, batch.drawn
                self._bar.reach(self.done)
            # While the device computes this update, the host prepares the next one.
            failed = None
            try:
                batch = signals.interruptible(self._build_batch, step + 1) if step + 1 < total else None
            except Exception as error:  # raised below, when this update is logged
                batch, failed = None, error
            with annotate(WAITING):
                self.watchdog.report(step + 1, watchdog.WAITING)
                jax.block_until_ready(metrics["loss"])
            line = self._take_in(step, current, metrics)
            self.callbacks.call("on_step_end")
            ends_epoch = self.done % per_epoch == 0 or self.done == total
            if ends_epoch:
                self.callbacks.call("on_epoch_end")
            self.callbacks.agree()
            control = self.callbacks.control
            if control.should_log or self.done == total:
                self._log_update(line)
            if self.nonfinite.in_a_row >= args.max_skipped_updates:
                self._give_up(metrics, step, current.counted)
            if current.samples and args.log_completions and is_main_process():
                self._log_completions(step, current.samples)
            # At the end it is made anyway: only the best of a longer run has to know of it.
            closes = self.done == total
            self.unmeasured = control.should_evaluate and not (closes and args.metric_for_best_model is None)
            if failed is not None:
                raise failed
            if self.unmeasured and not closes:
                measured = signals.interruptible(self.evaluate)
                if measured is not None:
                    self.unmeasured = False
                    self._take_evaluation(measured)
                    self.callbacks.agree()
                self._restart_clock()
            signals.poll_preemption(self.done)
            control = self.callbacks.control
            ends = control.should_training_stop  # with a --save_strategy the end is saved behind the loop
            if control.should_save and not (signals.requested or (ends and args.save_strategy != "no")):
                self._save_checkpoint()
                self.callbacks.call("on_save")
                self._restart_clock()
            if self.callbacks.control.should_training_stop or signals.requested:
                if not (ends_epoch or signals.requested):
                    self.callbacks.call("on_epoch_end")
                if self.done < total or signals.requested:
                    return  # of the last update the steps end by themselves, so that a trace of it is reported
            self.checkpoints.poll()

    def _build_batch(self, step: int) -> UpdateBatch:
        self.watchdog.report(step, "making the batch")
        given, together = (step, self._examples(step), self.state.params, self.shapes), self._rollout_batches
        if together == 1:
            return self.run.batches.build(*given)
        later = range(step + 1, min(step - step % together + together, self.total_steps))
        return self.run.batches.build(*given, self.rollouts, {t: self._examples(t) for t in later})

    def _examples(self, step: int) -> list[Example]:
        order, train = self.data.order, self.data.train
        if isinstance(order, StreamOrder):
            return [example for _, example in order.take(step)]
        return [train[i] for i in order(step)]

    def _interval(self, name: str) -> int:
        return self.args.interval(name, self.total_steps)

    def _steps(self) -> Iterable[int]:
        """The updates that are left, those of `profile_steps` traced."""
        steps = range(self.done, self.total_steps)
        if not self.profile_steps:
            return steps
        # Looked up by name, and only here: the core does not depend on what reads its traces.
        profiling, folder = importlib.import_module("gold_jax.profiling"), self.output / "profile"

        def report(summary):
            self._log.flush()
            profiling.print_summary(self.console, summary, folder)

        block = lambda: jax.block_until_ready(self.state)  # noqa: E731
        return profiling.trace_steps(steps, self.profile_steps, folder, block=block, report=report)

    def _with_wait_marked(self, shard: ProcessShard) -> ProcessShard:
        """A shard whose collectives tell the watchdog that this process waits for the others."""

        def waited(exchange: Callable) -> Callable:
            def exchanged(values):
                with self.watchdog.waiting():
                    return exchange(values)

            return exchanged

        names = "all_reduce_sum", "all_reduce_max", "all_gather"
        return shard._replace(**{name: waited(getattr(shard, name)) for name in names})

    def _new_progress(self) -> TrainerState:
        per_epoch, size = self.data.order.steps_per_epoch, self.args.per_device_train_batch_size
        intervals = {name: self._interval(name) for name in ("logging_steps", "eval_steps", "save_steps")}
        totals = dict(max_steps=self.total_steps, num_train_epochs=math.ceil(self.total_steps / per_epoch))
        main = is_main_process()
        first = dict(is_world_process_zero=main, is_local_process_zero=main, train_batch_size=size)
        return TrainerState(**totals, **intervals, **first)

    def trainer_state(self) -> TrainerState:
        """Where the run stands, in transformers' form; `log_history` is the run's own."""
        epoch = self.done / self.data.order.steps_per_epoch
        return dataclasses.replace(self._progress, global_step=self.done, epoch=epoch, log_history=self.history)

    def _note(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)

    # logging

    def _open_log(self) -> MetricLog:
        """Where metrics go; nowhere in all processes but the first."""
        if not is_main_process():
            return MetricLog(None)
        trackers = make_trackers(self.args.report_to, self.args)
        in_notebook = self.console.is_jupyter and not self.args.disable_tqdm
        return MetricLog(self.output / LOGS[0], self.console, trackers, self.total_steps, in_notebook)

    def _take_in(self, step: int, batch: UpdateBatch, metrics: dict[str, Any]) -> dict[str, float]:
        """Adds the metrics of an update to the means of the next log line; returns those that are logged as they are."""
        rate = {}
        if self.run.schedule is not None:  # an update that is left out takes none
            rate["learning_rate"] = float(self.run.schedule(step - self.nonfinite.total))
        self.nonfinite = NonFiniteCounter(*map(int, self.state.nonfinite))
        if not metrics.pop("skipped"):
            self._losses.append(float(metrics["loss"]))
        held = {k: v for k, v in batch.stats.items() if k != "tokens"}
        self._means.add({**metrics, **held} if batch.counted else held)  # where nothing counts there is no loss
        share = held.get("on_policy")
        if batch.counted and share in (0.0, 1.0):  # the loss of an update of both kinds is not known by kind
            self._means.add({"on_policy_loss" if share else "off_policy_loss": metrics["loss"]})
        self._tokens += batch.stats["tokens"]
        self._note(num_input_tokens_seen=self._progress.num_input_tokens_seen + int(batch.stats["tokens"]))
        return rate

    def _log_update(self, rate: Mapping[str, float]) -> None:
        """Logs the means since the last line."""
        compiling = progress.compiled()[1] - self._compiled_before  # seconds, left out of the rate
        worked = max(time.perf_counter() - self._since - compiling, 1e-9)
        speed = self._tokens / worked
        speed = {"tokens_per_second": speed, **utilization.device_metrics(self.run.flops * speed), **rate}
        skipped = {"skipped": self.nonfinite.total} if self.nonfinite.total else {}
        now = progress.compiled()
        counted, seconds = (new - old for new, old in zip(now, self._compiled_logged))
        speed |= {"programs_compiled": counted, "compiling_seconds": round(seconds, 3)}
        self._compiled_logged = now
        means = self._means.take()
        seen = {"num_tokens": self._progress.num_input_tokens_seen}
        self.record({**means, **speed, **skipped, **trl_names(means), **seen})
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Starts the time, and the count of tokens, that `tokens_per_second` is of."""
        self._since, self._tokens, self._compiled_before = time.perf_counter(), 0, progress.compiled()[1]

    def record(self, values: Mapping[str, Any], event: str | None = None) -> None:
        """Logs a line and calls `on_log`, then the callbacks of `event` with the same metrics.

        Outside of `train` the line goes to `history` alone.
        """
        epoch = round(self.done / self.data.order.steps_per_epoch, 4)
        plain = {name: plain_value(value) for name, value in values.items()}
        self.history.append({"step": self.done, "epoch": epoch, **plain})
        if self._log is not None:
            self._log.log(self.done, plain, epoch=epoch, left=self._bar.left)
        self.callbacks.call("on_log", logs=dict(self.history[-1]))
        if event is not None:
            self.callbacks.call(event, metrics=values)

    def _log_completions(self, step: int, samples: Sequence[tuple[str | list[dict], str, str | None]]) -> None:
        """Appends what the student wrote to `completions.jsonl`, and shows some of it where that is due."""
        rows = [(self._student.chat_tokenizer.render(prompt), *rest) for prompt, *rest in samples]
        named = ({"prompt": p, "completion": c} | ({} if r is None else {"reference": r}) for p, c, r in rows)
        self._write_completions([{"step": self.done, **row} for row in named])
        every = self.args.log_completions_steps
        if step >= self._table_due:
            self._table_due = step - step % every + every
            self._log.flush()
            shown = [row[:2] for row in rows]
            completions_table(self.console, shown, self.args.num_completions_to_print, step=self.done)

    def _write_completions(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows to `completions.jsonl`; where that fails, checkpoints keep them, and a resumed run writes them."""
        path, self._unwritten = self.output / LOGS[1], rows
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {checkpointing.describe_error(error)}") from error
        self._unwritten = []

    # evaluation

    def evaluate(self, examples: Sequence[Example] | None = None) -> dict[str, float]:
        """`eval_loss`, `eval_bits_per_byte`, and with `predict_with_generate` `eval_exact_match`.

        `examples` None: the evaluation rows; of several sets of them, each is measured by itself, as `eval_NAME_loss` and so on.
        """
        rows = self.data.eval if examples is None else examples
        if isinstance(rows, Mapping):
            return named_measures({name: self.evaluate(part) for name, part in rows.items()})
        return self.predict(rows, self.args.predict_with_generate).metrics

    @annotate(EVALUATION)
    def predict(self, examples: Sequence[Example] | None, writes: bool = True) -> PredictionOutput:
        """The measures of `evaluate` on one set of rows, and with `writes` the student's greedy completions and the rows' own."""
        self.watchdog.report(self.done, "evaluating")
        if examples is None and self.data.eval is None:
            give = "give an eval_dataset, or --eval_strategy and a test split"
            raise ValueError(f"there is no data to evaluate on: {give}")
        examples = with_text_completion(self.data.eval if examples is None else examples)
        if not examples:
            raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
        data, totals = self.run.batches.build_evaluation(examples), collections.defaultdict(float)
        for batch, text in progress.track(list(zip(data.batches, data.text)), "evaluating"):
            for name, value in self.run.step.evaluate(self.state.params, batch, text).items():
                totals[f"eval_{name}"] += plain_value(value)
            self.callbacks.call("on_prediction_step")
        bits, size, student = totals.pop("eval_text_nll") / np.log(2), data.bytes, self.student
        rows = self.args.per_device_eval_batch_size * self.run.batches.process_shard.num_shards
        if data.rest:
            rest, chunk = [examples[i] for i in data.rest], chunk_size(self.args.loss_chunk, student.model.platform)
            score = score_completions(student, None, rest, batch_size=rows, chunk=chunk)
            bits, size = bits + score.bits.sum(), size + score.bytes.sum()
        totals["eval_bits_per_byte"] = float(bits / size) if size else float("nan")
        texts = None, None
        if writes:
            options = dict(max_new_tokens=self.max_new_tokens, batch_size=rows)
            texts = greedy_completions(student, examples, **options)
            totals["eval_exact_match"] = share_alike(*texts)
            if self._compute_metrics is not None:
                found = self._compute_metrics(EvalPrediction(*texts))
                totals |= {f"eval_{name.removeprefix('eval_')}": plain_value(value) for name, value in found.items()}
        return PredictionOutput(*texts, dict(totals))

    def _evaluate_and_record(self) -> dict[str, float]:
        metrics = self.evaluate()
        self._take_evaluation(metrics)
        return metrics

    def _take_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Logs an evaluation and notes whether it is the best so far.

        Callbacks come first, and find the best one before it in the state, as in transformers.
        """
        self._evaluated = self.done, metrics
        self.record(metrics, "on_evaluate")
        if (wanted := self.args.metric_for_best_model) is None:
            return
        name = f"eval_{wanted.removeprefix('eval_')}"
        if name not in metrics:
            measures = ", ".join(metrics)
            raise ValueError(
                f"--metric_for_best_model is {wanted!r}, which no evaluation measures; there are {measures}"
            )
        self._newest = _Measured(float(metrics[name]), self.done)
        if self._is_better(self._newest.metric, self._progress.best_metric):
            self._note(best_metric=self._newest.metric, best_global_step=self.done)
        if self._is_saved():
            self._mark_best()

    def _is_better(self, value: float, best: float | None) -> bool:
        if best is None or not (math.isfinite(value) and math.isfinite(best)):
            return math.isfinite(value)
        return value > best if self.args.greater_is_better else value < best

    def _mark_best(self) -> None:
        """Notes the checkpoint of the last update, which then stays, where it is the best of those saved."""
        newest, best = self._newest, self._best_saved
        if newest is None or newest.step != self.done or not self._is_better(newest.metric, best and best.metric):
            return
        self._best_saved = newest
        self._note(best_model_checkpoint=str(self.checkpoints.folder / f"checkpoint-{self.done}"))
        self.checkpoints.best.clear()
        self.checkpoints.best.add(self.done)

    def _load_best(self) -> bool:
        """With `load_best_model_at_end`, replaces the parameters by those of the best checkpoint; whether it did."""
        args, best, path = self.args, self._best_saved, self._progress.best_model_checkpoint
        if not args.load_best_model_at_end or path is None or best is None or self._newest is None:
            return False
        if best.step == self.done or not self._is_better(best.metric, self._newest.metric):
            return False
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state.params)
        abstract = {"params": jax.tree.map(lambda x: {"value": x}, shapes)}
        try:
            arrays = checkpointing.restore(path, checkpointing.read_metadata(path), abstract)
        except checkpointing.BadCheckpoint as error:
            last = f"{self.output} holds the student of the last update"
            raise ValueError(f"--load_best_model_at_end: {path} is not whole: {error}; {last}") from None
        params = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(arrays))
        self.state = self.state._replace(params=params)
        self.say(f"The best of all is {path} ({args.metric_for_best_model} {best.metric:g}).")
        self._save_student()
        return True

    def _evaluate_before(self) -> Mapping[str, float]:
        """The measures before the first update where they are requested, or as the log of a resumed run has them."""
        rows = self.history if self._measured == self.data.description.get(EVALUATED) else ()
        before = next((row for row in rows if row.get("step") == 0), {})
        if not before and self.args.eval_on_start and self.done == 0:
            before = self.evaluate()
            self.record(before)
        due = self.unmeasured and self.data.eval is not None
        if due and self.done < self.total_steps:  # an evaluation that was due at the checkpoint
            self._evaluate_and_record()
        return before

    def _show_result(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        counts = (self.done, "update"), (self.run.step.compiled, "program")
        updates, programs = (f"{n} {name}{'' if n == 1 else 's'}" for n, name in counts)
        self.console.print(f"{updates} done; {programs} compiled.")
        if not after:
            return
        teacher = self._teacher_score() if self._teacher_score else {}
        measured = {name: value for name, value in before.items() if name.startswith("eval_")}
        self.results = {"before training": measured, "after training": after, "teacher": teacher}
        self._summary.add(results=self.results)
        sets = [f"eval_{name}_" for name in self.data.eval] if isinstance(self.data.eval, Mapping) else ["eval_"]
        names = [s + n for s in sets for n in ("loss", "bits_per_byte", "exact_match") if s + n in after]
        rows = [(n[5:].replace("_", " "), before.get(n), after[n], teacher.get(n)) for n in names]
        before_after(self.console, rows)

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
        return self._save_model(self.student.model, folder)

    def _save_model(self, model: Decoder, folder: str | pathlib.Path) -> pathlib.Path:
        tokenizer = self._student.chat_tokenizer
        trained = dict(stop_ids=tokenizer.stop_ids, chat_template=tokenizer.template.portable)
        return save_final_model(model, tokenizer.tokenizer, folder, dtype=self.save_dtype, **trained)

    def _save_student(self) -> None:
        self.watchdog.report(self.done, "saving the student")
        try:
            with progress.task("saving the student"):
                self.checkpoints.finish()
                self.save(self.output)
        except OSError as error:
            last, why = self.checkpoints.last, checkpointing.describe_error(error)
            still = f"its last checkpoint is {last}" if last else "no checkpoint of it was saved"
            failed = f"the student could not be saved in {self.output} ({why}) after {self.done} updates; {still}"
            again = "with --resume_from_checkpoint latest" if last else "again"
            raise OSError(f"{failed}. Make room, then run the same command {again}.") from error

    # checkpoints

    def _start(self) -> None:
        """A run's state before its first update: the parameters as they are, all else new."""
        self.state = init_state(self.run.optimizer, self.state.params, self.run.shardings)
        release_freed_memory()
        self.run_id, self.resumed = uuid.uuid4().hex, 0
        if not is_main_process():
            return
        rename_logs(self.output, self.say)
        folder = self.checkpoints.folder
        if old := sorted(path.name for path in checkpointing.checkpoints_in(folder)):
            kept = "one of this run replaces that of the same step, --save_total_limit counts them too"
            over = "and --resume_from_checkpoint latest passes them over."
            self.say(f"{folder} holds checkpoints of an earlier run ({listed(old, 3)}): {kept}, {over}")
        checkpointing.set_current_run(self.run_id, self.output, folder)

    def _find_checkpoint(self, wanted: str) -> tuple[Any, dict[str, Any], TrainState] | None:
        """The checkpoint to resume from: its path, metadata and state."""
        self.state = self.state._replace(optimizer=None)  # of an earlier `train`, which no run resumes
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state.params)
        shapes = state_shapes(self.run.optimizer, params)
        abstract, folder = self._named_for_checkpoints(shapes), self.checkpoints.folder
        found = find_and_restore(wanted, folder, self.data.description, abstract, self.say, self.total_steps)
        assert_same_across_processes("the checkpoint that they go on from", None if found is None else str(found[0]))
        if found is None:
            return None
        path, metadata, arrays = found
        boxed = jax.tree.leaves((arrays["params"], arrays["optimizer"]))
        params, optimizer = jax.tree.unflatten(jax.tree.structure((shapes.params, shapes.optimizer)), boxed)
        counts, shapes = (metadata["step"], NonFiniteCounter(**metadata["skips"])), (shapes.step, shapes.nonfinite)
        counts = jax.tree.map(lambda count, x: jax.device_put(np.int32(count), x.sharding), counts, shapes)
        return path, metadata, TrainState(params, optimizer, *counts)

    def _resume(self, path: Any, metadata: Mapping[str, Any], state: TrainState) -> None:
        """Puts the run where a checkpoint was saved."""
        if isinstance(self.data.order, StreamOrder):
            self.data.order.resume(metadata["step"], metadata["stream"])
        self.state = state
        self.checkpoints.go_on_from(path)
        self.done, self.nonfinite = metadata["step"], NonFiniteCounter(**metadata["skips"])
        self.unmeasured, self.run_id = metadata["unmeasured"], metadata.get("run_id", "")
        self.resumed = metadata.get("resumed", 0) + 1
        self._measured = metadata["run"].get(EVALUATED, self._measured)
        self._note(num_input_tokens_seen=metadata.get("num_tokens", 0))
        if (best := metadata.get("best")) is not None:
            self._best_saved = _Measured(**best.get("saved", {"metric": best["metric"], "step": best["step"]}))
            where = str(path.parent / f"checkpoint-{self._best_saved.step}")
            self._note(best_metric=best["metric"], best_global_step=best["step"], best_model_checkpoint=where)
            self.checkpoints.best.add(self._best_saved.step)
        self._means.restore(metadata["means"])
        self.shapes, self.rollouts = metadata.get("shapes", ()), metadata.get("rollouts", {})
        if is_main_process():
            if (checkpointing.current_run(self.output) or "") == self.run_id:
                metrics, completions = (self.output / name for name in LOGS)
                again = self.done == self.total_steps or (self.unmeasured and self.data.eval is not None)
                self.history = truncate_log(metrics, self.done, ended=again)
                unwritten = metadata.get("unwritten", [])
                truncate_log(completions, self.done - bool(unwritten))
                if unwritten:
                    self._write_completions(unwritten)
            else:  # the logs are of another run than the checkpoint
                rename_logs(self.output, self.say)
            checkpointing.set_current_run(self.run_id, self.output, self.checkpoints.folder)
        self.say(f"Resumed from {path}: {self.done} of {self.total_steps} updates are done.")

    def _named_for_checkpoints(self, state: TrainState) -> dict[str, Any]:
        """A state, or its shapes, under the names of checkpoints: parameters, and moments of them, end with `.value`."""

        def boxed(x):
            return {"value": x}

        optimizer = optax.tree.map_params(self.run.optimizer, boxed, state.optimizer)
        return {"params": jax.tree.map(boxed, state.params), "optimizer": optimizer}

    @annotate(SAVING)
    def _save_checkpoint(self) -> None:
        """Begins to save all that is needed to resume; asynchronous, the device keeps computing."""
        self.watchdog.report(self.done, "saving a checkpoint")
        self._log.flush()  # a resumed run continues the log from here
        write_student = None
        if jax.process_count() == 1:
            host = jax.tree.map(np.array, self.state.params)  # a copy: steps donate what is on the device
            model = merge(self.run.graph, host)
            write_student = lambda folder: self._save_model(model, folder)  # noqa: E731
        self._mark_best()
        measured = {} if self._measured is None else {EVALUATED: self._measured}
        metadata = {"run": self.data.description | measured, "run_id": self.run_id, "resumed": self.resumed}
        metadata |= {"means": self._means.state(), "shapes": self.shapes}
        if isinstance(self.data.order, StreamOrder):
            metadata["stream"] = self.data.order.position(self.done)
        metadata |= {"unwritten": self._unwritten} if self._unwritten else {}
        metadata |= {"skips": self.nonfinite._asdict(), "unmeasured": self.unmeasured}
        metadata |= {"num_tokens": self._progress.num_input_tokens_seen}
        if self._best_saved is not None:
            best = {"metric": self._progress.best_metric, "step": self._progress.best_global_step}
            metadata["best"] = best | {"saved": self._best_saved._asdict()}
        given = self.done, self._named_for_checkpoints(self.state), metadata, write_student
        self.checkpoints.save(*given, to_bytes(self.rollouts) if self.rollouts else None)

    def _leave(self, signals: SignalHandler) -> None:
        """Saves and ends the run, as Ctrl-C or SIGTERM asked for."""
        self._log.flush()
        interrupted = signals.requested == "interrupt"
        with progress.task("saving a checkpoint"):
            self.checkpoints.finish()
            if self.done and not self._is_saved():
                self._save_checkpoint()
                self.checkpoints.finish()
        saved, last = self._is_saved(), self.checkpoints.last
        where = f"the last checkpoint is {last}" if last else "nothing is saved"
        where = f"{_SAVED} {last}" if saved else where
        further = " --resume_from_checkpoint latest goes on." if last else ""
        self.say(f"{'Interrupted' if interrupted else 'Preempted'} after {self.done} updates; {where}.{further}")
        raise KeyboardInterrupt if interrupted else Preempted

    def _is_saved(self) -> bool:
        """Whether the newest whole checkpoint is of the last update."""
        last = self.checkpoints.last
        return last is not None and last.name == f"checkpoint-{self.done}"

    def _save_before_error(self) -> None:
        """Saves the last update where something else than the updates ends the run: a row, a log, a server."""
        gone = any(x.is_deleted() for x in jax.tree.leaves(self.state))
        self.checkpoints.finish()
        if jax.process_count() > 1 or gone or self._is_saved() or not self.done:
            return
        self._log.flush()
        self.nonfinite = NonFiniteCounter(*map(int, self.state.nonfinite))
        self._save_checkpoint()
        if self.checkpoints.finish():
            where = f"{_SAVED} {self.checkpoints.last}. --resume_from_checkpoint latest goes on."
            self.say(f"An error ends the run after {self.done} updates; {where}")

    def _give_up(self, metrics: Mapping[str, Any], step: int, counted: int) -> None:
        self._log.flush()
        seen = self.done, self.nonfinite, metrics, self.state.params, self.data.order(step)
        why = describe_divergence(*seen, self.args, counted)
        if self.nonfinite.total < self.done:  # the state of the last good update, to resume from with other settings
            self.nonfinite = self.nonfinite._replace(in_a_row=0)
            self._save_checkpoint()
        self.checkpoints.finish()
        raise Diverged(why + (f" The last checkpoint is {self.checkpoints.last}." if self.checkpoints.last else ""))
