"""What is under way and how far it is: bars on a terminal, a plain line once a minute elsewhere, nothing in the library.

Whatever may take longer than a second is a `task`, or goes through `track`; both do nothing but count unless a display is
on (`displayed`), which commands and a trainer's `train` have. JAX says what it compiles (`watch_compiling`): that is a line
of the display, and no part of the time that a task is said to have left.

Nothing here imports JAX or rich when it is imported: a command answers `--help` before they are there.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

DELAY = 1.0  # seconds after which a task is shown on a terminal
FIRST_LINE = 10.0  # and after which it has a line where there is none
EVERY = 60.0  # seconds between such lines
_REFRESH = 0.25  # seconds between two pictures of a terminal
_COMPILING = "/jax/core/compile/backend_compile_duration"
# What the programs that take long are, by their functions' names.
_WORDS = {
    "fused": "the update",
    "gradient": "the gradient",
    "add": "the gradient of a further micro-batch",
    "update": "the optimizer's update",
    "loss": "the evaluation",
    "teacher_forward": "the teacher's forward pass",
    "prefill_into_slots": "prefill",
    "decode_until": "decoding",
    "_completion_nll": "the scoring of completions",
}
_display: "_Display | None" = None
_compiled_seconds = 0.0  # of this process
_compilations = 0
_watching = False


class Task:
    """Something that is under way; `total` is None where nobody knows how much there is to do."""

    def __init__(self, name: str, total: int | None = None, done: int = 0):
        self.name, self.total, self.done, self._done_before = name, total, done, done
        self._began, self._compiled_before = time.monotonic(), _compiled_seconds

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count

    def reach(self, count: int) -> None:
        """So much is done."""
        self.done = count

    def rename(self, name: str) -> None:
        """It is shown under another name."""
        self.name = name

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds that it still takes if it goes on as so far, time spent compiling aside; None: that cannot be said yet."""
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
    """Shows, within it, that `name` is under way, so much `done` before; the task yielded is told what is done."""
    one = Task(name, total, done)
    with contextlib.nullcontext() if _display is None else _display.shown(one):
        yield one


def track(items: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """The items, each counted as done when the next one is asked for; `total` None: as many as `items` has, if it says."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with task(name, total) as one:
        for item in items:
            yield item
            one.advance()


@contextlib.contextmanager
def displayed(console: Any = None, enabled: bool = True) -> Iterator[None]:
    """Within it tasks are shown on a `rich` console; None: on the terminal that stdout is, else on stderr.

    Within another one it does nothing: there is one display.
    """
    global _display
    if _display is not None or not enabled:
        yield
        return
    _display = _Display(console)
    try:
        yield
    finally:
        off()


def off() -> None:
    """Shows nothing more, until another display."""
    global _display
    display, _display = _display, None
    if display is not None:
        display.close()


def console() -> Any:
    """The console of stdout that the display is on, for all that is printed there; None where there is none."""
    return None if _display is None or _display.console.stderr else _display.console


def said_something() -> None:
    """Tells the display that a line was printed, so that where there is no terminal its own can wait."""
    if _display is not None:
        _display.note_line()


def compiled() -> tuple[int, float]:
    """How many programs this process compiled since `watch_compiling`, and the seconds that it took."""
    return _compilations, _compiled_seconds


def watch_compiling() -> None:
    """Listens to JAX from now on, which tells the start and the end of each compilation by the program's name."""
    global _watching
    if _watching:
        return
    import jax

    _watching = True
    # For good: not every version of JAX lets a listener go.
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
    return _WORDS.get(name, name)


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Display:
    """Draws the tasks that are under way, from a thread of its own while there are any."""

    def __init__(self, console: Any):
        self._given, self._console, self._live = console, None, None
        self._tasks: list[Task] = []
        self.compiling: Task | None = None
        self.said = time.monotonic()  # when the last line was printed
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._thread: threading.Thread | None = None

    @property
    def console(self) -> Any:
        if self._console is None:
            from rich.console import Console

            self._console = self._given or Console(stderr=not sys.stdout.isatty())
        return self._console

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
        self._wake.set()
        try:
            yield
        finally:
            with self._lock:
                self._tasks.remove(one)
                if not self._tasks:
                    self._hide()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._hide()
        self._wake.set()

    def show_compiling(self, one: Task | None) -> None:
        self.compiling = one

    def note_line(self) -> None:
        """Somebody printed a line."""
        self.said = time.monotonic()

    def say(self, line: str) -> None:
        """Prints a line; a terminal that is gone ends no run."""
        self.note_line()
        with contextlib.suppress(OSError, ValueError):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> None:
        while not self._closed:
            self._wake.wait(None if not self._tasks else _REFRESH)
            self._wake.clear()
            with self._lock:
                if self._closed or not self._tasks:
                    continue
                if self.is_terminal:
                    self._refresh()
                else:
                    self._say_how_far()

    def _refresh(self) -> None:
        if self._live is None and self._tasks[0].elapsed >= DELAY:
            from rich.live import Live

            # Output that goes elsewhere is not the terminal's to redraw around.
            redirect = dict(redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty())
            picture = dict(get_renderable=self._picture, auto_refresh=False, transient=True)
            self._live = Live(console=self.console, **picture, **redirect)
            with contextlib.suppress(OSError, ValueError):
                self._live.start()
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.refresh()

    def _hide(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def _say_how_far(self) -> None:
        one, now = self._tasks[-1], time.monotonic()
        due = FIRST_LINE if self.said < now - one.elapsed else EVERY  # the first line of a task, or a further one
        if one.elapsed >= FIRST_LINE and now - self.said >= due:
            self.say(one.describe())

    def _picture(self) -> Any:
        """A line for each task that has lasted; takes no lock, for whoever prints draws it."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1), pad_edge=False)
        for _ in range(4):
            grid.add_column(no_wrap=True)
        width = min(24, max(8, self.console.width - 52))
        for one in (*self._tasks, self.compiling):
            if one is None or one.elapsed < DELAY:
                continue
            bar = ProgressBar(one.total, min(one.done, one.total), width=width) if one.total else Text("")
            count = f"{one.done:,}/{one.total:,}" if one.total else ""
            left = "" if one.left is None else f", {clock(one.left)} left"
            grid.add_row(Text(one.name, style="cyan"), bar, count, f"{clock(one.elapsed)}{left}")
        return grid
