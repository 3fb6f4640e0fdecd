"""What a run shows in the terminal beside its log: what it is about to do, completions, what training changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gold_jax.training.logging import shown


def header(console: Console, title: str, rows: Mapping[str, Any], notices: Sequence[str] = ()) -> None:
    """Show what is about to run.

    Args:
        console: where.
        title: such as "gold_jax.train".
        rows: label to text: models, loss, types, devices, number of parameters; None is left out.
        notices: one line each, below.
    """
    rows = {label: str(value) for label, value in rows.items() if value is not None}
    if not console.is_terminal:
        console.print(Text(title), soft_wrap=True)
        for label, value in rows.items():
            console.print(Text(f"  {label}: {value}"), soft_wrap=True)
        for notice in notices:
            console.print(Text(f"  note: {notice}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, value in rows.items():
        grid.add_row(label, Text(value))
    for notice in notices:
        grid.add_row(Text("note", style="yellow"), Text(notice))
    console.print(Panel(grid, title=Text(title), title_align="left", expand=False))


def completions_table(
    console: Console,
    rows: Sequence[tuple[str, str]],
    n: int | None = None,
    *,
    step: int | None = None,
    limit: int = 600,
) -> None:
    """Show prompts and what was written for them.

    Args:
        console: where.
        rows: (prompt, completion).
        n: how many to show; None: all.
        step: the update that they come from.
        limit: characters after which a text is cut; of a prompt the end is kept, of a completion the start.
    """
    table = Table(title=None if step is None else f"Completions at step {step}", box=box.ROUNDED, show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for prompt, completion in rows[:n]:
        prompt = prompt if len(prompt) <= limit else "…" + prompt[-limit:]
        completion = completion if len(completion) <= limit else completion[:limit] + "…"
        table.add_row(Text(_printable(prompt)), Text(_printable(completion)))
    console.print(table)


def _printable(text: str) -> str:
    """Text that cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)


def before_after(
    console: Console,
    rows: Sequence[tuple[str, float | None, float | None] | tuple[str, float | None, float | None, Any]],
) -> None:
    """Show what training changed.

    Args:
        console: where.
        rows: (name, before, after) or (name, before, after, the teacher's); None: not measured.
    """
    rows = [(*row, None)[:4] for row in rows]
    heads = ["", "before", "after", "change"] + ["teacher"] * any(row[3] is not None for row in rows)
    table = Table(box=box.SIMPLE_HEAD)
    for name in heads:
        table.add_column(name, justify="right" if name else "left")
    for name, before, after, teacher in rows:
        both = before is not None and after is not None
        change = f"{'+' if after > before else ''}{shown(after - before)}" if both else ""
        cells = ["" if value is None else shown(value) for value in (before, after)]
        cells += [change, "" if teacher is None else shown(teacher)]
        table.add_row(Text(name), *cells[: len(heads) - 1])
    console.print(table)
