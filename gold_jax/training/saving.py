"""Saving a run: checkpoints during training, the last update where training ends early, the student at the end."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from gold_jax import progress
from gold_jax.config import SFTConfig
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.rollout.engine import NonFiniteLogits
from gold_jax.training import checkpointing
from gold_jax.training.annotations import SAVING, annotate
from gold_jax.training.build import Run
from gold_jax.training.nonfinite import Diverged, describe_divergence
from gold_jax.training.rollout_buffer import to_bytes
from gold_jax.training.run_state import Data, RunState, named_for_checkpoints, read_params
from gold_jax.training.signals import InterruptedTwice, Preempted, SignalHandler
from gold_jax.training.step import TrainState
from gold_jax.wording import plural

_SAVED = "the student and everything needed to resume are saved in"
_RESUME = "Resume with --resume_from_checkpoint latest."


@dataclasses.dataclass(frozen=True)
class Saver:
    """Saves one run; methods are given its current `TrainState`."""

    checkpoints: checkpointing.Checkpoints
    run: Run
    run_state: RunState
    data: Data
    args: SFTConfig
    folder: pathlib.Path  # of the student
    write: Callable[[Decoder, pathlib.Path], Any]  # writes a model into a folder
    watchdog: Watchdog
    say: Callable[[str], Any]  # prints what was saved when the run ends early

    @property
    def _updates(self) -> str:
        return plural(self.run_state.done, "update")

    @annotate(SAVING)
    def checkpoint(self, state: TrainState) -> None:
        """Starts saving everything needed to resume; asynchronous, the device keeps computing."""
        self.watchdog.report(self.run_state.done, "saving a checkpoint")
        write_student = None
        if jax.process_count() == 1:
            host = jax.tree.map(np.array, state.params)  # a copy: steps donate what is on the device
            write_student = functools.partial(self.write, merge(self.run.graph, host))
        self.mark_best()
        named, rollouts = named_for_checkpoints(self.run.optimizer, state), self.run_state.rollouts
        rollouts = to_bytes(rollouts) if rollouts else None
        self.checkpoints.save(self.run_state.done, named, self.run_state.metadata(self.data), write_student, rollouts)

    def is_saved(self) -> bool:
        """Whether the newest complete checkpoint is of the last update."""
        last = self.checkpoints.last
        return last is not None and last.name == f"checkpoint-{self.run_state.done}"

    def mark_best(self) -> None:
        """Keeps the checkpoint of the last update if it is the best of those saved."""
        if self.run_state.best.take_saved(
            self.run_state.done, str(self.checkpoints.folder / f"checkpoint-{self.run_state.done}")
        ):
            self.checkpoints.best.clear()
            self.checkpoints.best.add(self.run_state.done)

    def student(self, model: Decoder) -> None:
        """Writes the student into its folder; the text of an OSError names the checkpoint that still holds it."""
        self.watchdog.report(self.run_state.done, "saving the student")
        try:
            with progress.task("saving the student"):
                self.checkpoints.finish()
                with annotate(SAVING):
                    self.write(model, self.folder)
        except OSError as error:
            last, why = self.checkpoints.last, checkpointing.describe_error(error)
            still = f"its last checkpoint is {last}" if last else "no checkpoint of it was saved"
            failed = f"the student could not be saved in {self.folder} ({why}) after {self._updates}; {still}"
            again = "with --resume_from_checkpoint latest" if last else "again"
            raise OSError(f"{failed}. Make room, then run the same command {again}.") from error

    def best_params(self, params: Any) -> Any | None:
        """With `load_best_model_at_end` the parameters of the best checkpoint, sharded as `params` of the last update.

        None: the last ones are the best. ValueError: the checkpoint is incomplete.
        """
        best = self.run_state.best
        if not (self.args.load_best_model_at_end and best.saved_is_better(self.run_state.done)):
            return None
        try:
            params = read_params(best.checkpoint, params)
        except checkpointing.BadCheckpoint as error:
            last = f"{self.folder} holds the student of the last update"
            raise ValueError(
                f"--load_best_model_at_end: {best.checkpoint} is incomplete or damaged: {error}; {last}"
            ) from None
        metric = f"{self.args.metric_for_best_model} {best.saved.metric:g}"
        self.say(f"The best of all is {best.checkpoint} ({metric}).")
        return params

    @contextlib.contextmanager
    def saved_when_stopped(self, signals: SignalHandler, state: Callable[[], TrainState]) -> Iterator[None]:
        """A context around all updates: saves the last one where an error or a signal ends them early."""
        try:
            try:
                yield
            except (InterruptedTwice, Diverged):
                raise
            except KeyboardInterrupt:
                if jax.process_count() > 1:  # to save takes all processes
                    raise
                signals.request("interrupt")
            except Exception as error:
                with contextlib.suppress(Exception):  # the first error is the one to raise
                    self._after_error(state())
                if isinstance(error, NonFiniteLogits) and self.run_state.done:
                    help = f"a lower --learning_rate than {self.args.learning_rate:g}; --max_grad_norm 1"
                    why = f"After {self._updates} no completions can be drawn, so the run stops: {error}"
                    raise Diverged(f"{why} What may help: {help}.{self._kept()}") from error
                raise
            if signals.requested:
                self._leave(state(), signals.requested == "interrupt")
        except InterruptedTwice:
            self.checkpoints.abandon()
            last = self.checkpoints.last
            kept = f"the last checkpoint is {last}" if last else "nothing is saved"
            self.say(f"Interrupted again after {self._updates}, before the checkpoint was saved; {kept}.")
            raise

    def _leave(self, state: TrainState, interrupted: bool) -> NoReturn:
        """Saves and ends the run after Ctrl-C or SIGTERM."""
        with progress.task("saving a checkpoint"):
            self.checkpoints.finish()
            if self.run_state.done and not self.is_saved():
                self.checkpoint(state)
                self.checkpoints.finish()
        saved, last = self.is_saved(), self.checkpoints.last
        where = f"{_SAVED} {last}" if saved else f"the last checkpoint is {last}" if last else "nothing is saved"
        further = f" {_RESUME}" if last else ""
        message = f"{'Interrupted' if interrupted else 'Preempted'} after {self._updates}; {where}.{further}"
        self.say(message)
        raise KeyboardInterrupt(message) if interrupted else Preempted

    def _after_error(self, state: TrainState) -> None:
        """Saves the last update where a row, a log or a server ends the run, and not the updates themselves."""
        gone = any(x.is_deleted() for x in jax.tree.leaves(state))
        self.checkpoints.finish()
        if jax.process_count() > 1 or gone or self.is_saved() or not self.run_state.done:
            return
        self.run_state.count(state.nonfinite)
        self.checkpoint(state)
        if self.checkpoints.finish():
            where = f"{_SAVED} {self.checkpoints.last}. {_RESUME}"
            self.say(f"An error ended the run after {self._updates}; {where}")

    def give_up(self, state: TrainState, metrics: Mapping[str, Any], rows: Sequence[int], counted: int) -> NoReturn:
        """Saves and ends a run that skipped too many updates in a row; `rows` are those of the last one."""
        why = describe_divergence(
            self.run_state.done, self.run_state.nonfinite, metrics, state.params, rows, self.args, counted
        )
        if self.run_state.nonfinite.total < self.run_state.done:
            # The state of the last good update, to resume from with other settings.
            self.run_state.count(self.run_state.nonfinite._replace(in_a_row=0))
            self.checkpoint(state)
        self.checkpoints.finish()
        raise Diverged(why + self._kept())

    def _kept(self) -> str:
        return f" The last checkpoint is {self.checkpoints.last}." if self.checkpoints.last else ""
