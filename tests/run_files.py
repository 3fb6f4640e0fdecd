"""What a run leaves in its folder, read: metrics.jsonl, completions.jsonl and summary.json."""

import json
import pathlib

from tiny_models import TIMED


def lines(path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def metrics(output) -> list[dict]:
    return lines(pathlib.Path(output) / "metrics.jsonl")


def completions(output) -> list[dict]:
    return lines(pathlib.Path(output) / "completions.jsonl")


def summary(output) -> dict:
    return json.loads((pathlib.Path(output) / "summary.json").read_text(encoding="utf-8"))


def steady(rows) -> list[dict]:
    """Rows of metrics without what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
