"""What a run reports: each logged step in a file, on the terminal and to trackers, and tables before and after."""

import contextlib
import functools
import json
import math
import os
import pathlib
import queue
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gold_jax import progress

LOGS = ("metrics.jsonl", "completions.jsonl")  # in a run's folder
SUMMARY = "summary.json"
KEPT = 8  # completions of an evaluation that are kept, and those of an update that are scored group by group
# Of the terminal's log: what a column is called there. These come first, in this order, as far as there is room.
_COLUMNS = {
    "step": "step", "loss": "loss", "grad_norm": "grad norm", "tokens_per_second": "tokens/s", "left": "left",
    "skipped": "skipped", "mfu": "MFU", "memory_gib": "GiB", "learning_rate": "lr", "on_policy": "on-policy",
    "completion_tokens": "completion", "one_to_one": "1:1",
}  # fmt: skip
_WIDTH = 9  # least width of a column
_REPEAT = 25  # lines after which the columns' names stand there again
# What TRL calls a metric that means the same there; in files and trackers it stands beside the own name.
_TRL_NAMES = {
    "matched": "matched_loss", "unmatched": "unmatched_loss", "token_accuracy": "mean_token_accuracy",
    "completion_tokens": "completions/mean_length",
}  # fmt: skip
_NOT_SHOWN = {*_TRL_NAMES.values(), "completions/clipped_ratio", "on_policy_loss", "off_policy_loss", "num_tokens"}
_NOT_SHOWN |= {"programs_compiled", "compiling_seconds"}
_NOTEBOOK_ROWS = 200  # of a notebook's table, which is redrawn as a whole
PATIENCE = 30.0  # seconds after which a tracker counts as one that does not answer


class MetricLog(contextlib.AbstractContextManager):
    """Writes each logged step to a JSONL file and the terminal, and to the trackers from a thread for each.

    With `in_notebook` the console shows one table under a progress bar, by transformers' notebook tracker.

    An error in any of them is shown once and training continues; so is a tracker (of `make_trackers`) that does not
    answer, which delays nothing, and for which even `close` waits no longer than `PATIENCE`.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        console: Console | None = None,
        trackers: Iterable[Any] = (),
        total_steps: int | None = None,
        in_notebook: bool = False,
    ):
        self._console, self._file, self._total = console, None, total_steps
        self._table = _NotebookTable(total_steps) if in_notebook and total_steps else None
        if path is not None:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")
        self._seen: dict[str, str] = {}  # metrics so far, in the terminal's order, with what their columns are called
        self._columns: tuple[str, ...] = ()
        self._lines = 0  # since the columns' names were last shown
        self._complained: set[str] = set()
        # One that hangs blocks neither the log nor the others.
        self._trackers = [(tracker, _Worker(type(tracker).__name__, self)) for tracker in trackers]

    def log(
        self, step: int, values: Mapping[str, Any], *, epoch: float | None = None, left: float | None = None
    ) -> None:
        """Write the metrics of one step: names with numbers (of Python, numpy or JAX, without axes), texts or None.

        The terminal alone shows `left`, the seconds that the run still takes.
        """
        row = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        plain = {name: plain_value(value) for name, value in {**row, **values}.items()}
        if self._file is not None:
            line = json_line(plain | {"time": round(time.time(), 3)})  # seconds since 1970
            self.attempt("the log file", lambda: print(line, file=self._file, flush=True))
        for tracker, worker in self._trackers:
            worker.put(tracker.log, {name: value for name, value in plain.items() if name != "step"}, step)
            worker.check()
        if self._console is not None:
            self.attempt("the terminal", lambda: self._show(plain, left))

    def close(self) -> None:
        """Close the file and the trackers. A second call does nothing."""
        for tracker, worker in self._trackers:
            worker.put(tracker.close)
            worker.close()
        if self._table is not None:
            self.attempt("the notebook", self._table.finish)
        if self._file is not None:
            self.attempt("the log file", self._file.close)
        self._trackers, self._table, self._file = [], None, None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, plain: Mapping[str, Any], left: float | None) -> None:
        progress.note_line()
        texts = {name: shown(value) for name, value in plain.items() if value is not None and name not in _NOT_SHOWN}
        if self._total is not None and self._table is None:
            texts["step"] += f"/{self._total}"
        if left is not None:
            texts["left"] = progress.clock(left)
        texts = {name: texts.pop(name) for name in _COLUMNS if name in texts} | texts
        evaluation = any(name.startswith("eval_") for name in texts)
        if self._table is not None:
            cells = {_COLUMNS.get(name, name): text for name, text in texts.items() if name != "left"}
            self._table.show(plain["step"], cells, evaluation)
            return
        if evaluation:
            texts.pop("left", None)
        if not self._console.is_terminal or evaluation:
            # Lines break between pairs, not within one.
            pairs = [f"{name}\N{NO-BREAK SPACE}{text}" for name, text in texts.items()]
            width = self._console.width if self._console.is_terminal else 10**6
            for line in textwrap.wrap("  ".join(pairs), width, break_long_words=False, break_on_hyphens=False):
                line = line.replace("\N{NO-BREAK SPACE}", " ")
                self._console.print(Text(line, style="cyan" if evaluation else ""), soft_wrap=True)
            return
        # What has no room stands in metrics.jsonl. A column keeps its place from line to line, whatever a line has.
        self._seen = {
            name: _COLUMNS.get(name, name) for name in (*_COLUMNS, *self._seen, *texts) if name in self._seen | texts
        }
        columns, room = {}, self._console.width
        for name, head in self._seen.items():
            width = 2 * len(str(self._total or "")) + 3 if name == "step" else max(_WIDTH, len(head) + 2)
            if width > room:
                break
            columns[name], room = width, room - width
        if tuple(columns) != self._columns or self._lines >= _REPEAT:
            self._columns, self._lines = tuple(columns), 0
            heads = "".join(self._seen[name].rjust(width) for name, width in columns.items())
            self._console.print(Text(heads, style="bold"), soft_wrap=True)
        self._lines += 1
        cells = "".join(texts.get(name, "").rjust(width) for name, width in columns.items())
        self._console.print(Text(cells), soft_wrap=True)

    def attempt(self, what: str, function: Callable[[], Any]) -> None:
        """Calls a function; a run must outlive whatever its reporting does."""
        try:
            function()
        except (Exception, SystemExit) as error:  # which rich raises where a pipe is closed
            self.complain(what, f"failed, and the run continues without it: {type(error).__name__}: {error}")

    def complain(self, what: str, why: str) -> None:
        """Says on the console, once, what does not work."""
        if what not in self._complained and self._console is not None:
            self._complained.add(what)
            with contextlib.suppress(Exception, SystemExit):  # a terminal that is gone takes no complaint either
                self._console.print(Text(f"{what} {why}", style="yellow"), soft_wrap=True)


class _NotebookTable:
    """The last rows of the log as a table under a progress bar, in one output of a notebook cell."""

    def __init__(self, total_steps: int):
        from transformers.utils.notebook import NotebookTrainingTracker

        self._tracker, self._step = NotebookTrainingTracker(total_steps), 0

    def show(self, step: int, cells: Mapping[str, str], at_once: bool) -> None:
        """Adds a row, or cells to the last row if it is of the same step; redraws a few times a second, or at once."""
        table, self._step = self._tracker.inner_table, step
        if table is not None and table[-1][0] != cells["step"]:
            cells = dict.fromkeys(table[0], "") | cells
        self._tracker.write_line(dict(cells))
        table = self._tracker.inner_table
        del table[1:-_NOTEBOOK_ROWS]
        heads = [*_COLUMNS.values()]  # these first, whatever was logged first; then others, then what is evaluated
        ranks = [heads.index(x) if x in heads else len(heads) + x.startswith("eval_") for x in table[0]]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        table[:] = [[row[k] if k < len(row) else "" for k in order] for row in table]
        self._tracker.update(step, force_update=at_once)

    def finish(self) -> None:
        """Shows all rows."""
        if self._tracker.inner_table is not None:
            self._tracker.update(self._step, force_update=True)


class _Worker:
    """Makes calls one after another in a thread of its own; the log is told what fails or does not answer."""

    def __init__(self, name: str, log: MetricLog):
        self._name, self._log = name, log
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._since: float | None = None  # when the call that is under way began
        self._thread = threading.Thread(target=self._work, name=f"gold_jax {name}", daemon=True)
        self._thread.start()

    def put(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Hands a call over."""
        self._calls.put(functools.partial(function, *arguments))

    def check(self) -> None:
        """Complains of a call that takes longer than `PATIENCE`."""
        since = self._since
        if since is not None and time.monotonic() - since > PATIENCE:
            self._log.complain(self._name, f"has not answered for {PATIENCE:g} seconds; the run continues.")

    def close(self) -> None:
        """Waits until all calls are made, but no longer than `PATIENCE`."""
        self._calls.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            what = f"{self._name} at the end"
            self._log.complain(what, "did not answer; what it has not taken is in metrics.jsonl alone.")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._since = time.monotonic()
            self._log.attempt(self._name, call)
            self._since = None


def trl_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a log line by TRL's names, of those that mean the same there."""
    found = {trl: values[name] for name, trl in _TRL_NAMES.items() if name in values}
    return found | ({"completions/clipped_ratio": 1.0 - values["stopped"]} if "stopped" in values else {})


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
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    kind = ".2e" if value != 0 and not 1e-3 <= abs(value) < 1e6 else ".0f" if abs(value) >= 1000 else ".4g"
    return f"{value:{kind}}"


class RunningMean:
    """Means of named values between two logs; never waits for a device."""

    def __init__(self):
        self._sums: dict[str, tuple[Any, Any]] = {}  # weighted sum and weight
        self._order: list[str] = []  # of names as they came first, so that logged lines have one

    def add(self, values: Mapping[str, Any], weight: Any = 1.0) -> None:
        """Take in values, each counted `weight` times (a number or array). Names may differ from call to call."""
        for name, value in values.items():
            total, counted = self._sums.get(name, (None, 0.0))
            value = value * weight
            self._sums[name] = (value if total is None else total + value), counted + weight

    def take(self) -> dict[str, Any]:
        """The weighted means since the last call, as numbers or arrays; resets them."""
        self._order = list(dict.fromkeys([*self._order, *self._sums]))
        found = {name: self._sums[name] for name in self._order if name in self._sums}
        means = {name: total / weight for name, (total, weight) in found.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list]:
        """What has been taken in since the last log, fit for JSON; waits for the device."""
        sums = self._sums.items()
        return {name: [float(x), str(getattr(x, "dtype", "")), float(weight)] for name, (x, weight) in sums}

    def restore(self, state: Mapping[str, Sequence]) -> None:
        """Goes on from what `state` gave, to the last bit."""
        for name, (total, dtype, weight) in state.items():
            self._sums[name] = np.dtype(dtype).type(total) if dtype else total, weight


def header(console: Console, title: str, rows: Mapping[str, Any], notices: Sequence[str] = ()) -> None:
    """Show what is about to run: a title, labels with their texts (None is left out), and a line for each notice."""
    lines = [(Text(label), str(value)) for label, value in rows.items() if value is not None]
    lines += [(Text("note", style="yellow"), notice) for notice in notices]
    if not console.is_terminal:
        console.print(Text("\n".join([title, *(f"  {label}: {value}" for label, value in lines)])), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, value in lines:
        grid.add_row(label, Text(value))
    console.print(Panel(grid, title=Text(title), title_align="left", expand=False))


def completions_table(
    console: Console, rows: Sequence[tuple[str, str]], n: int | None = None, step: int | None = None, limit: int = 600
) -> None:
    """Show the first `n` rows (None: all), cut to a prompt's last and a completion's first `limit` characters."""
    table = Table(title=None if step is None else f"Completions at step {step}", box=box.ROUNDED, show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for prompt, completion in rows[:n]:
        prompt = prompt if len(prompt) <= limit else "…" + prompt[-limit:]
        completion = completion if len(completion) <= limit else completion[:limit] + "…"
        table.add_row(Text(_printable(prompt)), Text(_printable(completion)))
    console.print(table)


def _printable(text: str) -> str:
    """Text that cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)


def before_after(console: Console, rows: Sequence[tuple[str, float | None, float | None, float | None]]) -> None:
    """Show what training changed: names with values before, after and of the teacher; None: not measured."""
    lines = []
    for _, *values in rows:
        before, after, teacher = ("" if value is None else shown(value) for value in values)
        change = f"{'+' if values[1] > values[0] else ''}{shown(values[1] - values[0])}" if before and after else ""
        lines.append((before, after, change, teacher))
    columns = [column for column in zip(("before", "after", "change", "teacher"), *lines) if any(column[1:])]
    table = Table("", box=box.SIMPLE_HEAD)
    for head, *_ in columns:
        table.add_column(head, justify="right")
    for (label, *_), *cells in zip(rows, *(column[1:] for column in columns)):
        table.add_row(Text(label), *cells)
    console.print(table)
