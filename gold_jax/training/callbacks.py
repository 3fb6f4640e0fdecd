"""transformers' `TrainerCallback`s, called at the events of a run; and checks of the trainers' arguments by TRL's names."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerCallback, TrainerControl

from gold_jax.config.trl_compat import EVENTS, TRAINER_ARGUMENTS, nearest
from gold_jax.distributed.consensus import all_reduce_max

_SWITCHES = [field.name for field in dataclasses.fields(TrainerControl)]


class Callbacks(CallbackHandler):
    """transformers' handler of callbacks (objects or classes), and the `TrainerControl` that they set.

    `DefaultFlowCallback` is the first: it sets from the settings when to log, evaluate and save, and the others may change
    that. `state` and `model` return the `TrainerState` and the student at the moment of a call; `say` prints which events of
    a callback never happen.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] | None,
        args: Any,
        state: Callable[[], Any],
        model: Callable[[], Any] = lambda: None,
        say: Callable[[str], Any] = print,
        **held: Any,  # `processing_class`, `optimizer` and `lr_scheduler`, which callbacks get
    ):
        self.control = TrainerControl()
        self._args, self._state, self._model, self._say = args, state, model, say
        held = {"processing_class": None, "optimizer": None, "lr_scheduler": None} | held
        super().__init__([DefaultFlowCallback, *(callbacks or ())], None, **held)

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, or an instance of a class; says which of its events never happen."""
        super().add_callback(callback)
        kind = type(self.callbacks[-1])
        never = [e for e in EVENTS if getattr(kind, e, None) not in (None, getattr(TrainerCallback, e))]
        if never:
            self._say(f"{', '.join(never)} of {kind.__name__} is never called: {EVENTS[never[0]]}.")

    def call(self, event: str, **values: Any) -> None:
        """Calls the method of every callback that is named after an event, such as `on_step_end`."""
        if event == "on_train_begin":  # callbacks may have been added, in any process
            self._everywhere = bool(all_reduce_max(np.array(len(self.callbacks) > 1)))
        self.model = self._model() if len(self.callbacks) > 1 else None
        try:
            self.control = getattr(self, event)(self._args, self._state(), self.control, **values) or self.control
        finally:
            self.model = None

    def agree(self) -> None:
        """Sets the switches that a callback of any process has set; all processes call this together.

        ValueError: one wants an epoch to end early.
        """
        if self._everywhere:
            switches = np.array([getattr(self.control, name) for name in _SWITCHES])
            self.control = TrainerControl(*all_reduce_max(switches).tolist())
        if self.control.should_epoch_stop:
            whole = "a callback sets should_epoch_stop, but an epoch is gone through whole, or it could not be resumed"
            raise ValueError(f"{whole}; should_training_stop ends the run")


def check_trl_arguments(
    trainer: str, args: Any, wanted: type, given: Mapping[str, Any], others: type | tuple = ()
) -> None:
    """Refuses arguments that a `trainer` of TRL's takes and this one does not, unless they are None.

    ValueError: with what stands in the argument's place. TypeError: the settings are of another class than `wanted`, or of
    `others`, or an argument is none of TRL's.
    """
    if not isinstance(args, wanted) or (others and isinstance(args, others)):
        takes = f"takes a {wanted.__name__} of gold_jax, whose fields have the names of TRL's"
        raise TypeError(f"args is a {type(args).__name__}; {trainer} {takes}")
    for name, value in given.items():
        if name not in TRAINER_ARGUMENTS:
            raise TypeError(f"{trainer} has no argument {name!r}{nearest(name, _ARGUMENTS)}")
        if value is not None:
            raise ValueError(f"{name} is not supported here: {TRAINER_ARGUMENTS[name]}")


_ARGUMENTS = (
    "model teacher_model args train_dataset eval_dataset processing_class teacher_processing_class compute_metrics "
    "callbacks optimizers"
).split()


def check_compute_metrics(compute_metrics: Any, args: Any) -> None:
    """ValueError for a `compute_metrics` without `predict_with_generate`, which it would get its texts from."""
    if compute_metrics is not None and not args.predict_with_generate:
        given = "compute_metrics is given the texts that the student writes in evaluation, and those of the data set"
        raise ValueError(f"{given}; set predict_with_generate=True, or leave it out")


def weak_method(method: Callable) -> Callable:
    """A bound method that holds its object weakly, so that no reference cycle keeps arrays alive after `del`."""
    reference = weakref.WeakMethod(method)
    return lambda *arguments: reference()(*arguments)


def check_optimizers(optimizer: Any, schedule: Any) -> None:
    """TypeError where `optimizer` is no optax transformation, or a schedule is given without one."""
    if optimizer is not None and not isinstance(optimizer, optax.GradientTransformation):
        takes = "(an optax.GradientTransformation, an optax schedule or None)"
        raise TypeError(f"optimizers takes {takes}, not a {type(optimizer).__name__}")
    if optimizer is None and schedule is not None:
        instead = "give the optax transformation that uses it, or learning_rate and lr_scheduler_type"
        raise TypeError(f"optimizers has a schedule without an optimizer; {instead}")
