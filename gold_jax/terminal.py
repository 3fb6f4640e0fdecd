"""What the reports of commands are made of in the terminal: sections, sentences, tables."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text


def section(console: Console, title: str) -> None:
    """Begins a section."""
    console.print()
    console.print(Rule(Text(title, "bold"), align="left", style="dim", characters="─"))


def say(console: Console, sentence: str, style: str = "") -> None:
    """Prints a sentence, indented and wrapped."""
    for line in Text(sentence, style).wrap(console, console.width - 2):
        console.print(Text("  ").append_text(line), highlight=False)


def columns(*names: str, first: str = "", wrap: bool = False, gap: int = 1) -> Table:
    """A table of a column of labels, called `first`, which may wrap, and of columns of numbers, `gap` blanks between them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim", show_edge=False)
    table.add_column(first, no_wrap=not wrap, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def put(console: Console, table: Table) -> None:
    """Prints a table, indented."""
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
