"""The training loop, from top to bottom, the same for every trainer."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import EvalPrediction, PredictionOutput, TrainOutput, speed_metrics

from gold_jax import progress
from gold_jax.config import SFTConfig
from gold_jax.cpu import release_freed_memory
from gold_jax.distributed import watchdog
from gold_jax.distributed.consensus import assert_same_across_processes
from gold_jax.distributed.initialize import is_main_process
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.loading import LoadedModel
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.step_ranges import read_steps
from gold_jax.text.data import Example
from gold_jax.text.stream import StreamOrder
from gold_jax.training import checkpointing, utilization
from gold_jax.training.annotations import DISPATCH, SAVING, WAITING, annotate
from gold_jax.training.batches import UpdateBatch
from gold_jax.training.build import Run
from gold_jax.training.callbacks import Callbacks, weak_method
from gold_jax.training.evaluation import BestModel, Evaluator, TeacherMeasures, compared, over_sets
from gold_jax.training.export import save_final_model
from gold_jax.training.folder_lock import folders_locked
from gold_jax.training.logging import KEPT, MetricLog, before_after, completions_table, plain_value, trl_names
from gold_jax.training.resume import EVALUATED, IGNORED_ON_RESUME, LOGS, append_rows, begin_logs, continue_logs
from gold_jax.training.run_state import Data, RunState, find_checkpoint, trainer_state
from gold_jax.training.run_summary import RunSummary
from gold_jax.training.saving import Saver
from gold_jax.training.signals import SignalHandler
from gold_jax.training.step import TrainState, init_state
from gold_jax.training.trackers import make_trackers
from gold_jax.wording import plural


class Loop:
    """One training run.

    Args:
        run: what `build_run` returns. Updates donate its parameters, which must not be used elsewhere.
        student: its name and tokenizer.
        data: the rows.
        args: the settings.
        console: where to print; quiet in all processes but the first.
        max_new_tokens: most tokens of a greedy completion in evaluation.
        teacher: its name and tokenizer; None: there is none.
        callbacks, compute_metrics: as the trainers take them.
        summary: keeps `summary.json`; None: there is none.
    """

    def __init__(
        self,
        run: Run,
        student: LoadedModel,
        data: Data,
        args: SFTConfig,
        console: Console,
        max_new_tokens: int,
        teacher: LoadedModel | None = None,
        callbacks: Sequence[Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]] | None = None,
        summary: RunSummary | None = None,
    ):
        self.args, self.console, self.data, self.total_steps = args, console, data, data.total_steps(args)
        self.say = functools.partial(console.print, markup=False, soft_wrap=not console.is_terminal)
        self.output = pathlib.Path(args.output_dir)
        self.watchdog = Watchdog(args.process_timeout)  # replaced in `train`; until then a no-op
        batches = run.batches
        if jax.process_count() > 1:  # so that the watchdog knows when this process waits for the others
            shard = batches.process_shard.exchanging_within(lambda: self.watchdog.waiting())
            batches = dataclasses.replace(batches, process_shard=shard)
        profiled = read_steps("profile_steps", args.profile_steps, self.total_steps)
        self.profile_steps = profiled if is_main_process() else []
        self.state = TrainState(run.params, None)  # donated by every step; optimizer state from `train` on
        self.run = run._replace(batches=batches, params=None)  # `state` is the only owner of the parameters
        self._student, self._scores_groups = student, teacher is not None
        described = {k: v for k, v in data.description.items() if k not in IGNORED_ON_RESUME}
        assert_same_across_processes("the settings or the data", described)
        rows = args.per_device_eval_batch_size * batches.process_shard.num_shards
        self.teacher = None if teacher is None else TeacherMeasures(teacher, self.run, args, rows)
        self._evaluator = Evaluator(run.step, batches, rows, args.loss_chunk, max_new_tokens, compute_metrics)
        self._trained, self._log, self._summary = False, None, summary or RunSummary(None)
        self._reset()
        held = dict(optimizer=run.optimizer, lr_scheduler=run.schedule)
        held |= dict(processing_class=student.chat_tokenizer.tokenizer, say=self.say)
        self.callbacks = Callbacks(callbacks, args, weak_method(self.trainer_state), weak_method(self._model), **held)
        self.callbacks.call("on_init_end")

    def _reset(self) -> None:
        """Resets everything but the parameters for another `train`."""
        self.state = self.state._replace(optimizer=None)  # freed before another one is made
        if isinstance(self.data.order, StreamOrder):
            self.data.order.restart()
        best = BestModel(self.args.metric_for_best_model, self.args.greater_is_better)
        self.run_state = RunState(best, self.data.description.get(EVALUATED))
        self.history: list[dict[str, Any]] = []  # every logged line, oldest first
        # For the model card: metrics of the student before and after training, and of the teacher.
        self.results: dict[str, Mapping[str, float]] = {}
        self._bar, self._throughput = progress.Task("training", self.total_steps), utilization.Throughput()
        self._evaluated: tuple[int, Mapping[str, float]] | None = None  # the last evaluation, and after which update
        self._written: list[tuple[str, list[tuple[Example, str]]]] = []  # in it, for the first rows of each set

    @property
    def done(self) -> int:
        """Updates so far, skipped ones included."""
        return self.run_state.done

    def trainer_state(self) -> TrainerState:
        """The current state of the run as transformers has it; its `log_history` is not a copy."""
        return trainer_state(self.run_state, self.args, self.data, self.history)

    def train(self, resume: str | None = None) -> TrainOutput:
        """Runs all updates and saves the student.

        A second call trains again from the current parameters, with a new optimizer, schedule and order of rows. A run
        that Ctrl-C or SIGTERM ends saves a checkpoint; `resume` continues from one, as `--resume_from_checkpoint` does.
        A refused resume changes nothing.

        Returns:
            The number of updates, the mean loss of those made by this call, and the closing metrics.

        Raises:
            FileNotFoundError, ValueError: as `find_and_restore`.
            Preempted: SIGTERM came.
            Diverged: `max_skipped_updates` updates in a row were skipped, or the student's logits are not finite.
            OSError: the student cannot be written; the text names the checkpoint that holds it.
        """
        args, folder, began = self.args, self.args.checkpoint_dir or self.output, time.time()
        with (
            Watchdog(args.process_timeout) as self.watchdog,
            folders_locked(self.output, args.checkpoint_dir),
            self.data.background or contextlib.nullcontext(),
            contextlib.closing(checkpointing.Checkpoints(folder, args.save_total_limit, self.say)) as self.checkpoints,
        ):
            found = self._find_checkpoint(resume) if resume else None
            if self._trained and self.run.batches.engine is not None:
                self.run.batches.engine.restart()
            self._trained = True
            self._reset()
            if found is None:
                self._start()
            else:
                self._resume(*found)
            self.checkpoints.remove_unfinished()
            given = self.run_state.run_id, self.total_steps, lambda: self.done
            with self._summary.part(*given, resumed=found is not None), self._open_log() as self._log:
                held = self.checkpoints, self.run, self.run_state, self.data, args, self.output
                self._saver = Saver(*held, weak_method(self._save_model), self.watchdog, self.say)
                self.callbacks.call("on_train_begin")
                before = self._evaluate_before()
                updates = progress.task("training", self.total_steps, self.done)
                with SignalHandler(self._say_stopping) as signals, updates as self._bar:
                    with self._saver.saved_when_stopped(signals, lambda: self.state):
                        self._updates(signals)
                after = self._close()
                self.callbacks.call("on_train_end")
            self._log = None
            self._show_result(before, after)
        losses = self.run_state.losses
        loss, rows = float(np.mean(losses)) if losses else float("nan"), len(losses) * self.data.order.per_step
        metrics = {**after, **speed_metrics("train", began, num_samples=rows, num_steps=len(losses))}
        metrics |= {"train_loss": loss, "train_compiled_programs": self.run.step.compiled}
        if (held := utilization.peak_memory()) is not None:
            metrics["train_peak_memory_bytes"] = held
        return TrainOutput(self.done, loss, metrics)

    def _updates(self, signals: SignalHandler) -> None:
        """Build batch, step, log, evaluate, save, stop."""
        total, per_epoch, first = self.total_steps, self.data.order.steps_per_epoch, self.done
        self._throughput.restart()
        batch = signals.interruptible(self._build_batch, self.done) if self.done < total else None
        for step in self._steps():
            if batch is None:  # a signal came while it was built
                return
            if step == first or step % per_epoch == 0:
                self.callbacks.call("on_epoch_begin")
            self.callbacks.call("on_step_begin")
            current, metrics = batch, self._dispatch(step, batch)
            # While the device computes this update, the host prepares the next one.
            failed = None
            try:
                batch = signals.interruptible(self._build_batch, step + 1) if step + 1 < total else None
            except Exception as error:  # raised below, when this update is logged
                batch, failed = None, error
            with annotate(WAITING):
                self.watchdog.report(step + 1, watchdog.WAITING)
                jax.block_until_ready(metrics["loss"])
            self._bar.reach(self.done)
            ends_epoch = self.done % per_epoch == 0 or self.done == total
            self._report(step, current, metrics, ends_epoch)
            if failed is not None:
                raise failed
            self._evaluate_and_save(signals)
            if self.callbacks.control.should_training_stop or signals.requested:
                if not (ends_epoch or signals.requested):
                    self.callbacks.call("on_epoch_end")
                if self.done < total or signals.requested:
                    return  # after the last update the loop ends by itself, so that its trace is reported
            self.checkpoints.poll()

    @annotate(DISPATCH)
    def _dispatch(self, step: int, batch: UpdateBatch) -> dict[str, Any]:
        """Starts an update, and returns its metrics before they are computed."""
        if batch.counted:
            self.state, metrics = self.run.step(self.state, batch.batches)
        else:
            self.state, metrics = self.run.step.skip(self.state)
            self.say(f"Update {step + 1} is skipped: nothing in its rows counts in the loss.")
        self.run_state.advance(batch)
        return metrics

    def _report(self, step: int, batch: UpdateBatch, metrics: dict[str, Any], ends_epoch: bool) -> None:
        """Logs an update where that is due; ends the run where it is one of too many that were skipped."""
        now, schedule, closes = self.run_state, self.run.schedule, self.done == self.total_steps
        made = step - now.nonfinite.total  # skipped updates do not advance the schedule
        rate = {} if schedule is None else {"learning_rate": float(schedule(made))}
        now.take(batch, metrics, self.state.nonfinite)
        self._throughput.add(batch.stats["tokens"])
        self.callbacks.call("on_step_end")
        if ends_epoch:
            self.callbacks.call("on_epoch_end")
        self.callbacks.agree()
        control = self.callbacks.control
        if control.should_log or closes:
            self._log_update(rate)
        if now.nonfinite.in_a_row >= self.args.max_skipped_updates:
            self._saver.give_up(self.state, metrics, self.data.order(step), batch.counted)
        if batch.samples and self.args.log_completions and is_main_process():
            self._log_completions(step, batch.samples)
        # The closing evaluation is made in any case; only the choice of the best checkpoint needs this one too.
        now.measure_later(control.should_evaluate and not (closes and self.args.metric_for_best_model is None))

    def _evaluate_and_save(self, signals: SignalHandler) -> None:
        """Evaluates and saves where that is due after an update; what a signal cuts short is due later."""
        now = self.run_state
        if now.unmeasured and self.done < self.total_steps:
            measured = signals.interruptible(self.evaluate)
            if measured is not None:
                now.measure_later(False)
                self._take_evaluation(measured)
                self.callbacks.agree()
            self._throughput.restart()
        signals.poll_preemption(self.done)
        control = self.callbacks.control
        ends = control.should_training_stop  # with a --save_strategy `_close` saves the end
        if control.should_save and not (signals.requested or (ends and self.args.save_strategy != "no")):
            self._saver.checkpoint(self.state)
            self.callbacks.call("on_save")
            self._throughput.restart()

    def _close(self) -> Mapping[str, float]:
        """After the updates: saves, the closing evaluation, the best student. Returns the metrics of that student."""
        for line in self.data.closing_notices():
            self.say(line)
        # Saved before the closing evaluation, which may fail.
        if self.args.save_strategy != "no" and self.checkpoints.finish() and not self._saver.is_saved():
            self._saver.checkpoint(self.state)
            self.callbacks.call("on_save")
        self._saver.student(self.student.model)
        if self.data.eval is None:
            return {}
        stopped_after_one = self._evaluated is not None and self._evaluated[0] == self.done
        after = self._evaluated[1] if stopped_after_one else self._take_evaluation(self.evaluate())
        if (params := self._saver.best_params(self.state.params)) is None:
            return after
        self.state = self.state._replace(params=params)
        self._saver.student(self.student.model)
        return self.evaluate()

    # start

    def _start(self) -> None:
        """The state before the first update: the current parameters, all else new."""
        self.state = init_state(self.run.step.optimizer, self.state.params, self.run.shardings)
        release_freed_memory()
        if is_main_process():
            begin_logs(self.run_state.run_id, self.output, self.checkpoints.folder, self.say)

    def _find_checkpoint(self, wanted: str) -> tuple[Any, dict[str, Any], TrainState] | None:
        """The checkpoint to resume from: its path, metadata and state."""
        self.state = self.state._replace(optimizer=None)  # of an earlier `train`; not needed any more
        given = self.data.description, self.state.params, self.run.optimizer, self.say, self.total_steps
        return find_checkpoint(wanted, self.checkpoints.folder, *given)

    def _resume(self, path: Any, metadata: Mapping[str, Any], state: TrainState) -> None:
        """Restores the state of the run from a checkpoint."""
        self.state, now = state, self.run_state.restored(metadata, self.data, path.parent)
        self.run_state = now
        self.checkpoints.go_on_from(path)
        if now.best.saved is not None:
            self.checkpoints.best.add(now.best.saved.step)
        if is_main_process():
            again = self.done == self.total_steps or (now.unmeasured and self.data.eval is not None)
            given = now.run_id, self.done, metadata.get("unwritten", []), again
            self.history = continue_logs(*given, self.output, self.checkpoints.folder, self.say)
        self.say(f"Resumed from {path}: {self.done} of {self.total_steps} updates are done.")

    # build batch, step

    def _build_batch(self, step: int) -> UpdateBatch:
        self.watchdog.report(step, "making the batch")
        for line in self.data.poll_check():
            self.say(line)
        now, together = self.run_state, self.run.batches.rollout_batches
        given = step, self._examples(step), self.state.params, now.shapes
        if together == 1:
            return self.run.batches.build(*given)
        later = range(step + 1, min(step - step % together + together, self.total_steps))
        return self.run.batches.build(*given, now.rollouts, {t: self._examples(t) for t in later})

    def _examples(self, step: int) -> list[Example]:
        order, train = self.data.order, self.data.train
        if isinstance(order, StreamOrder):
            return [example for _, example in order.take(step)]
        return [train[i] for i in order(step)]

    def _steps(self) -> Iterable[int]:
        """The remaining updates; those of `profile_steps` are traced."""
        steps = range(self.done, self.total_steps)
        if not self.profile_steps:
            return steps
        # Imported by name, and only here: the core does not depend on `profiling`.
        profiling, folder = importlib.import_module("gold_jax.profiling"), self.output / "profile"

        report = functools.partial(profiling.print_summary, self.console, folder=folder)
        block = lambda: jax.block_until_ready(self.state)  # noqa: E731
        return profiling.trace_steps(steps, self.profile_steps, folder, block=block, report=report)

    # log

    def _open_log(self) -> MetricLog:
        """The log of metrics; processes but the first write none."""
        if not is_main_process():
            return MetricLog(None)
        trackers = make_trackers(self.args.report_to, self.args)
        in_notebook = self.console.is_jupyter and not self.args.disable_tqdm
        return MetricLog(self.output / LOGS[0], self.console, trackers, self.total_steps, in_notebook)

    def _log_update(self, rate: Mapping[str, float]) -> None:
        """Logs the means since the last line."""
        now, speed = self.run_state, self._throughput.tokens_per_second()
        measured = {"tokens_per_second": speed, **utilization.device_metrics(self.run.flops * speed), **rate}
        measured |= self._throughput.compilations()
        skipped, means = {"skipped": now.nonfinite.total} if now.nonfinite.total else {}, now.means.take()
        self.record({**means, **measured, **skipped, **trl_names(means), "num_tokens": now.num_tokens})
        self._throughput.restart()

    def record(self, values: Mapping[str, Any], event: str | None = None) -> None:
        """Logs a line and calls `on_log`, then the callbacks of `event` with the same metrics.

        Outside `train` the line goes to `history` only.
        """
        epoch = round(self.done / self.data.order.steps_per_epoch, 4)
        plain = {name: plain_value(value) for name, value in values.items()}
        self.history.append({"step": self.done, "epoch": epoch, **plain})
        if self._log is not None:
            self._log.log(self.done, plain, epoch=epoch, left=self._bar.left)
        self.callbacks.call("on_log", logs=dict(self.history[-1]))
        if event is not None:
            self.callbacks.call(event, metrics=values)

    def _log_completions(self, step: int, samples: Sequence[tuple[Example, str]]) -> None:
        """Appends what the student wrote to `completions.jsonl`; where that is due, scores and shows some of it."""
        due = self.run_state.shows_completions(step, self.args.log_completions_steps)
        # Scoring with several processes needs all of them, and each has samples of its own.
        rows = self._rows_of(samples, scored=KEPT if due and jax.process_count() == 1 else 0)
        with self.run_state.holding(rows) as written:
            append_rows(self.output / LOGS[1], written)
        if due:
            shown = [(row["prompt"], row["completion"]) for row in rows]
            completions_table(self.console, shown, self.args.num_completions_to_print, step=self.done)

    def _rows_of(self, samples: Sequence[tuple[Example, str]], scored: int, **more: str) -> list[dict[str, Any]]:
        """Lines of `completions.jsonl`; the first `scored` ones with the log-probabilities of their groups."""
        rows: list[dict[str, Any]] = []
        for example, text in samples:
            rows.append({"step": self.done, "prompt": self._student.chat_tokenizer.render(example.prompt)})
            rows[-1] |= {"completion": text} | more
            rows[-1] |= {} if example.completion is None else {"reference": example.completion}
        if scored and self._scores_groups and rows:
            try:
                for row, groups in zip(rows, self.teacher.score_groups(self.student, samples[:scored])):
                    row["groups"] = groups
            except Exception as error:  # such as too little memory; only the report needs this
                if jax.process_count() > 1:  # the others wait for this one
                    raise
                self._scores_groups = False
                self.say(f"Completions are no longer scored group by group ({type(error).__name__}: {error}).")
            self._throughput.restart()
        return rows

    def _log_evaluated(self) -> None:
        """Appends what the student wrote for the first rows of an evaluation, scored, to `completions.jsonl`."""
        for name, samples in self._written if self.args.log_completions else ():
            rows = self._rows_of(samples, len(samples), eval_set=name)
            if is_main_process():
                append_rows(self.output / LOGS[1], rows)
        self._written = []

    # evaluate

    def evaluate(self, examples: Sequence[Example] | None = None) -> dict[str, float]:
        """`eval_loss`, `eval_bits_per_byte`, with `predict_with_generate` `eval_exact_match`, with `eval_gaps` gaps.

        `examples` None: the evaluation rows. Several sets are measured one by one, as `eval_NAME_loss` and so on.
        """
        rows, writes = self.data.eval if examples is None else examples, self.args.predict_with_generate
        names, self._written = iter(rows if isinstance(rows, Mapping) else [""]), []
        most = max(1, KEPT // len(rows)) if isinstance(rows, Mapping) else KEPT

        def measure(part):
            found = self.predict(part, writes)
            if writes:
                kept = itertools.islice((e for e in part if e.completion is not None), most)
                self._written.append((next(names), [*zip(kept, found.predictions)]))
            gaps = self.teacher.gaps(self.student, part) if self.teacher and self.args.eval_gaps else {}
            return found.metrics | gaps

        return over_sets(measure, rows)

    def predict(self, examples: Sequence[Example] | None, writes: bool = True) -> PredictionOutput:
        """The metrics of `evaluate` on one set of rows, and with `writes` greedy completions and the rows' own."""
        self.watchdog.report(self.done, "evaluating")
        rows = self.data.eval if examples is None else examples
        after_batch = functools.partial(self.callbacks.call, "on_prediction_step")
        return self._evaluator.predict(self.student, self.state.params, rows, writes, after_batch)

    def _take_evaluation(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Logs an evaluation and records whether it is the best so far; returns its metrics.

        Callbacks are called first and see the best evaluation before this one in the state, as in transformers.
        """
        self._evaluated = self.done, metrics
        self.record(metrics, "on_evaluate")
        self._log_evaluated()
        self.run_state.best.take(metrics, self.done)
        if self._saver.is_saved():
            self._saver.mark_best()
        return metrics

    def _evaluate_before(self) -> Mapping[str, float]:
        """The metrics before the first update: measured now if requested, or from the log of a resumed run."""
        now = self.run_state
        rows = self.history if now.measured == self.data.description.get(EVALUATED) else ()
        before = next((row for row in rows if row.get("step") == 0), {})
        if not before and self.args.eval_on_start and self.done == 0:
            before = self.evaluate()
            self.record(before)
            self._log_evaluated()
        if now.unmeasured and self.data.eval is not None and self.done < self.total_steps:  # due at the checkpoint
            self._take_evaluation(self.evaluate())
        return before

    def _show_result(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        self.console.print(f"{plural(self.done, 'update')} done; {plural(self.run.step.compiled, 'program')} compiled.")
        if not after:
            return
        teacher = over_sets(self.teacher.score, self.data.eval) if self.teacher else {}
        measured = {name: value for name, value in before.items() if name.startswith("eval_")}
        self.results = {"before training": measured, "after training": after, "teacher": teacher}
        self._summary.add(results=self.results)
        before_after(self.console, compared(before, after, teacher, self.data.eval))

    # save

    @property
    def student(self) -> LoadedModel:
        """The current student, to be used at once: the next update donates its arrays."""
        return self._student._replace(model=merge(self.run.graph, self.state.params))

    def _model(self) -> Decoder:
        return self.student.model

    @annotate(SAVING)
    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the current student and its tokenizer as a folder that transformers opens."""
        return self._save_model(self.student.model, folder)

    def _save_model(self, model: Decoder, folder: str | pathlib.Path) -> pathlib.Path:
        tokenizer, dtype = self._student.chat_tokenizer, self.args.model_init_kwargs.get("dtype", "float32")
        trained = dict(stop_ids=tokenizer.stop_ids, chat_template=tokenizer.template.portable)
        return save_final_model(model, tokenizer.tokenizer, folder, dtype=dtype, **trained)

    def _say_stopping(self, reason: str) -> None:
        self._bar.rename("stopping after this update" + " (Ctrl-C: now)" * (reason == "interrupt"))
