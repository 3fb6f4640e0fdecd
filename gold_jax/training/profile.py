"""`--profile_steps`: traces of chosen steps, and from them a table of where a step's time goes.

A profiled step is one turn of the training loop: an update, and beside it the making of the next update's batches.
The trace of steps that follow each other lies in `FOLDER/plugins/profile/steps_A-B`, where xprof, TensorBoard and
Perfetto find it; the table's numbers lie in `FOLDER/summary.json`.
"""

import collections
import contextlib
import copy
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gold_jax.training.timesheet import Sheet, shared, sheets, union, within
from gold_jax.training.trace import (
    COMPILING,
    PARTS,
    PREFIX,
    STEP,
    Operation,
    Trace,
    holds_others,
    part_of,
    read_trace,
)

ENCODING, ALIGNMENT, BATCHES = "rendering and encoding", "alignment", "padding and batches"
STARTING = "starting programs"
SAMPLER, WAITING = "waiting for the sampler", "waiting for the update"
EVALUATION, SAVING = "evaluation", "saving"
AHEAD = (ENCODING, ALIGNMENT, BATCHES)  # done for the next update, beside this one
HOST = (*AHEAD, SAMPLER, STARTING, COMPILING, WAITING, EVALUATION, SAVING)
DEVICE = ("student forward", "student backward", *PARTS.values(), EVALUATION)
OTHER, IDLE = "other", "idle"
HEAVIEST = 10  # operations that a summary names

# Methods of windows and chat tokenizers whose time is a part of its own. A window's own time is that of its batches.
_WINDOWS = {"train": BATCHES, "_rows": ALIGNMENT, "_sample": SAMPLER, "sync": SAMPLER}
_CODECS = ("student", "teacher", "codec")
_ENCODES = ("render", "with_context", "encode_prompt", "encode_prompts", "encode_completions", "encode_turns")


def host_annotation(name: str) -> jax.profiler.TraceAnnotation:
    """Marks a block as a part of the host's work in a trace; without one it does nothing."""
    return jax.profiler.TraceAnnotation(PREFIX + name)


def annotate_host(name: str) -> Callable[[Callable], Callable]:
    """`host_annotation` around every call of a function."""
    return functools.partial(jax.profiler.annotate_function, name=PREFIX + name)


def watched(batch_builder: Any) -> Any:
    """A copy of a window maker whose encoding, alignment, padding and sampling are told apart in a trace.

    What it calls, the text package above all, knows nothing of profilers; and a run that is not profiled has no such
    copy.
    """
    twin = copy.copy(batch_builder)
    chat_tokenizers = {
        id(c): _with_parts(c, dict.fromkeys(_ENCODES, ENCODING)) for c in _codecs(batch_builder).values()
    }
    for name, chat_tokenizer in _codecs(batch_builder).items():  # one chat tokenizer in two places stays one
        setattr(twin, name, chat_tokenizers[id(chat_tokenizer)])
    parts = _WINDOWS if hasattr(batch_builder, "teacher") else {**_WINDOWS, "_rows": ENCODING}
    return _with_parts(twin, parts)


def _codecs(windows: Any) -> dict[str, Any]:
    return {name: getattr(windows, name) for name in _CODECS if hasattr(windows, name)}


def _with_parts(whole: Any, parts: Mapping[str, str]) -> Any:
    twin = copy.copy(whole)
    for name, part in parts.items():
        if callable(getattr(twin, name, None)):
            setattr(twin, name, annotate_host(part)(getattr(twin, name)))
    return twin


def profiled(
    total: int,
    numbers: Collection[int],
    folder: str | os.PathLike,
    *,
    settle: Callable[[], Any],
    show: Callable[[dict], Any],
    first: int = 0,
) -> Iterator[int]:
    """The steps `first`, …, `total - 1`, some of them traced. With no numbers it is a range.

    Args:
        total: how many steps there are.
        numbers: the steps to trace, counted from 1.
        folder: where traces and the summary go; an earlier run's are deleted.
        settle: waits until the device has nothing to do: no step's work is in another's trace.
        show: gets the summary after the last of the steps; where there is none, `{"failed": why}`.
        first: the step to begin with; what was to be traced before it is not.
    """
    numbers = [number for number in numbers if number > first]
    if not numbers:
        yield from range(first, total)
        return
    folder = pathlib.Path(folder)
    shutil.rmtree(folder / "plugins" / "profile", ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)
    with contextlib.ExitStack() as tracing:
        for step in range(first, total):
            number = step + 1
            if number not in numbers:
                yield step
                continue
            if number - 1 not in numbers:
                settle()
                tracing.enter_context(_tracing(folder, number, _last(number, numbers)))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield step
                with host_annotation(WAITING):
                    settle()
            if number + 1 not in numbers:
                tracing.close()
            if number == max(numbers):
                show(_written(folder))


def _last(number: int, numbers: Collection[int]) -> int:
    while number + 1 in numbers:
        number += 1
    return number


@contextlib.contextmanager
def _tracing(folder: pathlib.Path, first: int, last: int) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would be an event, and slower
    options.host_tracer_level = 1
    options.session_id = f"steps_{first}-{last}" if last > first else f"step_{first}"
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def _written(folder: pathlib.Path) -> dict:
    """The summary, written to the folder. Whatever is wrong with a trace, the run that made it goes on."""
    try:
        summary = summarise(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return summary


def summarise(folder: str | os.PathLike) -> dict[str, Any]:
    """Where the time of the steps that were traced into a folder went.

    Args:
        folder: `output_dir/profile` of a run with `--profile_steps`, or any folder above `.xplane.pb` files.

    Returns:
        `steps` and `mean`, which hold for each step and on average, in seconds: `wall`; `device` and `host` by part,
        each adding up to `wall`; `ahead`, the host's work for the next update: `seconds`, and `hidden`, how much of it
        ran while the device was busy. `operations`: the heaviest, with `seconds` and `count` in a step. `device`: which
        one it was.

    Raises:
        FileNotFoundError: the folder holds no trace.
        ValueError: a trace holds no step.
    """
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(
            f"{os.fspath(folder)} holds no trace (no .xplane.pb file); make one with --profile_steps"
        )
    steps, device = [], ""
    seconds: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    for file in files:
        trace = read_trace(file)
        device = trace.device
        found = _sheets(trace)
        steps += [_step(sheet) for sheet in found]
        for sheet in found:
            for operation, spent in sheet.operations.items():
                seconds[_row(trace, operation)] += spent
        for span in (span for spans in trace.threads for span in spans):
            if any(step.start <= span.start < step.end for step in trace.steps):
                counts[_row(trace, span.what)] += 1
    steps.sort(key=lambda step: step["step"])
    operations = [
        {"name": name, "part": part, "scope": scope, "seconds": spent / len(steps), "count": counts[row] / len(steps)}
        for row, spent in seconds.most_common(HEAVIEST)
        for name, part, scope in (row,)
    ]
    return {"device": device, "steps": steps, "mean": _mean(steps), "operations": operations}


def _sheets(trace: Trace) -> list[Sheet]:
    evaluated = union(span for span in trace.host if span.what == EVALUATION)
    return sheets(
        trace.steps,
        # An evaluation encodes and pads too, but not for the next update.
        [span for span in trace.host if span.what in (EVALUATION, COMPILING) or not within(span, evaluated)],
        shared(trace.threads, trace.running, lambda operation: holds_others(trace.source(operation))),
        part=lambda operation: trace.source(operation).part or OTHER,
        apart=EVALUATION,
    )


def _row(trace: Trace, operation: Operation) -> tuple[str, str, str]:
    """Programs that were compiled for several shapes have the same operations under the same names, nearly always."""
    source = trace.source(operation)
    return operation.name, source.part or OTHER, source.scope


def _step(sheet: Sheet) -> dict[str, Any]:
    device = {name: sheet.device[name] for name in (*DEVICE, OTHER)}
    host = {name: sheet.host[name] for name in HOST}
    device[IDLE] = sheet.wall - sum(device.values())
    host[OTHER] = sheet.wall - sum(host.values())
    ahead = {"seconds": sum(host[name] for name in AHEAD), "hidden": sum(sheet.hidden[name] for name in AHEAD)}
    return {"step": sheet.number, "wall": sheet.wall, "device": device, "host": host, "ahead": ahead}


def _mean(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(*values):
        if isinstance(values[0], Mapping):
            return {name: mean(*(value[name] for value in values)) for name in values[0]}
        return sum(values) / len(values)

    return mean(*({name: value for name, value in step.items() if name != "step"} for step in steps))


def show_summary(console: Console, summary: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Prints what `summarise` found: the parts of a step, what overlapped, the heaviest operations."""
    if "failed" in summary:
        said = f"The trace in {os.fspath(folder)} could not be summarised: {summary['failed']}"
        console.print(Text(said, "yellow"), soft_wrap=True)
        return
    steps, mean = summary["steps"], summary["mean"]
    numbers = ", ".join(str(step["step"]) for step in steps)
    table = Table(
        box=box.SIMPLE_HEAD, title=f"Where the time goes: step {numbers}, {summary['device']}", title_justify="left"
    )
    table.add_column("")
    for head in (
        "s" if len(steps) == 1 else "mean s",
        "%",
        *(f"step {s['step']}" for s in steps if 1 < len(steps) <= 4),
    ):
        table.add_column(head, justify="right")

    def row(name: str, *path: str, style: str = "") -> None:
        def at(found):
            return functools.reduce(lambda value, key: value[key], path, found)

        share = 100 * at(mean) / mean["wall"]
        each = [f"{at(step):.3f}" for step in steps if 1 < len(steps) <= 4]
        table.add_row(Text(name, style), f"{at(mean):.3f}", f"{share:.1f}", *each)

    row("step", "wall", style="bold")
    for side in ("device", "host"):
        table.add_section()
        table.add_row(Text(side, "bold"))
        for name, spent in mean[side].items():
            if spent > 0 or name in (OTHER, IDLE):
                row(f"  {name}", side, name)
    table.add_section()
    row("the next update's rows", "ahead", "seconds", style="bold")
    row("  while the device is busy", "ahead", "hidden")
    console.print(table)
    ahead = mean["ahead"]
    share = 100 * ahead["hidden"] / ahead["seconds"] if ahead["seconds"] else 0.0
    said = (
        f"The next update's rows took the host {ahead['seconds']:.3f} s, of which {ahead['hidden']:.3f} s ({share:.0f} %) "
        "while the device was busy. Operations that ran at once share their time."
    )
    compiled = [str(step["step"]) for step in steps if step["host"][COMPILING] > 0.01 * step["wall"]]
    if compiled:
        said += f" New programs were compiled in step {', '.join(compiled)}, which is not its usual time."
    console.print(Text(said))
    console.print()
    console.print(Text(f"The {len(summary['operations'])} heaviest operations, in a step", "italic"))
    for found in summary["operations"]:
        spent = f"{found['seconds']:8.3f} s {100 * found['seconds'] / mean['wall']:5.1f} %{found['count']:8.3g} × "
        line = Text(f"{spent} {found['name']:24} {found['part']}: {_short(found['scope'])}")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(Text(f"The trace and summary.json are in {os.fspath(folder)}"), soft_wrap=True)


def _short(scope: str) -> str:
    """A scope without what the part says already, and what every scope has."""
    components = [c for c in scope.split("/") if part_of(c) is None and c != "closed_call"]
    return "/".join(components[1:] or components) or "added by the compiler"
