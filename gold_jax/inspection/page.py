"""The report as HTML: one page that needs nothing else, or the part of it that a notebook shows.

Every rule of the style sheet, for light and for dark surroundings, stays inside `.gold-jax-pair`.
"""

import functools
import pathlib

import jinja2

from gold_jax.inspection import tables
from gold_jax.inspection.characters import percent
from gold_jax.inspection.report import Report

SHOWN_GROUPS = 5000
SHOWN_SHAPES = 20


def page(report: Report, template: str = "page.html") -> str:
    """A whole page; of the template "fragment.html" what stands on it, with its style sheet, to be put into another."""
    limits = {"shown_groups": SHOWN_GROUPS, "shown_shapes": SHOWN_SHAPES}
    names = {"report": report, "tables": tables, "percent": percent, "newline": b"\n"}
    return _environment().get_template(template).render(names | limits)


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "assets")
    whitespace = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Environment(loader=loader, autoescape=True, **whitespace)
