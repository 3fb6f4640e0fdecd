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


def page(report: Report) -> str:
    """A whole page."""
    return _render("page.html", report)


def fragment(report: Report) -> str:
    """What stands on the page, with its style sheet, to be put into another."""
    return _render("fragment.html", report)


def _render(name: str, report: Report) -> str:
    template = _environment().get_template(name)
    limits = {"shown_groups": SHOWN_GROUPS, "shown_shapes": SHOWN_SHAPES}
    return template.render(report=report, tables=tables, percent=percent, newline=b"\n", **limits)


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "assets")
    whitespace = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Environment(loader=loader, autoescape=True, **whitespace)
