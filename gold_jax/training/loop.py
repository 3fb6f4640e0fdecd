"""The training loop, from top to bottom: what happens in a run, whatever is learned."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from gold_jax.config import SFTConfig
from gold_jax.host_memory import release_freed_memory
from gold_jax.losses.chunked import chunk_size
from gold_jax.step_ranges import read_steps
from gold_jax.text.data import Example
from gold_jax.training import profile
from gold_jax.training.checkpoint import checkpoint_folder, prune_checkpoints, save_final_model
from gold_jax.training.evaluation import exact_match, score_completions
from gold_jax.training.metrics import MetricLog, RunningMean, before_after, completions_table, plain_value
from gold_jax.training.optimizer import make_optimizer, make_schedule
from gold_jax.training.participant import Participant
from gold_jax.training.report import make_trackers
from gold_jax.training.step import LossFn, Step, TrainState
from gold_jax.training.windows import Order, Windows, measurable


@dataclasses.dataclass
class Task:
    """What a run is made of, beside its settings."""

    student: Participant
    loss: LossFn
    constants: Any
    windows: Windows
    train: Sequence[Example]
    kept: list[int]
    eval: Sequence[Example] | None
    teacher_score: Callable[[], Mapping[str, float]] | None = None


class Loop:
    """One training run.

    Attributes:
      history: every logged line, oldest first.
      state: the student's parameters and the optimizer's state.
    """

    def __init__(
        self,
        task: Task,
        args: SFTConfig,
        *,
        prompts_per_step: int,
        console: Console,
        max_new_tokens: int,
        save_dtype: str = "auto",
    ):
        """Sets a run up; `max_new_tokens` bounds greedy completions in evaluation, `save_dtype` is as in `save_model`."""
        self.task, self.args, self.console = task, args, console
        self.max_new_tokens, self.save_dtype = max_new_tokens, save_dtype
        self.output = pathlib.Path(args.output_dir)
        self.order = Order(len(task.kept), prompts_per_step, args.seed)
        self.total_steps = args.max_steps
        if args.max_steps < 0:
            self.total_steps = max(1, int(np.ceil(args.num_train_epochs * self.order.steps_per_epoch)))
        self.profile_steps = read_steps("profile_steps", args.profile_steps, self.total_steps)
        if self.profile_steps:
            task.windows = profile.watched(task.windows)
        self.schedule = make_schedule(args, self.total_steps)
        optimizer = make_optimizer(args, self.total_steps)
        self.graph, params = nnx.split(task.student.model)
        task.student = task.student._replace(model=None)  # steps donate the parameters: this is their only owner
        self.state = TrainState(params, jax.jit(optimizer.init)(params))
        release_freed_memory()
        self.step = Step(task.loss, optimizer)
        self.done = 0
        self.history: list[dict[str, Any]] = []

    def train(self) -> dict[str, float]:
        """Runs all updates and saves the student to `output_dir`; returns the closing metrics.

        An interrupted run saves what it has learned in a checkpoint folder.
        """
        args = self.args
        self.output.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "completions.jsonl"):  # an earlier run's lines are not this one's
            (self.output / name).unlink(missing_ok=True)
        before = self.evaluate() if args.eval_on_start else {}
        means = RunningMean()
        with MetricLog(self.output / "metrics.jsonl", self.console, make_trackers(args.report_to, args)) as log:
            if before:
                self._record(log, before)
            try:
                self._updates(log, means)
            except KeyboardInterrupt:
                log.flush()
                folder = self.save(checkpoint_folder(self.output, self.done))
                said = f"Interrupted after {self.done} updates; the student is saved in {folder}."
                self.console.print(said, markup=False, soft_wrap=True)
                raise
            self.save(self.output)  # before anything else is measured: whatever goes wrong then, this is not lost
            after = self.evaluate() if self.task.eval is not None else {}
            if after:
                self._record(log, after)
        self._close(before, after)
        return after

    def _updates(self, log: MetricLog, means: RunningMean) -> None:
        args, total = self.args, self.total_steps
        log_every, eval_every, save_every = (
            args.interval(name, total) for name in ("logging_steps", "eval_steps", "save_steps")
        )
        per_epoch = self.order.steps_per_epoch
        window = self._window(0)
        since, tokens, table_due = time.perf_counter(), 0, 0
        for step in self._steps(log):
            with uninterrupted(), profile.host_part(profile.STARTING):
                metrics = self.step.train(self.state, self.task.constants, window.batches)
                current, self.done = window, step + 1
            # The device works on this update; the host meanwhile draws up the next one.
            window = self._window(step + 1) if step + 1 < total else None
            with profile.host_part(profile.WAITING):
                jax.block_until_ready(metrics["loss"])

            means.add({**metrics, **{k: v for k, v in current.stats.items() if k != "tokens"}})
            tokens += current.stats["tokens"]
            due = self.done % log_every == 0 or self.done == total or (step == 0 and args.logging_first_step)
            if due:
                now = time.perf_counter()
                speed = {"tokens_per_second": tokens / (now - since), "learning_rate": float(self.schedule(step))}
                self._record(log, {**means.take(), **speed})
                since, tokens = now, 0
            if current.samples and args.log_completions:
                self._keep(current.samples)
                if step >= table_due:
                    table_due = step - step % args.log_completions_steps + args.log_completions_steps
                    log.flush()
                    completions_table(self.console, current.samples, args.num_completions_to_print, step=self.done)
            ends = self.done % per_epoch == 0
            if self._due(args.eval_strategy, eval_every, ends) and self.done < total and self.task.eval is not None:
                self._record(log, self.evaluate())
                since, tokens = time.perf_counter(), 0
            if self._due(args.save_strategy, save_every, ends) and self.done < total:
                self.save(checkpoint_folder(self.output, self.done))
                prune_checkpoints(self.output, args.save_total_limit)
                since, tokens = time.perf_counter(), 0

    def _steps(self, log: MetricLog) -> Iterator[int]:
        """0, 1, … up to the last update, those of `profile_steps` traced."""
        folder = self.output / "profile"

        def settle():
            jax.block_until_ready((self.state.params, self.state.optimizer))

        def show(summary):
            log.flush()
            profile.show_summary(self.console, summary, folder)

        return profile.profiled(self.total_steps, self.profile_steps, folder, settle=settle, show=show)

    def _due(self, strategy: str, every: int, epoch_ends: bool) -> bool:
        return strategy == "epoch" and epoch_ends or strategy == "steps" and self.done % every == 0

    def _window(self, step: int):
        examples = [self.task.train[self.task.kept[i]] for i in self.order(step)]
        return self.task.windows.train(step, examples, self.state.params)

    @profile.as_host_part(profile.EVALUATION)
    def evaluate(self) -> dict[str, float]:
        """`eval_loss`, `eval_bits_per_byte`, and with `predict_with_generate` `eval_exact_match`, on the evaluation rows."""
        if self.task.eval is None:
            raise ValueError(
                "there is no data to evaluate on: give an eval_dataset, or --eval_strategy and a test split"
            )
        examples = measurable(self.task.eval)
        if not examples:
            raise ValueError("no row of the evaluation data has a completion, so nothing can be measured on it")
        totals: dict[str, float] = {}
        for batch in self.task.windows.evaluate(examples):
            for name, value in self.step.evaluate(self.state.params, self.task.constants, batch).items():
                totals[f"eval_{name}"] = totals.get(f"eval_{name}", 0.0) + plain_value(value)
        return totals | measures(self.student, examples, self.args, self.max_new_tokens)

    @property
    def student(self) -> Participant:
        """The student as it stands now."""
        return self.task.student._replace(model=nnx.merge(self.graph, self.state.params))

    @profile.as_host_part(profile.SAVING)
    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Writes the student as it stands now, with its tokenizer, so that transformers opens the folder."""
        return save_final_model(self.student.model, self.task.student.codec.tokenizer, folder, dtype=self.save_dtype)

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


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done.

    An update consumes the parameters and gives new ones; an interrupt between the two would leave nothing to save.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    held = []
    signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if held:
        raise KeyboardInterrupt


def measures(who: Participant, examples: Sequence[Example], args: SFTConfig, max_new_tokens: int) -> dict[str, float]:
    """What any model can be measured by on given completions: the same for students, teachers and every tokenizer."""
    batch = args.per_device_eval_batch_size
    score = score_completions(who.model, who.codec, examples, batch_size=batch, chunk=chunk_size(args.loss_chunk))
    found = {"eval_bits_per_byte": score.bits_per_byte}
    if args.predict_with_generate:
        found["eval_exact_match"] = exact_match(
            who.model, who.codec, examples, max_new_tokens=max_new_tokens, batch_size=batch
        )
    return found
