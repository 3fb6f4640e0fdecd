"""The report as HTML: one page that needs nothing else, or the part of it that a notebook shows."""

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from gold_jax.inspection.characters import marked, percent
from gold_jax.inspection.findings import findings
from gold_jax.inspection.style import GROUND, STYLE
from gold_jax.inspection.tokenization import Counts, CutText, Group, Token
from gold_jax.inspection.wording import KINDS, MASS, ROUTED, STACK, UNMATCHED

if TYPE_CHECKING:
    from gold_jax.inspection.report import Mass, Report

SHOWN_GROUPS = 5000
SHOWN_SHAPES = 20
_COLOURS = 4
_SIDES = ("student", "teacher")


def page(report: "Report") -> str:
    """A whole page."""
    title = escape(f"{_last(report.student)} and {_last(report.teacher)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{GROUND}</style>\n</head>\n<body>\n{fragment(report)}\n</body>\n</html>\n"
    )


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def fragment(report: "Report") -> str:
    """What stands on the page, with its style sheet, to be put into another."""
    parts = (_head, _texts, _groups, _shapes, _vocabularies, _mass)
    return f'<div class="gold-jax-pair"><style>{STYLE}</style>{"".join(part(report) for part in parts)}</div>'


def _head(report: "Report") -> str:
    overlap = report.vocabularies
    student, teacher = report.total.bytes_per_token
    tiles = [
        (percent(report.total.share_of_groups), "of groups are 1:1"),
        (percent(report.total.share_of_bytes), "of bytes stand in 1:1 groups"),
        (f"{overlap.surfaces.jaccard:.3f}", f"Jaccard by surfaces, {overlap.strings.jaccard:.3f} by strings"),
        (f"{student:.2f} · {teacher:.2f}", "bytes per token, student · teacher"),
    ]
    if report.mass is not None:
        sides = (report.mass.student, report.mass.teacher)
        tiles.append((" · ".join(percent(side.surfaces) for side in sides), "of probability on matched entries"))
    shown = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in (*findings(report), *report.notes))
    return (
        '<h1>What this pair will do</h1><dl class="who">'
        f'<dt>student</dt><dd>{escape(report.student)}</dd><dt class="t">teacher</dt><dd>{escape(report.teacher)}</dd></dl>'
        f'<div class="tiles">{shown}</div><ul>{said}</ul>'
    )


def _texts(report: "Report") -> str:
    return (
        "<h2>Groups</h2><p>The <b class='s'>student</b>'s tokens above, the <b class='t'>teacher</b>'s below. Coloured "
        "groups are merged; a thin line parts their tokens. A dot is a blank, ⟨F0 9F⟩ are bytes of a character. Point at "
        "a group for its tokens' ids.</p>" + "".join(_text(text) for text in report.texts)
    )


def _text(text: CutText) -> str:
    colours = itertools.cycle(range(_COLOURS))
    shown = []
    for group in text.groups[:SHOWN_GROUPS]:
        shown.append(_group(group, f"g m{next(colours)}" if group.merged else "g"))
        if b"\n" in group.data:
            shown.append("<br>")
    if shown[-1] == "<br>":
        shown.pop()
    left = len(text.groups) - SHOWN_GROUPS
    more = f"<p>… and {left:,} more groups</p>" if left > 0 else ""
    return f'<h3>{escape(text.name)}</h3><div class="tokens">{"".join(shown)}{more}</div>'


def _group(group: Group, style: str) -> str:
    ids = (" ".join(str(token.id) for token in side) for side in (group.student, group.teacher))
    label = "{}:{}, {} bytes; student {}; teacher {}".format(*group.shape, len(group.data), *ids)
    rows = "".join(f"<span>{_tokens(side)}</span>" for side in (group.student, group.teacher))
    return f'<span class="{style}" title="{escape(label)}">{rows}</span>'


def _tokens(tokens: Sequence[Token]) -> str:
    shown = []
    for token in tokens:
        pieces = marked(token.data) or [("∅", True)]
        inner = "".join(
            f'<span class="x">{escape(piece)}</span>' if is_mark and "⟨" not in piece else escape(piece)
            for piece, is_mark in pieces
        )
        shown.append(f"<i>{inner}</i>")
    return "".join(shown)


def _table(head: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table from ready cells; each row has its class and its cells."""
    body = "".join(f'<tr class="{style}">{"".join(cells)}</tr>' for style, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(*values: str) -> list[str]:
    return [f"<td>{escape(value)}</td>" for value in values]


def _head_cells(*values: str) -> list[str]:
    style = {"student": "s", "teacher": "t", "examples": "l", "entry": "l"}
    return [f'<th class="{style.get(value.split()[0] if value else "", "")}">{escape(value)}</th>' for value in values]


def _groups(report: "Report") -> str:
    def row(name: str, counts: Counts) -> list[str]:
        per_token = (f"{value:.2f}" for value in counts.bytes_per_token)
        shares = percent(counts.share_of_groups), percent(counts.share_of_bytes)
        return _cells(name, f"{counts.bytes:,}", f"{counts.groups:,}", *shares, *per_token)

    head = ("text", "bytes", "groups", "1:1", "bytes in 1:1", "student bytes/token", "teacher bytes/token")
    rows = [("", row(text.name, text.counts)) for text in report.texts]
    if len(rows) > 1:
        rows.append(("all", row("all", report.total)))
    return "<h2>Shares</h2>" + _table(_head_cells(*head), rows)


def _shapes(report: "Report") -> str:
    if not report.shapes:
        return ""
    largest = report.shapes[0].count
    rows = []
    for shape in report.shapes[:SHOWN_SHAPES]:
        examples = "".join(_example(pair) for pair in shape.examples)
        bar = f'<span class="bar" style="width:{100 * shape.count / largest:.1f}%"></span>'
        cells = [
            *_cells(shape.name, f"{shape.count:,}"),
            f'<td class="bars">{bar}</td>',
            f'<td class="l">{examples}</td>',
        ]
        rows.append(("", cells))
    rest = report.shapes[SHOWN_SHAPES:]
    if rest:
        rows.append(("", _cells("rest", f"{sum(s.count for s in rest):,}", "", f"of {len(rest)} more shapes")))
    return (
        "<h2>Merged groups by shape</h2><p>Student tokens : teacher tokens, with the commonest examples.</p>"
        + _table(_head_cells("shape", "groups", "", "examples"), rows)
    )


def _example(pair: Sequence[Sequence[str]]) -> str:
    sides = (f"<code>{escape('│'.join(side))}</code>" for side in pair)
    return f'<span class="pair">{" ⇔ ".join(sides)}</span>'


def _vocabularies(report: "Report") -> str:
    figures = report.vocabularies
    overlaps = []
    for name in ("surfaces", "strings"):
        found = getattr(figures, name)
        counts = (f"{count:,}" for count in (found.shared, found.student, found.teacher))
        overlaps.append(("", _cells(f"by {name}", *counts, f"{found.jaccard:.3f}")))
    sides = [getattr(figures, role) for role in _SIDES]
    unmatched = [
        ("", _labelled(label, *(f"{getattr(side, name):,}" for side in sides))) for name, label in UNMATCHED.items()
    ]
    examples = []
    for role, side in zip(_SIDES, sides):
        for kind, pairs in side.examples.items():
            written = "".join(
                f'<span class="pair"><code>{escape(entry)}</code> → <code>{escape(prefix)}</code></span>'
                for entry, prefix in pairs
            )
            if pairs:
                cells = [f'<td><b class="{role[0]}">{role}</b></td>', f'<td class="l">{KINDS[kind]}</td>']
                examples.append(("", [*cells, f'<td class="l">{written}</td>']))
    gives = _table(_head_cells("", "", "entry → prefix it gives to"), examples) if examples else ""
    return (
        "<h2>Vocabularies</h2><p>A surface is what an entry spells, whatever its tokenizer writes for it.</p>"
        + _table(_head_cells("different entries", "shared", *_SIDES, "Jaccard"), overlaps)
        + "<h3>Rows without a partner, by surfaces</h3>"
        + _table(_head_cells("", *_SIDES), unmatched)
        + gives
    )


def _labelled(label: str, *values: str) -> list[str]:
    """A row whose label's leading blanks say how deep it stands."""
    depth = (len(label) - len(label.lstrip())) // 2
    return [f'<td class="in{depth}">{escape(label.strip())}</td>', *_cells(*values)]


def _mass(report: "Report") -> str:
    mass = report.mass
    if mass is None:
        return ""
    sides = (mass.student, mass.teacher)
    rows = [("", _labelled("positions", *(f"{side.positions:,}" for side in sides)))]
    rows += [("", _labelled(label, *(percent(getattr(s, name)) for s in sides))) for name, label in MASS.items()]
    rows += [
        ("", _labelled(label, *(percent(s.share_of_routed(kind)) for s in sides))) for kind, label in ROUTED.items()
    ]
    keys = "".join(
        f'<span><span class="key" style="background:var(--{name})"></span>{label}</span>'
        for name, label in STACK.items()
    )
    stacks = "".join(f'<div><b class="{role[0]}">{role}</b>{_stack(side)}</div>' for role, side in zip(_SIDES, sides))
    names = ("strings", "surfaces", "projected")
    by_text = [
        ("", _cells(text.name, *(percent(getattr(side, name)) for side in pair for name in names)))
        for text, pair in zip(report.texts, mass.by_text)
    ]
    head = _head_cells("text", *(f"{role} {name}" for role in _SIDES for name in names))
    return (
        f"<h2>Probability</h2><p>Mean over the positions of these texts ({escape(mass.dtype)}).</p>"
        f'{stacks}<div class="keys">{keys}</div>'
        + _table(_head_cells("", *_SIDES), rows)
        + (_table(head, by_text) if len(by_text) > 1 else "")
    )


def _stack(side: "Mass") -> str:
    """A bar of where the mass lies; what is left is lost."""
    parts = {
        "matched": side.surfaces,
        "routed": side.routed - side.whitespace - side.numerals,
        "whitespace": side.whitespace,
        "numerals": side.numerals,
    }
    if not side.positions:
        return ""
    spans = "".join(
        f'<span style="width:{100 * max(0.0, part):.2f}%;background:var(--{name})" title="{STACK[name]} {percent(part)}"></span>'
        for name, part in parts.items()
    )
    return f'<div class="stack">{spans}</div>'
