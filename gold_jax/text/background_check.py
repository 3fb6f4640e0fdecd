"""The check of all rows of a large data set in a thread, during training."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from gold_jax.text.checks import CheckedRows, RowChecker


class _Stopped(Exception):
    """Training ended before the check did."""


class BackgroundCheck:
    """A check of `total` rows that runs in a thread within a `with` block.

    `check` is called with a function that it calls with its checker after every block (`check_examples`: `after_block`),
    and that raises once training has ended. `check` needs tokenizers of its own: setting truncation and padding is not
    thread-safe.
    """

    def __init__(self, check: Callable[[Callable[[RowChecker], Any]], CheckedRows], total: int):
        self._check, self.total, self.reached = check, total, 0
        self._found: CheckedRows | None = None
        self._error: Exception | None = None
        self._notices: Sequence[str] = ()  # about the rows that are checked so far
        self._reported, self._stop = False, threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "BackgroundCheck":
        self._stop.clear()
        if self._found is None and self._error is None:
            self._thread = threading.Thread(target=self._run, name="check of the rows", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._found = self._check(self._reach)
        except _Stopped:
            pass
        except Exception as error:  # raised by `poll`
            self._error = error

    def _reach(self, checker: RowChecker) -> None:
        self.reached, self._notices = checker.total, checker.notices()
        if self._stop.is_set():
            raise _Stopped

    def poll(self) -> list[str]:
        """New lines to print since the last call; raises what the check raised, such as the ValueError of a row."""
        if self._error is not None:
            raise self._error
        if self._found is None or self._reported:
            return []
        self._reported = True
        return [
            f"All {self.total:,} rows are checked: {len(self._found.kept):,} can be learned from.",
            *(f"note: {line}" for line in self._found.notices),
        ]

    def unfinished(self) -> list[str]:
        """Lines that say how far the check came and what it found by then; none if it finished."""
        if self._reported:
            return []
        line = f"{self.reached:,} of {self.total:,} rows were checked before training ended."
        return [line, *(f"note: {notice}" for notice in self._notices)]
