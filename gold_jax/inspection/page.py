"""The report as HTML: one page that needs nothing else, or the part of it that a notebook shows.

Every rule of the style sheet, for light and for dark surroundings, stays inside `.gold-jax-pair`.
"""

import functools
import pathlib
from html import escape

import jinja2
import markupsafe

from gold_jax.inspection import tables
from gold_jax.inspection.characters import marked, percent
from gold_jax.inspection.findings import findings
from gold_jax.inspection.report import Mass, Report
from gold_jax.inspection.tokenization import Group, Token

SHOWN_GROUPS = 5000
SHOWN_SHAPES = 20
#: What a bar of the whole mass is made of, by the colour's name in the style sheet.
STACK = {
    "matched": "matched by surfaces",
    "routed": "to a prefix: other entries",
    "whitespace": "to a prefix: runs of white space",
    "numerals": "to a prefix: numerals of several digits",
    "lost": "to none",
}
_AROUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
html {{ background: #ffffff; color-scheme: light dark; }}
body {{ margin: 0; }}
@media (prefers-color-scheme: dark) {{ html {{ background: #15181c; }} }}
</style>
</head>
<body>
{fragment}
</body>
</html>
"""


def page(report: Report) -> str:
    """A whole page."""
    names = (name.rstrip("/").rpartition("/")[2] or name for name in (report.student, report.teacher))
    return _AROUND.format(title=escape(" and ".join(names)), fragment=fragment(report))


def fragment(report: Report) -> str:
    """What stands on the page, with its style sheet, to be put into another."""
    template, style = _template()
    return template.render(
        report=report,
        style=style,
        tiles=_tiles(report),
        sentences=(*findings(report), *report.notes),
        tables=tables,
        label=_label,
        pieces=_pieces,
        stack=_stack,
        percent=percent,
        keys=STACK,
        newline=b"\n",
        shown_groups=SHOWN_GROUPS,
        shown_shapes=SHOWN_SHAPES,
    )


@functools.cache
def _template() -> tuple[jinja2.Template, markupsafe.Markup]:
    folder = pathlib.Path(__file__).parent / "assets"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "fragment.html").read_text(encoding="utf-8"))
    return template, markupsafe.Markup((folder / "page.css").read_text(encoding="utf-8"))


def _tiles(report: Report) -> list[tuple[str, str]]:
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
    return tiles


def _label(group: Group) -> str:
    ids = (" ".join(str(token.id) for token in side) for side in (group.student, group.teacher))
    return "{}:{}, {} bytes; student {}; teacher {}".format(*group.shape, len(group.data), *ids)


def _pieces(token: Token) -> list[tuple[str, bool]]:
    """A token's text in pieces, each with whether it is a sign for a blank, which is drawn faintly."""
    return [(piece, is_mark and "⟨" not in piece) for piece, is_mark in marked(token.data) or [("∅", True)]]


def _stack(side: Mass) -> list[tuple[str, str, float]]:
    """Where the mass lies: colour, what it is, share; what is left is lost."""
    shares = {
        "matched": side.surfaces,
        "routed": max(0.0, side.routed - side.whitespace - side.numerals),
        "whitespace": side.whitespace,
        "numerals": side.numerals,
    }
    return [(name, STACK[name], share) for name, share in shares.items()]
