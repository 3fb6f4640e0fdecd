"""Ctrl-C and SIGTERM: a run that is asked to end does so where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from gold_jax.parallel.beats import EX_TEMPFAIL

T = TypeVar("T")


class Preempted(SystemExit):
    """A run ended because the system asked for it, its state saved; exit code 75."""

    def __init__(self):
        super().__init__(EX_TEMPFAIL)


class _Interrupted(KeyboardInterrupt):
    """Ends a part that may be cut short. A kind of KeyboardInterrupt, for which libraries clean up after themselves."""


class SignalHandler:
    """Hears Ctrl-C and SIGTERM while it is entered, and holds them until a run can end.

    Between an update and what is logged of it nothing may come, so `requested` is for the run to look at. Drawing up
    the next batch and evaluating may take minutes and lose nothing by being cut short: `interruptible` calls them. A
    second Ctrl-C ends the run at once.

    Signals are left alone outside the main thread and where something else already handles them. In a run of several
    processes a preemption is heard through JAX's runtime, which has all processes end after the same update; Ctrl-C
    ends the process that it is pressed in, and so the others, with nothing saved.

    Attributes:
        requested: None, "interrupt" or "preemption".
        interrupted_twice: whether Ctrl-C came a second time.
    """

    def __init__(self):
        self.requested: str | None = None
        self.interrupted_twice = False
        self._interruptible = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            ours = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
            for number, usual in ours.items():
                if signal.getsignal(number) is usual:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def request(self, why: str) -> None:
        """Asks the run to end, as a signal does; the first reason stays."""
        self.requested = self.requested or why

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.requested == "interrupt":
            self.interrupted_twice = True
            raise KeyboardInterrupt
        self.request("interrupt" if number == signal.SIGINT else "preemption")
        if self._interruptible:
            self._interruptible = False
            raise _Interrupted

    def interruptible(self, part: Callable[..., T], *arguments: Any) -> T | None:
        """What a part gives; None where it was not begun, or cut short, because the run is asked to end."""
        try:
            self._interruptible = True
            return None if self.requested else part(*arguments)
        except _Interrupted:
            return None
        finally:
            self._interruptible = False

    def poll_preemption(self, step: int) -> None:
        """Asks JAX's runtime, in a run of several processes, whether one of them is to be preempted."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.request("preemption")
