"""What is shown of what is under way, on a terminal and elsewhere."""

import io
import threading
import time

import jax
import pytest
from rich.console import Console

from gold_jax import progress


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in dict(DELAY=0.02, FIRST_LINE=0.05, EVERY=0.1, _REFRESH=0.01).items():
        monkeypatch.setattr(progress, name, seconds)


def screen(terminal, width=80):
    options = dict(color_system=None, legacy_windows=False, _environ={"TERM": "xterm"})
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, **options)


def written(console):
    return console.file.getvalue()


def wait_until(there):
    end = time.monotonic() + 30
    while not there() and time.monotonic() < end:
        time.sleep(0.01)
    assert there()


def compile_for(seconds, name="jit(fused)", until=lambda: True):
    """What JAX tells when it compiles."""
    jax.monitoring.record_scalar(progress._COMPILING, 0.0, fun_name=name)
    wait_until(until)
    jax.monitoring.record_event_duration_secs(progress._COMPILING, seconds, fun_name=name)


def test_a_terminal_shows_what_is_under_way_and_nothing_of_it_stays(quick):
    console = screen(True)
    with progress.displayed(console):
        for n in progress.track(range(8), "evaluating"):
            if n == 3:
                wait_until(lambda: "3/8" in written(console))
        shown = written(console)
        assert "evaluating" in shown and "left" in shown and "\x1b[2K" in shown.split("left")[-1]  # the line is erased
    with progress.task("too late"):
        time.sleep(0.05)
    assert written(console) == shown


def test_a_task_in_a_task_has_a_line_below_and_both_fit_the_width(quick):
    console = screen(True, width=60)
    with progress.displayed(console), progress.task("training", 12_000, done=3) as outer:
        outer.advance(400)
        with progress.task("sampling", 64) as inner:
            inner.reach(12)
            wait_until(lambda: "12/64" in written(console))
    lines = [line.rstrip() for line in written(console).replace("\r", "\n").split("\n")]
    assert any("training" in line and "403/12,000" in line for line in lines)
    assert max(len(line.replace("\x1b[2K", "").replace("\x1b[1A", "")) for line in lines) <= 70  # with cursor codes


def test_a_long_name_leaves_the_time_left_on_the_screen(quick):
    console = screen(True, width=100)
    with progress.displayed(console), progress.task("stopping after this update (Ctrl-C: now)", 12_000) as one:
        one.advance(400)
        wait_until(lambda: "400/12,000" in written(console))
    assert any(line.rstrip().endswith("left") for line in written(console).replace("\r", "\n").split("\n"))


def test_what_is_short_is_not_shown():
    console = screen(True)
    with progress.displayed(console), progress.task("a moment"):
        time.sleep(0.01)
    assert written(console) == ""


def test_where_there_is_no_terminal_a_line_comes_from_time_to_time(quick):
    console = screen(False)
    with progress.displayed(console), progress.task("training", 100) as one:
        one.advance(25)
        wait_until(lambda: written(console).count("\n") >= 2)
    assert written(console).startswith("training 25/100, 0:00, 0:00 left\n")


def test_other_lines_put_it_off(quick, monkeypatch):
    console = screen(False)
    monkeypatch.setattr(progress, "EVERY", 60.0)
    with progress.displayed(console), progress.task("training", 100):
        for _ in range(10):
            progress.note_line()
            time.sleep(0.01)
    assert written(console) == ""


def test_time_left_counts_no_compiling(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    one = progress.Task("training", 50, done=10)
    assert one.left is None
    now[0] += 30
    progress._finished_compiling(progress._COMPILING, 20.0, fun_name="jit(fused)")
    one.advance(10)
    assert one.left == pytest.approx((30 - 20) / 10 * 30)


def test_what_is_compiled_is_named_and_counted(quick):
    progress.watch_compiling()
    progress.watch_compiling()  # once is enough
    before, console = progress.compiled(), screen(True)
    with progress.displayed(console), progress.task("training"):
        compile_for(0.5, until=lambda: "compiling the update" in written(console))
    count, seconds = progress.compiled()
    assert count == before[0] + 1 and seconds == pytest.approx(before[1] + 0.5)


def test_elsewhere_a_program_that_took_long_has_a_line(quick, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 10.0)
    progress.watch_compiling()
    console = screen(False)
    with progress.displayed(console):
        compile_for(1)
        compile_for(61, "jit(loss)")
    compile_for(61)
    assert written(console) == "compiled the evaluation in 1:01\n"


def test_jax_itself_tells_so():
    progress.watch_compiling()
    before = progress.compiled()[0]

    def a_program_of_its_own(x):
        return x * 3 + 1

    jax.jit(a_program_of_its_own)(1.5)
    assert progress.compiled()[0] == before + 1


def test_one_display_at_a_time_and_none_where_it_is_turned_off(quick):
    outer, inner = screen(False), screen(False)
    with progress.displayed(outer), progress.displayed(inner), progress.task("reading"):
        wait_until(lambda: written(outer))
    assert written(inner) == ""
    with progress.displayed(inner), progress.task("reading"):
        progress.stop_display()
        time.sleep(0.1)
    with progress.displayed(inner, enabled=False), progress.task("reading"):
        time.sleep(0.1)
    assert written(inner) == ""


def test_lines_printed_meanwhile_stand_above(quick):
    console = screen(True)
    with progress.displayed(console), progress.task("training", 10):
        wait_until(lambda: "training" in written(console))
        printing = threading.Thread(target=lambda: console.print("step 10"))
        printing.start()
        printing.join(10)
        assert not printing.is_alive() and "step 10" in written(console)


@pytest.mark.parametrize("seconds, text", [(7.4, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_a_clock(seconds, text):
    assert progress.clock(seconds) == text
