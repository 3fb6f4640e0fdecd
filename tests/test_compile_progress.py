"""What the commands say about compiling."""

import io
import time

import jax
import pytest

from gold_jax import compile_progress


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def compile_for(seconds, name="jit(fused)", until=lambda: True):
    """What JAX tells when it compiles; longer than `seconds`, where something else is waited for."""
    jax.monitoring.record_scalar(compile_progress._EVENT, 0.0, fun_name=name)
    end = time.monotonic() + 30
    time.sleep(seconds)
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    jax.monitoring.record_event_duration_secs(compile_progress._EVENT, seconds, fun_name=name)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(compile_progress, "_SHORT", 0.02)
    monkeypatch.setattr(compile_progress, "_LONG", 0.05)


def test_a_terminal_shows_what_is_being_compiled_while_it_is(quick):
    screen = Screen(terminal=True)
    with compile_progress.stopped_afterwards():
        compile_progress.show_compiling(screen)
        compile_for(0.05, until=screen.getvalue)
        shown = screen.getvalue()
        assert "\rcompiling the update, 0 s" in shown and shown.endswith(" \r") and "\n" not in shown
    compile_for(0.1)
    assert screen.getvalue() == shown


def test_elsewhere_a_program_that_took_long_has_a_line(quick):
    screen = Screen(terminal=False)
    with compile_progress.stopped_afterwards():
        compile_progress.show_compiling(screen)
        compile_progress.show_compiling(screen)  # once is enough
        compile_for(0.01)
        compile_for(0.06, "jit(loss)")
    assert screen.getvalue() == "compiled the evaluation in 0 s\n"


def test_outside_of_a_command_nothing_is_shown(quick):
    screen = Screen(terminal=False)
    compile_progress.show_compiling(screen)
    compile_for(0.06)
    with compile_progress.stopped_afterwards():
        compile_for(0.06)
    assert screen.getvalue() == ""


def test_jax_itself_tells_so(quick, monkeypatch):
    monkeypatch.setattr(compile_progress, "_LONG", 0.0)
    screen = Screen(terminal=False)
    with compile_progress.stopped_afterwards():
        compile_progress.show_compiling(screen)

        def a_program_of_its_own(x):
            return x * 3 + 1

        jax.jit(a_program_of_its_own)(1.5)
    assert "compiled a_program_of_its_own in 0 s\n" in screen.getvalue()
