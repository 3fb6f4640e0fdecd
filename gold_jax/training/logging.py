"""The log of a run: each logged step as a line of JSON, a line in the terminal, and to the trackers."""

from __future__ import annotations

import collections
import json
import math
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.text import Text

_WIDTH = 11  # least width of a column of the terminal's log
PATIENCE = 30.0  # seconds after which a tracker counts as one that does not answer


class Tracker(Protocol):
    """Where metrics go besides the log file."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Send what is left."""


class MetricLog:
    """Writes each logged step to a JSONL file, the terminal and the trackers, from a thread of its own.

    `log` returns at once: values may be arrays that a device still computes, and a slow disk, terminal or tracker
    delays nothing. An error in any of them is shown once and training continues; so is a tracker that does not answer,
    for which even `close` waits no longer than `PATIENCE`.
    """

    def __init__(
        self, path: str | os.PathLike | None, console: Console | None = None, trackers: Iterable[Tracker] = ()
    ):
        """Start the log.

        Args:
            path: the JSONL file, made with its folder and appended to; None: no file.
            console: where lines are shown; None: nowhere.
            trackers: objects with `log(values, step)` and `close()`.

        Raises:
            OSError: if the file cannot be opened.
        """
        self._console = console
        self._senders = [_Sender(tracker, self._complain) for tracker in trackers]
        self._file = None
        if path is not None:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")
        self._columns: tuple[str, ...] = ()
        self._complained: set[str] = set()
        self._queue: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="gold_jax metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any], *, epoch: float | None = None) -> None:
        """Hand over the metrics of one step.

        Args:
            step: updates made so far.
            values: name to number (of Python, numpy or JAX, without axes), text or None.
            epoch: how often the data set has been gone through.
        """
        row = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        self._queue.put({**row, **values})

    def flush(self) -> None:
        """Wait until everything handed over is in the file and on the terminal; call it before printing something else."""
        self._queue.join()

    def close(self) -> None:
        """Write what is left and close the file and the trackers. A second call does nothing."""
        if not self._thread.is_alive():
            return
        self._queue.put(None)
        self._thread.join()
        for sender in self._senders:
            sender.close()
        if self._file is not None:
            self._try("the log file", self._file.close)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            row = self._queue.get()
            try:
                if row is None:
                    return
                self._try("a metric", self._write, row)
            finally:
                self._queue.task_done()

    def _write(self, row: Mapping[str, Any]) -> None:
        plain = {name: plain_value(value) for name, value in row.items()}
        if self._file is not None:
            self._try("the log file", self._write_line, plain)
        for sender in self._senders:
            sender.send({name: value for name, value in plain.items() if name != "step"}, plain["step"])
        if self._console is not None:
            self._try("the terminal", self._show, plain)

    def _write_line(self, plain: Mapping[str, Any]) -> None:
        self._file.write(json_line(plain) + "\n")
        self._file.flush()

    def _show(self, plain: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in plain.items() if value is not None}
        evaluation = any(name.startswith("eval_") for name in numbers)
        widths = [max(_WIDTH, len(name) + 2) for name in numbers]
        if not self._console.is_terminal or evaluation or sum(widths) > self._console.width:
            line = "  ".join(f"{name} {shown(value)}" for name, value in numbers.items())
            self._console.print(Text(line, style="cyan" if evaluation else ""), soft_wrap=True)
            return
        if tuple(numbers) != self._columns:
            self._columns = tuple(numbers)
            heads = "".join(name.rjust(width) for name, width in zip(numbers, widths))
            self._console.print(Text(heads, style="bold"), soft_wrap=True)
        line = "".join(shown(value).rjust(width) for value, width in zip(numbers.values(), widths))
        self._console.print(Text(line), soft_wrap=True)

    def _try(self, what: str, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # a run must outlive whatever its reporting does
            self._complain(what, f"failed and the run goes on without it: {type(error).__name__}: {error}")

    def _complain(self, what: str, why: str) -> None:
        if what not in self._complained and self._console is not None:
            self._complained.add(what)
            self._console.print(Text(f"{what} {why}", style="yellow"), soft_wrap=True)


class _Sender:
    """Sends to one tracker from a thread of its own, so that a tracker that hangs blocks nothing else."""

    def __init__(self, tracker: Tracker, complain: Callable[[str, str], None]):
        self._tracker, self._name, self._complain = tracker, type(tracker).__name__, complain
        self._queue: queue.Queue = queue.Queue()
        self._since: float | None = None  # when the call that is under way began
        self._thread = threading.Thread(target=self._work, name=f"gold_jax {self._name}", daemon=True)
        self._thread.start()

    def send(self, values: Mapping[str, Any], step: int) -> None:
        """Hand over the metrics of one step."""
        self._queue.put((self._tracker.log, values, step))
        since = self._since
        if since is not None and time.monotonic() - since > PATIENCE:
            self._complain(self._name, f"has not answered for {PATIENCE:g} seconds; the run goes on meanwhile.")

    def close(self) -> None:
        """Have it send what is left, for as long as `PATIENCE`."""
        self._queue.put((self._tracker.close,))
        self._queue.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._complain(
                self._name + " at the end", "did not answer; what it has not taken is in metrics.jsonl alone."
            )

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            function, *arguments = call
            self._since = time.monotonic()
            try:
                function(*arguments)
            except Exception as error:  # as in MetricLog
                self._complain(self._name, f"failed and the run goes on without it: {type(error).__name__}: {error}")
            self._since = None


def plain_value(value: Any) -> Any:
    """A Python number, text, bool or None from a number of any library; waits for a device that still computes it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.item() if hasattr(value, "item") else float(value)


def json_line(values: Mapping[str, Any]) -> str:
    """One JSON object on one line. NaN and infinities, which JSON lacks, become null and are named in `nonfinite`."""
    odd = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    row = {k: None if k in odd else v for k, v in values.items()}
    if odd:
        row["nonfinite"] = odd
    return json.dumps(row, allow_nan=False, ensure_ascii=False)


def shown(value: Any) -> str:
    """A number in few characters, for people."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class RunningMean:
    """Means of named values between two logs; never waits for a device."""

    def __init__(self):
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, Any] = collections.defaultdict(float)

    def add(self, values: Mapping[str, Any], weight: Any = 1.0) -> None:
        """Take in values, each counted `weight` times (a number or array). Names may differ from call to call."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value * weight if name in self._sums else value * weight
            self._weights[name] = self._weights[name] + weight

    def take(self) -> dict[str, Any]:
        """The weighted means since the last call, as numbers or arrays; resets them."""
        means = {name: total / self._weights[name] for name, total in self._sums.items()}
        self.__init__()
        return means

    def state(self) -> dict[str, list]:
        """What has been taken in since the last log, fit for JSON; waits for the device."""
        return {
            name: [float(total), str(getattr(total, "dtype", "")), float(self._weights[name])]
            for name, total in self._sums.items()
        }

    def restore(self, state: Mapping[str, Sequence]) -> None:
        """Goes on from what `state` gave, to the last bit."""
        for name, (total, dtype, weight) in state.items():
            self._sums[name] = np.dtype(dtype).type(total) if dtype else total
            self._weights[name] = weight
