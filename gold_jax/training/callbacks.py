"""transformers' `TrainerCallback`s, called at the events of a run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax
from transformers.trainer_callback import TrainerControl

from gold_jax.distributed.consensus import all_reduce_max


class Callbacks:
    """The callbacks of a run, or classes of them, called with the settings and the `TrainerState` of the moment.

    Of what one may ask for through `TrainerControl`, `should_training_stop` is heeded, whichever process's callback asks.
    In a run of several processes all construct one together.
    """

    def __init__(self, callbacks: Sequence[Any] | None, args: Any, state: Callable[[], Any]):
        self._callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or ()]
        self._args, self._state = args, state
        self._stop = False
        self._any_callbacks = bool(all_reduce_max(np.array(len(self._callbacks))))  # in any process

    def call(self, event: str, **values: Any) -> None:
        """Calls the method of every callback that is named after an event, such as `on_step_end`."""
        control, self._stop = TrainerControl(), self._stop and event != "on_train_begin"  # of an earlier training
        for callback in self._callbacks:
            control = getattr(callback, event)(self._args, self._state(), control, **values) or control
        self._stop |= control.should_training_stop

    def asked_to_stop(self) -> bool:
        """Whether a callback of any process has asked to end the run; all processes call this together."""
        return self._any_callbacks and bool(all_reduce_max(np.array(self._stop)))


def check_trl_arguments(compute_metrics: Any, peft_config: Any) -> None:
    """Refuses, by a ValueError, arguments of TRL's trainers in whose place something else stands, and says what."""
    if compute_metrics is not None:
        never = "compute_metrics reads the logits of whole batches, which are never held here"
        counts = "predict_with_generate=True counts exact matches, and a callback's on_evaluate, or"
        other = "gold_jax.score_completions and gold_jax.sample_completions on trainer.model, measure anything else"
        raise ValueError(f"{never}; {counts} {other}")
    if peft_config is not None:
        raise ValueError("peft_config: adapters are not trained here, all parameters are; leave it out")


def check_optimizers(optimizer: Any, schedule: Any) -> None:
    """A TypeError where the transformation and the learning rates in place of the settings' are not optax's."""
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        takes = "(an optax.GradientTransformation, an optax schedule or None)"
        raise TypeError(f"optimizers takes {takes}, not a {type(optimizer).__name__}")
    if optimizer is None and schedule is not None:
        instead = "give the optax transformation that uses it, or learning_rate and lr_scheduler_type"
        raise TypeError(f"optimizers has a schedule without an optimizer; {instead}")
