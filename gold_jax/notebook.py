"""HTML tables for `_repr_html_` in notebooks, without scripts, in the colours of the page around them."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

_LINE = 88  # characters of tokens in a line
_TOKEN = "border: 1px solid rgba(128,128,128,.55); border-radius: 3px; padding: 0 2px; white-space: pre; unicode-bidi: isolate"
_MERGED = "background: rgba(255,165,0,.32)"
_CELL = "text-align: {}; padding: 2px 12px 2px 0; vertical-align: top"
_CODE = "font-family: monospace; text-align: left; padding: 1px 3px; white-space: nowrap"


def table(title: str, rows: Iterable[Sequence[Any]], heads: Sequence[Any] = ()) -> str:
    """A table under a title; everything is escaped, numbers are aligned right."""
    lines = []
    for tag, cells in [*([("th", heads)] if heads else ()), *(("td", row) for row in rows)]:
        found = (
            f'<{tag} style="{_CELL.format(_align(cell, tag, k))}">{_text(cell)}</{tag}>' for k, cell in enumerate(cells)
        )
        lines.append(f"<tr>{''.join(found)}</tr>")
    return f"<div><p><b>{html.escape(title)}</b></p><table><tbody>{''.join(lines)}</tbody></table></div>"


def token_table(title: str, sides: dict[str, Sequence[Sequence[str]]], most: int) -> str:
    """Groups of tokens of each side, one side below the other; groups that are not one token to one are coloured.

    `sides` maps names to the texts of every group's tokens. The first `most` groups are shown and the others counted.
    """
    groups = list(zip(*sides.values()))
    lines: list[list[tuple]] = [[]]
    used = 0
    for group in groups[:most]:
        width = max(sum(map(len, tokens)) + len(tokens) for tokens in group)
        if lines[-1] and used + width > _LINE:
            lines.append([])
            used = 0
        lines[-1].append(group)
        used += width
    tables = []
    for line in lines:
        rows = []
        for k, name in enumerate(sides):
            cells = [f'<td style="{_CODE}; opacity: .7">{html.escape(name)}</td>']
            for group in line:
                style = f"{_CODE}; {_MERGED}" if any(len(tokens) != 1 for tokens in group) else _CODE
                boxes = "·".join(f'<span style="{_TOKEN}">{html.escape(token)}</span>' for token in group[k])
                cells.append(f'<td style="{style}">{boxes}</td>')
            rows.append(f"<tr>{''.join(cells)}</tr>")
        tables.append(f'<table style="margin: 0 0 6px 0"><tbody>{"".join(rows)}</tbody></table>')
    rest = f"<p>… and {len(groups) - most:,} more groups</p>" if len(groups) > most else ""
    return f"<div><p><b>{html.escape(title)}</b></p>{''.join(tables)}{rest}</div>"


def _align(cell: Any, tag: str, column: int) -> str:
    number = isinstance(cell, int | float) or str(cell)[:1].isdigit() and " " not in str(cell)
    return "right" if number or (tag == "th" and column) else "left"


def _text(cell: Any) -> str:
    return html.escape(f"{cell:,}" if isinstance(cell, int) else str(cell))
