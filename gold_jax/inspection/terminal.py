"""The report in the terminal: tokens above each other in colours, then the numbers."""

import itertools
from collections.abc import Iterator

from rich.cells import chop_cells
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from gold_jax.inspection import tables
from gold_jax.inspection.report import Report
from gold_jax.inspection.tokenization import CutText, Group
from gold_jax.terminal import columns, put, say, section

SHOWN_GROUPS = 400
SHOWN_SHAPES = 8
MERGED = ("#1a1a1a on #ffd166", "#1a1a1a on #8ecae6", "#1a1a1a on #b7e4a0", "#1a1a1a on #f5b5c8")
_SIDES = {"student": ("S", "bold cyan"), "teacher": ("T", "bold magenta")}
_BAR = 16
_MARGIN = 4
_LINE_END = 2  # kept free, so that no sign of a line's end stands on a line by itself


def show(report: Report, console: Console) -> None:
    """Print a report."""
    console.print(Text("gold_jax.inspect", "bold"))
    grid = RichTable.grid(padding=(0, 2))
    for role, (letter, style) in _SIDES.items():
        grid.add_row(Text(f"  {letter}", style), Text(role), Text(getattr(report, role), overflow="fold"))
    console.print(grid)
    words = Text(" ").join(Text(*word) for word in zip(("merged", "groups", "in", "colour"), MERGED))
    console.print(Text("     ") + words + Text("  1:1 plain  │ between a group's tokens  · space"))
    for text in report.texts:
        section(console, text.name)
        for line in lines_of(text, console.width - 1):
            console.print(line, overflow="crop", no_wrap=True, highlight=False)
    _prompts(report, console)
    section(console, "groups")
    _table(console, tables.shares(report))
    _shapes(report, console)
    _vocabularies(report, console)
    if report.mass is not None:
        section(console, f"probability on these texts ({report.mass.dtype})")
        _table(console, tables.mass(report))
        if len(report.texts) > 1:
            console.print()
            _table(console, tables.mass_by_text(report))
    section(console, "in short")
    for sentence in tables.findings(report):
        say(console, sentence)
    for note in (*(report.prompts.differences if report.prompts else ()), *report.notes):
        say(console, note, "yellow")


def _table(console: Console, found: tables.Table) -> None:
    first, *others = (name.replace("student ", "S ").replace("teacher ", "T ") for name in found.head)
    table = columns(*others, first=first)
    for label, *numbers in found.rows:
        table.add_row(Text(label), *numbers, style="bold" if label == "all" and len(numbers) > 2 else "")
    put(console, table)


def lines_of(text: CutText, width: int) -> Iterator[Text]:
    """The tokens of a text: lines of the student's above the teacher's, groups above each other, pairs of lines apart.

    Lines of `width` cells end at groups' ends; a group that is wider by itself is folded.
    """
    room = max(8, width - _MARGIN - _LINE_END)
    styles = itertools.cycle(MERGED)
    lines: list[list[list[Text]]] = [[]]
    for group in text.groups[:SHOWN_GROUPS]:
        cells = _cells(group, next(styles) if group.merged else "", room)
        used = sum(before.cell_len + 1 for before, _ in lines[-1])
        end = _LINE_END if group.data == b"\n" and not group.merged else 0
        if used and (len(cells) > 1 or used + cells[0][0].cell_len > room + end):
            lines.append([])
        lines[-1].append(cells[0])
        lines += [[cell] for cell in cells[1:]]
        if len(cells) > 1 or b"\n" in group.data:
            lines.append([])
    for k, cells in enumerate(filter(None, lines)):
        if k:
            yield Text()
        for (letter, style), halves in zip(_SIDES.values(), zip(*cells)):
            line = Text("  ").append(f"{letter} ", style).append_text(Text(" ").join(halves))
            if not halves[-1].style:
                line.rstrip()
            yield line
    if len(text.groups) > SHOWN_GROUPS:
        yield Text(f"    … and {len(text.groups) - SHOWN_GROUPS:,} more groups", "dim")


def _cells(group: Group, style: str, room: int) -> list[list[Text]]:
    """A group's tokens, the student's and the teacher's of one width; several such pairs where they are too wide for a line."""
    sides = []
    for tokens in group:
        styled = ([(piece, "dim" if faint and not style else "") for piece, faint in token.pieces] for token in tokens)
        side = Text(style=style).append_text(Text("│").join(Text.assemble(*pieces) for pieces in styled))
        sides.append(side.divide(itertools.accumulate(len(part) for part in chop_cells(side.plain, room)[:-1])))
    pairs = [[half or Text(style=style) for half in pair] for pair in itertools.zip_longest(*sides)]
    for pair in pairs:
        width = max(half.cell_len for half in pair)
        for half in pair:
            half.pad_right(width - half.cell_len)
    return pairs


def _prompts(report: Report, console: Console) -> None:
    if report.prompts is None:
        return
    section(console, "one conversation as each model reads it (the answer in colour)")
    grid = RichTable.grid(padding=(0, 2), expand=True)
    for _ in _SIDES:
        grid.add_column(ratio=1, overflow="fold")
    sides = [(getattr(report.prompts, side), *look) for side, look in _SIDES.items()]
    grid.add_row(*(Text(f"{letter}  {one.stops}", style) for one, letter, style in sides))
    grid.add_row()
    grid.add_row(*(Text.assemble(one.shown[0], (one.shown[1], style)) for one, _, style in sides))
    console.print(Padding(grid, (0, 0, 0, 2)), highlight=False)


def _shapes(report: Report, console: Console) -> None:
    if not report.shapes:
        return
    section(console, "merged groups by shape (student : teacher)")
    for shape in report.shapes[:SHOWN_SHAPES]:
        bar = "█" * max(1, round(_BAR * shape.count / report.shapes[0].count))
        line = Text().append(f"{shape.name:>7}", "bold").append(f"  {shape.count:>6,}  ")
        line.append(f"{bar:<{_BAR}}  ", "cyan")
        line.append("  ".join(" ⇔ ".join("│".join(side) for side in pair) for pair in shape.examples))
        line.truncate(console.width - 1, overflow="ellipsis")
        console.print(line, no_wrap=True, highlight=False)
    if rest := report.shapes[SHOWN_SHAPES:]:
        say(console, f" rest  {sum(shape.count for shape in rest):>6,}  of {len(rest)} more shapes")


def _vocabularies(report: Report, console: Console) -> None:
    section(console, "vocabularies")
    if report.vocabularies.identical:
        say(console, "The two vocabularies have the same entries under the same ids.\n")
    _table(console, tables.overlaps(report))
    console.print()
    _table(console, tables.unmatched(report))
    if examples := tables.examples(report):
        console.print()
        grid = RichTable.grid(padding=(0, 2))
        for side, kind, pairs in examples:
            written = "   ".join(f"{entry} → {prefix}" for entry, prefix in pairs)
            grid.add_row(Text(*_SIDES[side]), Text(kind, "dim"), Text(written))
        put(console, grid)
