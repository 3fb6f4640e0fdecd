"""Tracing some of the steps of a training loop."""

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator

import jax

from gold_jax.profiling.scopes import save_scopes
from gold_jax.profiling.summary import summarize
from gold_jax.training.annotations import STEP, WAITING, annotate


def trace_steps(
    steps: Collection[int], numbers: Collection[int], folder: str | os.PathLike, *, block: Callable, report: Callable
) -> Iterator[int]:
    """Yields all `steps` (from 0) and traces what the loop does with those that `numbers` (from 1) name.

    The trace of consecutive steps lies in `folder/plugins/profile/steps_A-B`, where xprof, TensorBoard and Perfetto
    find it, beside `summary.json`; an earlier run's are deleted. `block` waits until the device has nothing to do, so
    that no step's work is in another's trace. After the last one `report` gets the summary, or `{"failed": why}`.
    """
    traced = set(numbers) & {step + 1 for step in steps}
    if not traced:
        yield from steps
        return
    folder, options = pathlib.Path(folder), jax.profiler.ProfileOptions()
    shutil.rmtree(folder / "plugins" / "profile", ignore_errors=True)
    for name in ("summary.json", "scopes.json"):
        (folder / name).unlink(missing_ok=True)
    options.python_tracer_level = 0  # every Python call would be an event, and slower
    options.host_tracer_level = 1
    for is_traced, run in itertools.groupby(steps, lambda step: step + 1 in traced):
        if not is_traced:
            yield from run
            continue
        run = list(run)
        first, last = run[0] + 1, run[-1] + 1
        options.session_id = f"steps_{first}-{last}" if last > first else f"step_{last}"
        block()
        with jax.profiler.trace(folder, profiler_options=options):
            for step in run:
                with jax.profiler.StepTraceAnnotation(STEP, step_num=step + 1):
                    yield step
                    with annotate(WAITING):
                        block()
        if last == max(traced):
            report(_write_summary(folder))


def _write_summary(folder: pathlib.Path) -> dict:
    """The summary, written to the folder. A trace that cannot be read does not end the run."""
    try:
        save_scopes(folder / "scopes.json")
        summary = summarize(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return summary
