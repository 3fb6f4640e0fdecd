"""What is under way and how far it is: bars on a terminal, elsewhere a line once a minute.

Whatever may take longer than a second is a `task`, or goes through `track`. Both only count unless a display is on
(`displayed`), as it is in commands and in a trainer's `train`. What JAX compiles (`watch_compiling`) is a line of the
display, and is left out of the time that a task has left.

JAX and rich are imported in functions: a command answers `--help` without them.
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

DELAY = 1.0  # seconds after which a task is shown on a terminal
FIRST_LINE = 10.0  # seconds after which it has a line where there is no terminal
EVERY = 60.0  # seconds between such lines
_REFRESH = 0.25  # seconds between two redraws of a terminal
_COMPILING = "/jax/core/compile/backend_compile_duration"
# What users call the programs that take long to compile, by their functions' names.
_PROGRAM_NAMES = {
    "fused": "the update",
    "gradient": "the gradient",
    "add": "the gradient of a further micro-batch",
    "update": "the optimizer's update",
    "loss": "the evaluation",
    "teacher_forward": "the teacher's forward pass",
    "prefill_into_slots": "prefill",
    "decode_until": "decoding",
    "decode_round": "decoding",
    "score_tokens": "the scoring of prompts",
    "_completion_logp": "the scoring of completions",
}
_display: "_Display | None" = None
_compiled_seconds = 0.0  # of this process
_compilations = 0
_watching = False


class Task:
    """Something that is under way, of which `done` of `total` is done; `total` None: unknown."""

    def __init__(self, name: str, total: int | None = None, done: int = 0):
        self.name, self.total, self.done, self._done_before = name, total, done, done
        self._began, self._compiled_before = time.monotonic(), _compiled_seconds

    def advance(self, count: int = 1) -> None:
        """Adds to what is done."""
        self.done += count

    def reach(self, count: int) -> None:
        """Sets what is done."""
        self.done = count

    def rename(self, name: str) -> None:
        """Changes the name that is shown."""
        self.name = name

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds that the rest takes at the rate so far, without the time of compiling; None: not known yet."""
        done = self.done - self._done_before
        if not self.total or not done:
            return None
        worked = self.elapsed - (_compiled_seconds - self._compiled_before)
        return max(0.0, worked) / done * (self.total - self.done)

    def describe(self) -> str:
        """Its name and how far it is, in one line."""
        count = "" if not self.total else f" {self.done:,}/{self.total:,}"
        left = "" if self.left is None else f", {clock(self.left)} left"
        return f"{self.name}{count}, {clock(self.elapsed)}{left}"


@contextlib.contextmanager
def task(name: str, total: int | None = None, done: int = 0) -> Iterator[Task]:
    """Shows in its context that `name` is under way, of which `done` was done before; yields the task, to be advanced."""
    one = Task(name, total, done)
    with contextlib.nullcontext() if _display is None else _display.shown(one):
        yield one


def track(items: Iterable[T], name: str) -> Iterator[T]:
    """Yields the items and shows how many are done, of `len(items)` if there is one."""
    with task(name, len(items) if hasattr(items, "__len__") else None) as one:
        for item in items:
            yield item
            one.advance()


@contextlib.contextmanager
def displayed(console: Any = None, enabled: bool = True) -> Iterator[None]:
    """Shows tasks in its context on a `rich` console; None: on stdout if it is a terminal, else on stderr.

    Inside another such context it does nothing: there is one display.
    """
    global _display
    if _display is not None or not enabled:
        yield
        return
    _display = _Display(console)
    try:
        yield
    finally:
        stop_display()


def stop_display() -> None:
    """Ends the display that is on."""
    global _display
    display, _display = _display, None
    if display is not None:
        display.close()


def console() -> Any:
    """The console of the display, through which to print while it is on; None: no display, or one on stderr."""
    return None if _display is None or _display.console.stderr else _display.console


def note_line() -> None:
    """Tells the display that a line was printed, so that without a terminal its own next line can wait."""
    if _display is not None:
        _display.note_line()


def compiled() -> tuple[int, float]:
    """How many programs this process compiled since `watch_compiling`, and the seconds that this took."""
    return _compilations, _compiled_seconds


def watch_compiling() -> None:
    """Listens to JAX's events from now on: start and end of each compilation, with the program's name."""
    global _watching
    if _watching:
        return
    import jax

    _watching = True
    # Never unregistered: not every version of JAX can.
    jax.monitoring.register_scalar_listener(_compiling)
    jax.monitoring.register_event_duration_secs_listener(_finished_compiling)


def _compiling(event: str, value: float, **details: Any) -> None:
    if event == _COMPILING and (display := _display) is not None:
        display.show_compiling(Task(f"compiling {_program(details)}"))


def _finished_compiling(event: str, seconds: float, **details: Any) -> None:
    global _compiled_seconds, _compilations
    if event != _COMPILING:
        return
    _compiled_seconds, _compilations = _compiled_seconds + seconds, _compilations + 1
    if (display := _display) is not None:
        display.show_compiling(None)
        if seconds >= FIRST_LINE and not display.is_terminal:
            display.say(f"compiled {_program(details)} in {clock(seconds)}")


def _program(details: dict[str, Any]) -> str:
    name = str(details.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
    return _PROGRAM_NAMES.get(name, name)


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Display:
    """Shows the tasks that are under way, from a thread of its own."""

    def __init__(self, console: Any):
        self._given, self._live = console, None
        self._tasks: list[Task] = []
        self.compiling: Task | None = None
        self.last_line = time.monotonic()  # when a line was last printed
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    @functools.cached_property
    def console(self) -> Any:
        from rich.console import Console

        return self._given or Console(stderr=not sys.stdout.isatty())

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @contextlib.contextmanager
    def shown(self, one: Task) -> Iterator[None]:
        with self._lock:
            self._tasks.append(one)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw, name="gold_jax progress", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._tasks.remove(one)
                if not self._tasks:
                    self._hide()

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._hide()

    def show_compiling(self, one: Task | None) -> None:
        self.compiling = one

    def note_line(self) -> None:
        """Somebody printed a line."""
        self.last_line = time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line; errors of a terminal that is gone are ignored, here as below."""
        self.note_line()
        with contextlib.suppress(OSError, ValueError):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        while not self._closed.wait(_REFRESH):
            with self._lock, contextlib.suppress(OSError, ValueError):
                if self._tasks and not self._closed.is_set():
                    (self._refresh if self.is_terminal else self._print_line)()

    def _refresh(self) -> None:
        if self._live is None and self._tasks[0].elapsed >= DELAY:
            from rich.live import Live

            # Only what is printed to the terminal must go through the live display.
            redirect = dict(redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty())
            options = dict(get_renderable=self._table, auto_refresh=False, transient=True)
            self._live = Live(console=self.console, **options, **redirect)
            self._live.start()
        if self._live is not None:
            self._live.refresh()

    def _hide(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def _print_line(self) -> None:
        one, now = self._tasks[-1], time.monotonic()
        due = FIRST_LINE if self.last_line < now - one.elapsed else EVERY  # the first line of a task, or a further one
        if one.elapsed >= FIRST_LINE and now - self.last_line >= due:
            self.say(one.describe())

    def _table(self) -> Any:
        """A row for each task older than `DELAY`. Takes no lock: rich calls it in whichever thread prints."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1), pad_edge=False)
        for _ in range(4):
            grid.add_column(no_wrap=True)
        shown = [one for one in (*self._tasks, self.compiling) if one is not None and one.elapsed >= DELAY]
        longest = max((len(one.name) for one in shown), default=0)
        width = min(24, max(8, self.console.width - longest - 28))
        for one in shown:
            bar = ProgressBar(one.total, min(one.done, one.total), width=width) if one.total else Text("")
            count = f"{one.done:,}/{one.total:,}" if one.total else ""
            left = "" if one.left is None else f", {clock(one.left)} left"
            grid.add_row(Text(one.name, style="cyan"), bar, count, f"{clock(one.elapsed)}{left}")
        return grid
