"""The numbers of a report in tables of text, which the terminal and the page show alike."""

from typing import NamedTuple

from gold_jax.inspection.characters import percent
from gold_jax.inspection.report import Report

SIDES = ("student", "teacher")
# Attributes of `Unmatched` and `Mass`, and what they are called; blanks in front say how deep a row stands.
_UNMATCHED = {
    "rows": "all",
    "routed": "  give to their longest matched prefix",
    "whitespace": "    of these, runs of white space",
    "numerals": "    of these, numerals of several digits",
    "lost": "  give to none (such as special tokens)",
}
_MASS = {
    "strings": "on entries matched by strings",
    "surfaces": "on entries matched by surfaces",
    "projected": "the same after projection",
    "routed": "brought in by projection",
}
_ROUTED = {
    "whitespace": "  the part of runs of white space",
    "numerals": "  the part of numerals of several digits",
}
_KINDS = {"whitespace": "white space", "numerals": "numerals", "others": "others"}


class Table(NamedTuple):
    """Heads of the columns, the first of labels and the others of numbers, and the rows."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def shares(report: Report) -> Table:
    """How texts are cut: one by one, and all of several."""
    named = [(text.name, text.counts) for text in report.texts]
    named += [("all", report.total)] if len(named) > 1 else []
    rows = [
        (
            name,
            f"{counts.bytes:,}",
            f"{counts.groups:,}",
            percent(counts.share_of_groups),
            percent(counts.share_of_bytes),
            *(f"{value:.2f}" for value in counts.bytes_per_token),
        )
        for name, counts in named
    ]
    head = ("text", "bytes", "groups", "1:1", "1:1 bytes", *(f"{side} bytes/token" for side in SIDES))
    return Table(head, rows)


def overlaps(report: Report) -> Table:
    """What the vocabularies share."""
    rows = []
    for name in ("surfaces", "strings"):
        found = getattr(report.vocabularies, name)
        counts = (f"{count:,}" for count in (found.shared, found.student, found.teacher))
        rows.append((f"by {name}", *counts, f"{found.jaccard:.3f}"))
    return Table(("different entries", "shared", *SIDES, "Jaccard"), rows)


def unmatched(report: Report) -> Table:
    """Rows of the heads that have no partner by surfaces."""
    sides = [getattr(report.vocabularies, side) for side in SIDES]
    rows = [(label, *(f"{getattr(side, name):,}" for side in sides)) for name, label in _UNMATCHED.items()]
    return Table(("rows without a partner (by surfaces)", *SIDES), rows)


def examples(report: Report) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """Side, kind, and a few entries without a partner with the prefixes that they give their probability to."""
    found = ((side, getattr(report.vocabularies, side).examples) for side in SIDES)
    return [(side, _KINDS[kind], pairs) for side, kinds in found for kind, pairs in kinds.items() if pairs]


def mass(report: Report) -> Table:
    """Where probability lies, over all texts."""
    sides = [getattr(report.mass, side) for side in SIDES]
    rows = [("positions", *(f"{side.positions:,}" for side in sides))]
    rows += [(label, *(percent(getattr(side, name)) for side in sides)) for name, label in _MASS.items()]
    rows += [(label, *(percent(side.share_of_routed(kind)) for side in sides)) for kind, label in _ROUTED.items()]
    return Table(("mean over positions", *SIDES), rows)


def mass_by_text(report: Report) -> Table:
    """Where probability lies, text by text."""
    names = ("strings", "surfaces", "projected")
    rows = [
        (text.name, *(percent(getattr(side, name)) for side in sides for name in names))
        for text, sides in zip(report.texts, report.mass.by_text)
    ]
    heads = (head for side in SIDES for head in (f"{side} {names[0]}", *names[1:]))
    return Table(("by text", *heads), rows)
