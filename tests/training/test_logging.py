import io
import json
import re
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from run_files import lines

from gold_jax.training import logging
from gold_jax.training.logging import (
    MetricLog,
    RunningMean,
    before_after,
    completions_table,
    header,
    json_line,
    plain_value,
    shown,
)


def console(terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def written(console):
    return console.file.getvalue()


def rows_of(path):
    """The lines of a file; each has a time, which is left out."""
    rows = lines(path)
    assert all(abs(row.pop("time") - time.time()) < 3600 for row in rows)
    return rows


def test_every_logged_step_is_one_json_object_with_plain_numbers(tmp_path):
    path = tmp_path / "made" / "metrics.jsonl"
    with MetricLog(path) as log:
        log.log(1, {"loss": jnp.float32(0.5), "tokens": np.int64(7), "kind": "gold", "none": None}, epoch=0.25)
        log.log(2, {"loss": 0.25})
    assert rows_of(path) == [
        {"step": 1, "epoch": 0.25, "loss": 0.5, "tokens": 7, "kind": "gold", "none": None},
        {"step": 2, "loss": 0.25},
    ]


def test_a_log_is_continued_and_not_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with MetricLog(path) as log:
            log.log(step, {})
    assert [row["step"] for row in rows_of(path)] == [1, 2]


def test_numbers_that_json_lacks_become_null_and_are_named():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json_line({"loss": float("nan"), "grad_norm": float("inf"), "step": 3})
    assert json.loads(line, parse_constant=refuse) == {
        **{"loss": None, "grad_norm": None, "step": 3},
        "nonfinite": {"loss": "nan", "grad_norm": "inf"},
    }
    assert "nonfinite" not in json_line({"loss": 1.0})


def test_a_line_stands_in_the_file_before_the_log_is_closed(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.log(1, {"loss": 1.0})
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    log.close()
    log.close()


class Recorder:
    def __init__(self, error=None):
        self.calls, self.closed, self.error = [], False, error

    def log(self, values, step):
        self.calls.append((dict(values), step))
        if self.error:
            raise self.error

    def close(self):
        self.closed = True


def test_trackers_get_every_step_and_are_closed(tmp_path):
    tracker = Recorder()
    with MetricLog(None, trackers=[tracker]) as log:
        log.log(4, {"loss": jnp.float32(2.0)}, epoch=1.0)
    assert tracker.calls == [({"epoch": 1.0, "loss": 2.0}, 4)]
    assert tracker.closed


def test_a_tracker_that_fails_is_reported_once_and_the_rest_goes_on(tmp_path):
    screen, failing, working = console(terminal=False), Recorder(OSError("[gone]")), Recorder()
    with MetricLog(tmp_path / "metrics.jsonl", screen, [failing, working]) as log:
        for step in range(3):
            log.log(step, {"loss": 1.0})
    assert written(screen).count("Recorder failed, and the run continues without it: OSError: [gone]") == 1
    assert len(working.calls) == len(failing.calls) == len(rows_of(tmp_path / "metrics.jsonl")) == 3
    assert failing.closed


def test_a_tracker_that_does_not_answer_is_reported_and_waited_for_no_longer(monkeypatch, tmp_path):
    monkeypatch.setattr(logging, "PATIENCE", 0.05)
    answer = threading.Event()

    class Silent(Recorder):
        def log(self, values, step):
            answer.wait(60)

    screen = console(terminal=False)
    log = MetricLog(tmp_path / "metrics.jsonl", screen, trackers=[Silent()])
    for step in (1, 2, 3):
        log.log(step, {"loss": 1.0})
        time.sleep(0.06)
    log.close()
    answer.set()
    said = written(screen)
    assert said.count("Silent has not answered") == 1 and "Silent at the end did not answer" in said
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), SystemExit(1)], ids=["full disk", "closed pipe, as rich has it"]
)
def test_a_terminal_that_is_gone_costs_its_lines_alone(tmp_path, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    log = MetricLog(tmp_path / "metrics.jsonl", Console(file=Gone(), width=80))
    for step in (1, 2):
        log.log(step, {"loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_mean_goes_on_where_another_stood_to_the_last_bit():
    values = [{"loss": jnp.float32(0.1 * i), "share": 0.3 * i} for i in range(7)]
    whole, first, second = RunningMean(), RunningMean(), RunningMean()
    for row in values:
        whole.add(row)
    for row in values[:3]:
        first.add(row)
    second.restore(json.loads(json.dumps(first.state())))
    for row in values[3:]:
        second.add(row)
    one, other = whole.take(), second.take()
    assert all(plain_value(one[name]) == plain_value(other[name]) for name in one)


def test_logging_does_not_wait_for_a_slow_tracker():
    release = threading.Event()

    class Slow(Recorder):
        def log(self, values, step):
            release.wait(10)
            super().log(values, step)

    tracker = Slow()
    log = MetricLog(None, trackers=[tracker])
    log.log(1, {})
    log.log(2, {})
    assert tracker.calls == []  # both calls came back though the tracker still hangs
    release.set()
    log.close()
    assert [step for _, step in tracker.calls] == [1, 2]


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_terminal_shows_one_head_and_aligned_lines_that_fit(width):
    screen = console(terminal=True, width=width)
    metrics = {"distillation": 0.4, "loss": 0.5, "learning_rate": 1e-7, "tokens_per_second": 1234.5, "grad_norm": 2.0}
    with MetricLog(None, screen, total_steps=120) as log:
        log.log(1, metrics, left=3723)
        log.log(20, metrics | {"loss": float("nan"), "learning_rate": 2e-7}, epoch=0.5, left=9.6)
        log.log(21, {"loss": 0.5})  # a line that has less keeps its columns
        log.log(21, {"eval_loss": 0.75})
    lines = written(screen).splitlines()
    heads = ["step", "loss", "grad", "norm", "tokens/s", "left", "lr"]
    assert lines[0].split()[:7] == heads
    assert lines[1].split()[:5] == ["1/120", "0.5", "2", "1234", "1:02:03"]
    lines = [line for line in lines if line.split() and line.split()[0] != "step"] if width > 60 else lines[1:]
    assert lines[1].split()[:5] == ["20/120", "nan", "2", "1234", "0:10"] and lines[2].split() == ["21/120", "0.5"]
    assert max(map(len, lines)) <= width and len({len(line) for line in lines[1:3]}) == 1
    assert written(screen).splitlines()[-1] == "step 21/120  eval_loss 0.75"


def test_heads_stand_again_after_many_lines():
    screen = console(terminal=True)
    with MetricLog(None, screen) as log:
        for step in range(60):
            log.log(step, {"loss": 0.5})
    assert [line.split() for line in written(screen).splitlines()].count(["step", "loss"]) == 3


def test_a_file_gets_plain_lines_of_names_and_numbers():
    screen = console(terminal=False, width=20)
    with MetricLog(None, screen, total_steps=40) as log:
        log.log(10, {"learning_rate": 1e-7, "loss": 0.123456, "tokens_per_second": 12345.6}, epoch=0.5, left=61)
    line = "step 10/40  loss 0.1235  tokens_per_second 12346  left 1:01  learning_rate 1.00e-07  epoch 0.5\n"
    assert written(screen) == line


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (3, "3"),
        (1e-7, "1.00e-07"),
        (1.23456, "1.235"),
        (-2e7, "-2.00e+07"),
        (float("inf"), "inf"),
        ("x", "x"),
    ],
)
def test_numbers_are_shown_in_few_characters(value, text):
    assert shown(value) == text


def test_means_are_weighted_and_start_anew_when_taken():
    mean = RunningMean()
    mean.add({"loss": jnp.float32(1.0), "rare": 5.0}, weight=1)
    mean.add({"loss": jnp.float32(4.0)}, weight=3)
    assert {name: float(value) for name, value in mean.take().items()} == {"loss": 3.25, "rare": 5.0}
    mean.add({"loss": 2.0})
    assert mean.take() == {"loss": 2.0}
    assert mean.take() == {}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_header_shows_its_rows_and_notices(terminal):
    screen = console(terminal)
    header(screen, "gold_jax.train", {"student": "S [x]", "loss": "gold", "missing": None}, ["--tf32: XLA chooses."])
    text = written(screen)
    assert all(part in text for part in ("gold_jax.train", "S [x]", "loss", "--tf32: XLA chooses."))
    assert "missing" not in text
    assert ("╭" in text) == terminal


def test_completions_are_shown_as_they_are_but_cannot_steer_the_terminal():
    screen = console(terminal=False)
    completions_table(screen, [("a [bold]prompt[/bold]", "x\x1b[2Jy"), ("second", "z")], n=1, step=7)
    text = written(screen)
    assert "[bold]prompt[/bold]" in text and "\x1b" not in text and "Completions at step 7" in text
    assert "second" not in text


def test_long_texts_keep_the_end_of_a_prompt_and_the_start_of_a_completion():
    screen = console(terminal=False)
    completions_table(screen, [("A" * 20 + "p", "c" + "B" * 20)], limit=5)
    text = written(screen)
    assert "…AAAAp" in text and "cBBBB…" in text


def test_the_closing_table_shows_what_changed():
    screen = console(terminal=False)
    before_after(screen, [("eval_loss", 2.0, 1.5, None), ("reward", 0.25, 0.5, None), ("new", None, 1.0, None)])
    lines = [line.split() for line in written(screen).splitlines()]
    assert ["eval_loss", "2", "1.5", "-0.5"] in lines
    assert ["reward", "0.25", "0.5", "+0.25"] in lines
    assert ["new", "1"] in lines


def test_the_closing_table_has_only_columns_that_were_measured():
    screen = console(terminal=False)
    before_after(screen, [("loss", None, 0.5, None), ("bits per byte", None, 0.25, 0.125)])
    lines = [line.split() for line in written(screen).splitlines()]
    assert ["after", "teacher"] in lines and ["bits", "per", "byte", "0.25", "0.125"] in lines


def test_in_a_notebook_the_log_is_one_table_that_grows_under_a_bar(monkeypatch):
    sent = []
    handle = types.SimpleNamespace(update=sent.append)
    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda html, display_id: sent.append(html) or handle
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setattr(sys.modules["IPython"], "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    with MetricLog(None, console(False), total_steps=300, in_notebook=True) as log:
        log.log(0, {"eval_loss": 1.5})
        for step in range(1, 251):
            log.log(step, {"loss": step / 2, "learning_rate": 1e-7}, left=3.0)
        log.log(250, {"eval_loss": 0.25})
    del sys.modules["transformers.utils.notebook"]  # another test finds the real one
    head, *rows = re.findall(r"<tr.*?</tr>", sent[-1], re.S)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert re.findall(r"<th>(.*?)</th>", head) == ["step", "loss", "lr", "eval_loss"]
    assert len(rows) == 200 and cells[0] == ["51", "25.5", "1.00e-07", ""]
    assert cells[-1] == ["250", "125", "1.00e-07", "0.25"]
    assert "<progress value='250' max='300'" in sent[-1] and 1 < len(sent) <= 253
