"""What is being compiled, and for how long, on the screen: on in the commands, off in the library.

On a terminal it is one line, while something is compiled; elsewhere a line for each program that took long.

Nothing here imports JAX when it is imported: a command answers `--help` before JAX is there.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

_EVENT = "/jax/core/compile/backend_compile_duration"
_SHORT = 0.5  # seconds that a terminal says nothing about
_LONG = 10.0  # seconds above which a program has a line where there is no terminal
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
_showing: list["_Progress"] | None = None  # None: no command is running


@contextlib.contextmanager
def stopped_afterwards() -> Iterator[None]:
    """Within it `show_compiling` shows something; afterwards nothing is shown any more."""
    global _showing
    before, _showing = _showing, []
    try:
        yield
    finally:
        for progress in _showing:
            progress.close()
        _showing = before


def show_compiling(stream: TextIO | None = None) -> None:
    """From now on says on `stream` (None: stderr) what JAX compiles, within `stopped_afterwards` alone."""
    if _showing is not None and not _showing:
        _showing.append(_Progress(sys.stderr if stream is None else stream))


class _Progress:
    """Listens to JAX, which tells the start and the end of each compilation by the program's name."""

    def __init__(self, stream: TextIO):
        import jax

        self._stream, self._on_terminal = stream, stream.isatty()
        self._name, self._begin, self._width = "", 0.0, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        jax.monitoring.register_scalar_listener(self._started)
        jax.monitoring.register_event_duration_secs_listener(self._finished)
        if self._on_terminal:
            threading.Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        """Says nothing more, and leaves the terminal's line empty. (Not every version of JAX lets a listener go.)"""
        self._closed.set()
        with self._lock:
            self._clear()

    def _started(self, event: str, value: float, **details: Any) -> None:
        if event == _EVENT and not self._closed.is_set():
            with self._lock:
                self._name, self._begin = _program(details), time.monotonic()

    def _finished(self, event: str, seconds: float, **details: Any) -> None:
        if event != _EVENT or self._closed.is_set():
            return
        with self._lock:
            self._name = ""
            self._clear()
            if not self._on_terminal and seconds >= _LONG:
                self._write(f"compiled {_program(details)} in {seconds:.0f} s\n")

    def _tick(self) -> None:
        while not self._closed.wait(_SHORT):
            with self._lock:
                seconds = time.monotonic() - self._begin
                if self._name and seconds >= _SHORT:
                    line = f"compiling {self._name}, {seconds:.0f} s"
                    self._write("\r" + line.ljust(self._width))
                    self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone ends no run
            self._stream.write(text)
            self._stream.flush()


def _program(details: dict[str, Any]) -> str:
    name = str(details.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
    return _WORDS.get(name, name)
