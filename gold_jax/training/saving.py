"""What is saved of a run: checkpoints on the way, the last update where something ends it early, the student at its end."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gold_jax import progress
from gold_jax.distributed.watchdog import Watchdog
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.training.annotations import SAVING, annotate
from gold_jax.training.build import Run
from gold_jax.training.checkpointing import BadCheckpoint, Checkpoints, describe_error
from gold_jax.training.logging import MetricLog
from gold_jax.training.nonfinite import NonFiniteCounter
from gold_jax.training.rollout_buffer import to_bytes
from gold_jax.training.run_state import Data, RunState, named_for_checkpoints, read_params
from gold_jax.training.step import TrainState

_WHOLE = "the student and all that the run needs to go on are saved in"


class Saver:
    """Saves one run, given where it stands: its `RunState` and `TrainState`. `write` writes a model into a folder, in the end `folder`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        run: Run,
        data: Data,
        folder: pathlib.Path,
        write: Callable,
        log: MetricLog,
        watchdog: Watchdog,
    ):
        self.checkpoints, self._run, self._data, self._folder, self._write = checkpoints, run, data, folder, write
        self._log, self._watchdog = log, watchdog

    @annotate(SAVING)
    def checkpoint(self, now: RunState, state: TrainState) -> None:
        """Begins to save all that is needed to resume; asynchronous, the device keeps computing."""
        self._watchdog.report(now.done, "saving a checkpoint")
        self._log.flush()  # a resumed run continues the log from here
        write_student = None
        if jax.process_count() == 1:
            host = jax.tree.map(np.array, state.params)  # a copy: steps donate what is on the device
            write_student = functools.partial(self._write, merge(self._run.graph, host))
        self.mark_best(now)
        arrays, rollouts = named_for_checkpoints(self._run.optimizer, state), now.rollouts
        rollouts = to_bytes(rollouts) if rollouts else None
        self.checkpoints.save(now.done, arrays, now.metadata(self._data), write_student, rollouts)

    def is_saved(self, now: RunState) -> bool:
        """Whether the newest whole checkpoint is of the last update."""
        last = self.checkpoints.last
        return last is not None and last.name == f"checkpoint-{now.done}"

    def mark_best(self, now: RunState) -> None:
        """Has the checkpoint of the last update stay, where it is the best of those saved."""
        if now.best.take_saved(now.done, str(self.checkpoints.folder / f"checkpoint-{now.done}")):
            self.checkpoints.best.clear()
            self.checkpoints.best.add(now.done)

    def last_update(self, now: RunState, state: TrainState) -> str:
        """Saves the last update of a run that is asked to end, where it is not yet; returns what is to be said of it."""
        with progress.task("saving a checkpoint"):
            self.checkpoints.finish()
            if now.done and not self.is_saved(now):
                self.checkpoint(now, state)
                self.checkpoints.finish()
        saved, last = self.is_saved(now), self.checkpoints.last
        where = f"{_WHOLE} {last}" if saved else f"the last checkpoint is {last}" if last else "nothing is saved"
        return f"{where}.{' --resume_from_checkpoint latest goes on.' if last else ''}"

    def after_error(self, now: RunState, state: TrainState) -> str | None:
        """Saves the last update where something else than the updates ends the run: a row, a log, a server.

        Returns what is to be said of it; None where nothing was saved.
        """
        gone = any(x.is_deleted() for x in jax.tree.leaves(state))
        self.checkpoints.finish()
        if jax.process_count() > 1 or gone or self.is_saved(now) or not now.done:
            return None
        self._log.flush()
        now.nonfinite = NonFiniteCounter(*map(int, state.nonfinite))
        self.checkpoint(now, state)
        if not self.checkpoints.finish():
            return None
        return f"{_WHOLE} {self.checkpoints.last}. --resume_from_checkpoint latest goes on."

    def student(self, now: RunState, model: Decoder) -> None:
        """Writes the student; an OSError says where it still is."""
        self._watchdog.report(now.done, "saving the student")
        try:
            with progress.task("saving the student"):
                self.checkpoints.finish()
                with annotate(SAVING):
                    self._write(model, self._folder)
        except OSError as error:
            last, why = self.checkpoints.last, describe_error(error)
            still = f"its last checkpoint is {last}" if last else "no checkpoint of it was saved"
            failed = f"the student could not be saved in {self._folder} ({why}) after {now.done} updates; {still}"
            again = "with --resume_from_checkpoint latest" if last else "again"
            raise OSError(f"{failed}. Make room, then run the same command {again}.") from error

    def best_params(self, now: RunState, params: Any) -> Any | None:
        """The parameters of the best checkpoint, sharded as `params`; None where those of the last update are the best.

        ValueError: the checkpoint is not whole.
        """
        if not now.best.saved_is_better(now.done):
            return None
        try:
            return read_params(now.best.checkpoint, params)
        except BadCheckpoint as error:
            last = f"{self._folder} holds the student of the last update"
            raise ValueError(f"--load_best_model_at_end: {now.best.checkpoint} is not whole: {error}; {last}") from None
