"""The report in the terminal: tokens above each other in colours, then the numbers."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from gold_jax.inspection import tables
from gold_jax.inspection.characters import marked
from gold_jax.inspection.findings import findings
from gold_jax.inspection.report import Report
from gold_jax.inspection.tokenization import CutText, Group, Token
from gold_jax.terminal import columns, put, say, section

SHOWN_GROUPS = 400
SHOWN_SHAPES = 8
MERGED = ("#1a1a1a on #ffd166", "#1a1a1a on #8ecae6", "#1a1a1a on #b7e4a0", "#1a1a1a on #f5b5c8")
_SIDES = {"student": ("S", "bold cyan"), "teacher": ("T", "bold magenta")}
_BAR = 16
_MARGIN = 4
_LINE_END = 2  # kept free, so that no sign of a line's end stands on a line by itself


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A group as it stands in two lines above each other."""

    student: Text
    teacher: Text
    style: str

    @property
    def width(self) -> int:
        return max(self.student.cell_len, self.teacher.cell_len)


def show(report: Report, console: Console) -> None:
    """Print a report."""
    _title(report, console)
    for text in report.texts:
        section(console, text.name)
        for line in lines_of(text, console.width - 1):
            console.print(line, overflow="crop", no_wrap=True, highlight=False)
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
    for sentence in findings(report):
        say(console, sentence)
    for note in report.notes:
        say(console, note, "yellow")


def _table(console: Console, found: tables.Table) -> None:
    first, *others = found.head
    heads = (name.replace("student ", "S ").replace("teacher ", "T ") for name in others)
    table = columns(*heads, first=first)
    for label, *numbers in found.rows:
        table.add_row(Text(label), *numbers, style="bold" if label == "all" and len(numbers) > 2 else "")
    put(console, table)


def _title(report: Report, console: Console) -> None:
    console.print(Text("gold_jax.inspect", "bold"))
    grid = RichTable.grid(padding=(0, 2))
    for role, (letter, style) in _SIDES.items():
        grid.add_row(Text(f"  {letter}", style), Text(role), Text(getattr(report, role), overflow="fold"))
    console.print(grid)
    words = zip(("merged", "groups", "in", "colour"), MERGED)
    legend = Text("     ").append_text(Text(" ").join(Text(word, style) for word, style in words))
    legend.append("  1:1 plain  │ between a group's tokens  · blank")
    console.print(legend)


def lines_of(text: CutText, width: int) -> Iterator[Text]:
    """The tokens of a text, the student's lines above the teacher's, groups above each other.

    Args:
        text: the text.
        width: of a line, in cells. Lines end at groups' ends; a group that is wider by itself is folded.

    Yields:
        The lines, an empty one between pairs.
    """
    room = max(8, width - _MARGIN - _LINE_END)
    styles = itertools.cycle(MERGED)
    line: list[_Cell] = []
    used, begun = 0, False
    for group in text.groups[:SHOWN_GROUPS]:
        cell = _cell(group, next(styles) if group.merged else "")
        spare = _LINE_END if group.data == b"\n" and not group.merged else 0
        if line and used + cell.width > room + spare:
            yield from _pair(line, begun)
            line, used, begun = [], 0, True
        if cell.width > room:
            for part in _folded(cell, room):
                yield from _pair([part], begun)
                begun = True
            continue
        line.append(cell)
        used += cell.width + 1
        if b"\n" in group.data:
            yield from _pair(line, begun)
            line, used, begun = [], 0, True
    if line:
        yield from _pair(line, begun)
    if len(text.groups) > SHOWN_GROUPS:
        yield Text(f"    … and {len(text.groups) - SHOWN_GROUPS:,} more groups", "dim")


def _cell(group: Group, style: str) -> _Cell:
    return _Cell(_tokens(group.student, group.merged), _tokens(group.teacher, group.merged), style)


def _tokens(tokens: Sequence[Token], merged: bool) -> Text:
    line = Text()
    for k, token in enumerate(tokens):
        if k:
            line.append("│")
        for piece, is_mark in marked(token.data) or [("∅", True)]:
            line.append(piece, "dim" if is_mark and not merged and "⟨" not in piece else "")
    return line


def _pair(cells: Sequence[_Cell], begun: bool) -> Iterator[Text]:
    if begun:
        yield Text()
    for side, (letter, style) in _SIDES.items():
        line = Text("  ").append(f"{letter} ", style)
        for k, cell in enumerate(cells):
            tokens = getattr(cell, side).copy()
            tokens.append(" " * (cell.width - tokens.cell_len))
            tokens.stylize_before(cell.style)
            line.append(" " if k else "")
            line.append_text(tokens)
        if not cells[-1].style:
            line.rstrip()
        yield line


def _folded(cell: _Cell, room: int) -> Iterator[_Cell]:
    """A group too wide for a line, as several cells that each fit."""
    halves = [_chopped(half, room) for half in (cell.student, cell.teacher)]
    for student, teacher in itertools.zip_longest(*halves, fillvalue=Text()):
        yield _Cell(student, teacher, cell.style)


def _chopped(text: Text, room: int) -> list[Text]:
    cuts, used = [], 0
    for k, character in enumerate(text.plain):
        if used + cell_len(character) > room:
            cuts.append(k)
            used = 0
        used += cell_len(character)
    return list(text.divide(cuts))


def _shapes(report: Report, console: Console) -> None:
    if not report.shapes:
        return
    section(console, "merged groups by shape (student : teacher)")
    largest = report.shapes[0].count
    for shape in report.shapes[:SHOWN_SHAPES]:
        bar = "█" * max(1, round(_BAR * shape.count / largest))
        line = Text().append(f"{shape.name:>7}", "bold").append(f"  {shape.count:>6,}  ")
        line.append(f"{bar:<{_BAR}}  ", "cyan")
        line.append("  ".join(" ⇔ ".join("│".join(side) for side in pair) for pair in shape.examples))
        line.truncate(console.width - 1, overflow="ellipsis")
        console.print(line, no_wrap=True, highlight=False)
    rest = report.shapes[SHOWN_SHAPES:]
    if rest:
        say(console, f" rest  {sum(shape.count for shape in rest):>6,}  of {len(rest)} more shapes")


def _vocabularies(report: Report, console: Console) -> None:
    section(console, "vocabularies")
    if report.vocabularies.identical:
        say(console, "Both sides have the same entries under the same ids: every entry is its own partner.\n")
    _table(console, tables.overlaps(report))
    console.print()
    _table(console, tables.unmatched(report))
    examples = tables.examples(report)
    if examples:
        console.print()
        grid = RichTable.grid(padding=(0, 2))
        for side, kind, pairs in examples:
            written = "   ".join(f"{entry} → {prefix}" for entry, prefix in pairs)
            grid.add_row(Text(*_SIDES[side]), Text(kind, "dim"), Text(written))
        put(console, grid)
