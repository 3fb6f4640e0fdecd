"""Runs commands in turn, several times, and prints how their figures compare: medians, spread, ratios.

Each command prints one JSON object as its last line, with `seconds` (of the work, without set-up) and `peak_gb` (of the
process, or of what the work adds to it). They take turns, so that whatever else the machine does falls on all alike.
"""

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence


def alternate(commands: Mapping[str, Sequence[str]], rounds: int, env: Mapping[str, str] | None = None) -> dict:
    """Runs every command once in each round; the last line that each prints, by its name."""
    found: dict[str, list[dict]] = {name: [] for name in commands}
    for k in range(rounds):
        for name, command in commands.items():
            ran = subprocess.run(command, capture_output=True, text=True, env=env)
            if ran.returncode:
                raise SystemExit(f"{name} failed in round {k}:\n{ran.stderr[-2000:]}")
            found[name].append(json.loads(ran.stdout.strip().splitlines()[-1]))
    return found


def table(found: Mapping[str, Sequence[Mapping[str, float]]], peer: str) -> str:
    """A table in Markdown: the seconds and peaks of each, and how many times faster and smaller than the peer."""
    lines = [
        "| | seconds: median (least to most) | peak, GB | times faster | of the peer's peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    of_peer = (
        {key: statistics.median(row[key] for row in found[peer]) for key in ("seconds", "peak_gb")}
        if peer in found
        else None
    )
    for name, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        middle, peak = statistics.median(seconds), statistics.median(row["peak_gb"] for row in rows)
        ratios = (
            [
                f"{of_peer['seconds'] / middle:.2f}",
                f"{peak / of_peer['peak_gb']:.2f}",
            ]
            if of_peer and name != peer
            else ["", ""]
        )
        lines.append(
            f"| {name} | {middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {peak:.2f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines)
