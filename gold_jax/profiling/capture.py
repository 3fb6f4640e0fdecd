"""Tracing some of the steps of a training loop."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from gold_jax.profiling.scopes import save_scopes
from gold_jax.profiling.summary import summarize
from gold_jax.training.annotations import STEP, WAITING, annotate


def trace_steps(
    steps: Collection[int],
    numbers: Collection[int],
    folder: str | os.PathLike,
    *,
    block: Callable[[], Any],
    report: Callable[[dict], Any],
) -> Iterator[int]:
    """Yields all steps and traces those that were chosen; what the loop does with a step lies in its trace.

    Args:
        steps: the steps, counted from 0.
        numbers: those to trace, counted from 1.
        folder: where traces and the summary go; an earlier run's are deleted.
        block: waits until the device has nothing to do, so that no step's work is in another's trace.
        report: gets the summary after the last traced step; where it cannot be made, `{"failed": why}`.
    """
    traced = sorted(set(numbers) & {step + 1 for step in steps})
    if not traced:
        yield from steps
        return
    folder = pathlib.Path(folder)
    shutil.rmtree(folder / "plugins" / "profile", ignore_errors=True)
    for name in ("summary.json", "scopes.json"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.ExitStack() as trace:
        for step in steps:
            number = step + 1
            if number not in traced:
                yield step
                continue
            if number - 1 not in traced:
                block()
                last = next(n for n in range(number, traced[-1] + 1) if n + 1 not in traced)
                trace.enter_context(_trace(folder, f"steps_{number}-{last}" if last > number else f"step_{number}"))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield step
                with annotate(WAITING):
                    block()
            if number + 1 not in traced:
                trace.close()
            if number == traced[-1]:
                report(_write_summary(folder))


def _trace(folder: pathlib.Path, name: str) -> contextlib.AbstractContextManager:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event, and slower
    options.host_tracer_level = 1
    options.session_id = name
    return jax.profiler.trace(folder, profiler_options=options)


def _write_summary(folder: pathlib.Path) -> dict:
    """The summary, written to the folder. A trace that cannot be read does not end the run."""
    try:
        save_scopes(folder / "scopes.json")
        summary = summarize(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return summary
