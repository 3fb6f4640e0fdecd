"""The check of all rows of a large data set in a thread, while the run already trains on those that it has looked at."""

import threading
from collections.abc import Callable
from typing import Any

from gold_jax.text.checks import CheckedRows


class _Stopped(Exception):
    """The run is over before the check is."""


class BackgroundCheck:
    """A check of `total` rows that runs in a thread within a `with` block.

    `check` is given what to call with the number of rows looked at, after every block of them: it raises where the run
    is over. Tokenizers that it uses must be used by nothing else, as they are no thread's but their own.
    """

    def __init__(self, check: Callable[[Callable[[int], Any]], CheckedRows], total: int):
        self._check, self.total, self.reached = check, total, 0
        self._found: CheckedRows | None = None
        self._error: Exception | None = None
        self._told, self._stop = False, threading.Event()
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
        except Exception as error:  # raised where the run asks
            self._error = error

    def _reach(self, rows: int) -> None:
        self.reached = rows
        if self._stop.is_set():
            raise _Stopped

    def poll(self) -> list[str]:
        """Lines to be said since the last call; raises what the check raised, such as the ValueError of a row."""
        if self._error is not None:
            raise self._error
        if self._found is None or self._told:
            return []
        self._told = True
        left = len(self._found.kept)
        return [
            f"All {self.total:,} rows are checked: {left:,} can be learned from.",
            *(f"note: {line}" for line in self._found.notices),
        ]

    def unfinished(self) -> str | None:
        """A line where the check did not come to its end; None where it did."""
        if self._told:
            return None
        return f"When the run ended, {self.reached:,} of {self.total:,} rows were checked beside it."
