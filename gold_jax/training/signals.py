"""Ctrl-C and SIGTERM: a run stops between two updates, with its state saved."""

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from gold_jax.preemption import EXIT_CODE, end_at_once

T = TypeVar("T")


class Preempted(RuntimeError):
    """SIGTERM ended a run, its state saved. A command ends with `exit_code`, EX_TEMPFAIL of sysexits.h."""

    exit_code = EXIT_CODE


class _Interrupted(KeyboardInterrupt):
    """Ends what is interruptible. A kind of KeyboardInterrupt, for which libraries clean up after themselves."""


class InterruptedTwice(KeyboardInterrupt):
    """Ctrl-C came a second time: a command ends at once, with nothing waited for."""

    at_once = True


class SignalHandler:
    """While it is entered, Ctrl-C and SIGTERM are held until the run looks at `requested`.

    What may take minutes and loses nothing by being cut short is called by `interruptible`. A second Ctrl-C ends the
    run at once. Signals are left alone outside the main thread and where something else already handles them. In a run
    of several processes JAX's runtime hears SIGTERM and has all of them end after the same update; Ctrl-C ends the
    process that it is pressed in, and so the others, with nothing saved.
    """

    def __init__(self, notify: Callable[[str], Any] = lambda reason: None):
        """`notify` is called in a signal handler with the first reason: what it does must be short and take no lock."""
        self._notify = notify
        self.requested: str | None = None  # "interrupt" or "preemption"
        self._interruptible = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number, default in (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL):
                if signal.getsignal(number) in (default, end_at_once):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def request(self, reason: str) -> None:
        """Asks the run to end, as a signal does; the first reason stays."""
        if self.requested is None:
            self.requested = reason
            self._notify(reason)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.requested:  # a second signal, the first may have been SIGTERM
            raise InterruptedTwice
        self.request("interrupt" if number == signal.SIGINT else "preemption")
        if self._interruptible:
            self._interruptible = False
            raise _Interrupted

    def interruptible(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """What a function returns; None where it was not called, or cut short, because a signal was received."""
        try:
            self._interruptible = True
            return None if self.requested else function(*arguments)
        except _Interrupted:
            return None
        finally:
            self._interruptible = False

    def poll_preemption(self, step: int) -> None:
        """Asks JAX's runtime, in a run of several processes, whether all of them are to end after this update."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.request("preemption")
