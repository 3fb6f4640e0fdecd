"""Curves of the logged metrics of one or two runs."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gold_jax.reporting.run import Run, number, of_set

MOST_POINTS = 2000  # of a line; longer ones are averaged over neighbours


class Line(NamedTuple):
    """One metric of one run."""

    run: int  # which of the runs
    kind: int  # which of the plot's metrics
    label: str
    steps: list[int]
    values: list[float]  # NaN where it was not finite


class Plot(NamedTuple):
    """Metrics with one unit."""

    title: str
    unit: str
    lines: list[Line]


# Title, unit, and metrics with their labels; those of `eval_` have a line for each evaluation set.
_PLOTS = (
    ("loss", "", {"loss": "training", "eval_loss": "evaluation"}),
    ("gaps to the teacher", "bits per byte", {"eval_forward_gap": "forward", "eval_reverse_gap": "reverse"}),
    ("bits per byte", "", {"eval_bits_per_byte": "evaluation"}),
    ("exact match", "share of rows", {"eval_exact_match": "evaluation"}),
    ("entropy", "bits per byte", {"eval_entropy": "student"}),
    ("groups 1:1", "share of groups", {"one_to_one": "training"}),
    ("completion length", "tokens", {"completion_tokens": "student"}),
    ("gradient norm", "", {"grad_norm": "training"}),
    ("time per update", "seconds", {"seconds": "training"}),
    ("tokens a second", "", {"tokens_per_second": "training"}),
    ("memory", "GiB", {"memory_gib": "most so far"}),
)


def plots_of(runs: Sequence[Run]) -> tuple[list[Plot], list[str], list[str]]:
    """The plots with data, the titles of those without, and sentences about what the lines leave out."""
    found, missing, notes = [], [], []
    for title, unit, metrics in _PLOTS:
        lines = []
        for which, run in enumerate(runs):
            letter = f"{'AB'[which]} " if len(runs) > 1 else ""
            for kind, (metric, called) in enumerate(metrics.items()):
                for name, part in _named(run, metric):
                    points = list(_seconds_per_update(run)) if metric == "seconds" else _points(run, name)
                    if points:
                        label = f"{letter}{called} {part}".strip()
                        lines.append(Line(which, kind, label, *map(list, zip(*_thinned(points)))))
                        if (odd := sum(math.isnan(y) for _, y in points)) or len(points) > MOST_POINTS:
                            thin = f"{len(points):,} points drawn as means of neighbours" * (len(points) > MOST_POINTS)
                            gaps = f"{odd:,} values that are not finite are left out" * bool(odd)
                            notes.append(f"{title}, {label}: {', '.join(filter(None, (thin, gaps)))}.")
        (found.append(Plot(title, unit, lines)) if lines else missing.append(title))
    return found, missing, notes


def _named(run: Run, metric: str) -> list[tuple[str, str]]:
    """The names of a metric in a run's log, with their evaluation sets."""
    if not metric.startswith("eval_"):
        return [(metric, "")]
    names = dict.fromkeys(name for row in run.rows for name in row)
    return [(name, part) for name in names if (part := of_set(name, metric[5:])) is not None]


def _points(run: Run, name: str) -> list[tuple[int, float]]:
    points = [(row["step"], number(row[name])) for row in run.rows if name in row]
    points = [(step, math.nan if value is None else float(value)) for step, value in points]
    return points if any(not math.isnan(value) for _, value in points) else []


def _seconds_per_update(run: Run) -> Iterator[tuple[int, float]]:
    """Seconds per update between two lines of the log, without evaluations and without the time between two parts."""
    before = None
    for row in run.rows:
        step, now = row["step"], number(row.get("time"))
        if now is not None and before is not None and "loss" in row and step > before[0]:
            if not any(before[1] < start <= now for start in run.started):
                yield step, (now - before[1]) / (step - before[0])
        before = before if now is None else (step, now)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // MOST_POINTS)
    if size == 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    means = [[y for _, y in part if not math.isnan(y)] for part in parts]
    return [(part[-1][0], sum(ys) / len(ys) if ys else math.nan) for part, ys in zip(parts, means)]
