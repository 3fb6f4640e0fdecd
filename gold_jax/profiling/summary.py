"""The summary of a profile: seconds by part for each traced step, the heaviest operations, and a table of both."""

import collections
import functools
import itertools
import operator
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gold_jax.profiling.breakdown import OTHER, StepTimes, step_times
from gold_jax.profiling.scopes import PARTS, load_scopes, part_of
from gold_jax.profiling.trace import COMPILING, read_trace
from gold_jax.training.annotations import ALIGNMENT, BATCHES, DISPATCH, ENCODING, EVALUATION, SAMPLER, SAVING, WAITING

AHEAD = (ENCODING, ALIGNMENT, BATCHES)  # done for the next update, beside this one
HOST = (*AHEAD, SAMPLER, DISPATCH, COMPILING, WAITING, EVALUATION, SAVING)
DEVICE = ("student forward", "student backward", *dict.fromkeys(PARTS.values()), EVALUATION)
IDLE = "idle"
HEAVIEST = 10  # operations that a summary names


def summarize(folder: str | os.PathLike) -> dict[str, Any]:
    """Where the time of the steps went that were traced into a folder, or those below it.

    Returns:
        `steps` and `mean`, which hold for each step and on average, in seconds: `wall`; `device` and `host` by part,
        each adding up to `wall`; `ahead`, the host's work for the next update: `seconds`, and `hidden`, how much of it
        ran while the device was busy. `operations`: the heaviest, with `seconds` and `count` in a step. `device`: which
        one it was.

    FileNotFoundError: the folder holds no trace. ValueError: a trace holds no step.
    """
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace (no .xplane.pb file); make one with --profile_steps")
    programs = load_scopes(pathlib.Path(folder) / "scopes.json")
    steps, device, seconds, counts = [], "", collections.Counter(), collections.Counter()
    for file in files:
        trace = read_trace(file, programs)
        device = trace.device
        for times in step_times(trace):
            steps.append(_by_part(times))
            # Programs compiled for several shapes have the same operations under the same names, nearly always.
            for operation, spent in times.operations.items():
                seconds[operation[1:]] += spent
        for span in itertools.chain(*trace.threads):
            counts[span.what[1:]] += any(step.start <= span.start < step.end for step in trace.steps)
    steps.sort(key=lambda step: step["step"])
    operations = [
        {"name": name, "part": part or OTHER, "scope": scope}
        | {"seconds": spent / len(steps), "count": counts[name, part, scope] / len(steps)}
        for (name, part, scope), spent in seconds.most_common(HEAVIEST)
    ]
    return {"device": device, "steps": steps, "mean": _mean(*steps), "operations": operations}


def _by_part(times: StepTimes) -> dict[str, Any]:
    device = {name: times.device.get(name, 0.0) for name in (*DEVICE, OTHER)}
    host = {name: times.host.get(name, 0.0) for name in HOST}
    device[IDLE] = times.wall - sum(device.values())
    host[OTHER] = times.wall - sum(host.values())
    ahead = {"seconds": sum(host[n] for n in AHEAD), "hidden": sum(times.hidden.get(n, 0.0) for n in AHEAD)}
    return {"step": times.number, "wall": times.wall, "device": device, "host": host, "ahead": ahead}


def _mean(*values: Any) -> Any:
    """The mean of numbers, or of each number in dicts of them; what a step is called has none."""
    if isinstance(values[0], Mapping):
        return {name: _mean(*(value[name] for value in values)) for name in values[0] if name != "step"}
    return sum(values) / len(values)


def print_summary(console: Console, summary: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Prints what `summarize` found: the parts of a step, what overlapped, the heaviest operations."""
    if "failed" in summary:
        said = f"The trace in {folder} could not be summarised: {summary['failed']}"
        console.print(Text(said, "yellow"), soft_wrap=True)
        return
    steps, mean = summary["steps"], summary["mean"]
    each = steps if 1 < len(steps) <= 4 else []
    title = f"Where the time goes: step {', '.join(str(step['step']) for step in steps)}, {summary['device']}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("")
    for head in ("s" if len(steps) == 1 else "mean s", "%", *(f"step {step['step']}" for step in each)):
        table.add_column(head, justify="right")

    def row(name: str, *path: str, style: str = "") -> None:
        whole, *parts = (functools.reduce(operator.getitem, path, found) for found in (mean, *each))
        numbers = f"{whole:.3f}", f"{100 * whole / mean['wall']:.1f}", *(f"{part:.3f}" for part in parts)
        table.add_row(Text(name, style), *numbers)

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
    ahead, hidden = mean["ahead"]["seconds"], mean["ahead"]["hidden"]
    share = 100 * hidden / ahead if ahead else 0.0
    said = f"The next update's rows took the host {ahead:.3f} s, of which {hidden:.3f} s ({share:.0f} %) "
    said += "while the device was busy. Operations that ran at once share their time."
    compiled = [str(step["step"]) for step in steps if step["host"][COMPILING] > 0.01 * step["wall"]]
    if compiled:
        said += f" New programs were compiled in step {', '.join(compiled)}, which is not its usual time."
    console.print(Text(f"{said}\n"))
    console.print(Text(f"The {len(summary['operations'])} heaviest operations, in a step", "italic"))
    for found in summary["operations"]:
        spent = f"{found['seconds']:8.3f} s {100 * found['seconds'] / mean['wall']:5.1f} %{found['count']:8.3g} × "
        line = Text(f"{spent} {found['name']:24} {found['part']}: {_short(found['scope'])}")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(Text(f"The trace and summary.json are in {folder}"), soft_wrap=True)


def _short(scope: str) -> str:
    """A scope without what the part says already, and what every scope has."""
    components = [c for c in scope.split("/") if not part_of(c) and c != "closed_call"]
    return "/".join(components[1:] or components) or "added by the compiler"
