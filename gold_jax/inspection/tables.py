"""The numbers of a report in tables of text and in plain sentences, which the terminal and the page show alike."""

from typing import NamedTuple

from gold_jax.inspection.characters import percent
from gold_jax.inspection.report import Report

SIDES = ("student", "teacher")
# Attributes of `Unmatched` and `Mass`, and what they are called; spaces in front say how deep a row stands.
_UNMATCHED = {
    "rows": "all",
    "routed": "  projected onto their longest matched prefix",
    "whitespace": "    of these, runs of white space",
    "numerals": "    of these, numerals of several digits",
    "lost": "  without a matched prefix (special tokens, say)",
}
_MASS = {
    "strings": "on entries matched by strings",
    "surfaces": "on entries matched by surfaces",
    "projected": "the same after projection",
    "routed": "gained by projection",
}
_ROUTED = {"whitespace": "  share of runs of white space", "numerals": "  share of numerals of several digits"}
_KINDS = {"whitespace": "white space", "numerals": "numerals", "others": "others"}
_NOTABLE = 0.25  # a kind of entries is spoken of where it has this part of what is routed
_SPOKEN = {
    "whitespace": "runs of white space, which become shorter ones",
    "numerals": "numerals of several digits, of which the first digits or a space remain",
}


class Table(NamedTuple):
    """Heads of the columns, the first of labels and the others of numbers, and the rows."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def shares(report: Report) -> Table:
    """How texts are cut: one by one, and all of several."""
    named = [(text.name, text.counts) for text in report.texts]
    rows = []
    for name, c in [*named, ("all", report.total)] if len(named) > 1 else named:
        parts = percent(c.share_of_groups), percent(c.share_of_bytes)
        per_token = f"{c.student_bytes_per_token:.2f}", f"{c.teacher_bytes_per_token:.2f}"
        rows.append((name, f"{c.bytes:,}", f"{c.groups:,}", *parts, *per_token))
    return Table(("text", "bytes", "groups", "1:1", "1:1 bytes", *(f"{side} bytes/token" for side in SIDES)), rows)


def overlaps(report: Report) -> Table:
    """What the vocabularies share."""
    rows = []
    for name in ("surfaces", "strings"):
        o = getattr(report.vocabularies, name)
        rows.append((f"by {name}", f"{o.shared:,}", f"{o.student:,}", f"{o.teacher:,}", f"{o.jaccard:.3f}"))
    return Table(("different entries", "shared", *SIDES, "Jaccard"), rows)


def unmatched(report: Report) -> Table:
    """Rows of the heads that are not matched by surfaces."""
    sides = [getattr(report.vocabularies, side) for side in SIDES]
    rows = [(label, *(f"{getattr(side, name):,}" for side in sides)) for name, label in _UNMATCHED.items()]
    return Table(("unmatched rows of the head (by surfaces)", *SIDES), rows)


def examples(report: Report) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """Side, kind, and a few unmatched entries with the prefixes that get their probability."""
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
    names, rows = ("strings", "surfaces", "projected"), []
    for text, sides in zip(report.texts, report.mass.by_text):
        rows.append((text.name, *(percent(getattr(side, name)) for side in sides for name in names)))
    return Table(("by text", *(head for side in SIDES for head in (f"{side} {names[0]}", *names[1:]))), rows)


def findings(report: Report) -> list[str]:
    """What a report says, one sentence each."""
    figures, counts = report.vocabularies, report.total
    if figures.identical:
        return ["The two vocabularies are identical: no tokens are merged, and the default loss is GKD (--loss gkd)."]
    share = f"{percent(counts.share_of_groups, 0)} of the groups are 1:1 and hold {percent(counts.share_of_bytes, 0)} of the bytes"
    rest = "; the tokens of the others are merged (--merge), or ignored by --loss strict."
    found = ["All groups are 1:1." if counts.share_of_groups == 1 else share + rest]
    strings, surfaces = figures.strings.shared, figures.surfaces.shared
    if strings < 0.95 * surfaces:
        differ = ": most of the shared entries are written differently by the two tokenizers."
        shared = f"The vocabularies share {surfaces:,} surfaces, but only {strings:,} raw strings"
        found.append(shared + (differ if strings < 0.5 * surfaces else "."))
    if report.mass is None or not (report.mass.student.positions and report.mass.teacher.positions):
        return found
    sides = {side: getattr(report.mass, side) for side in SIDES}
    (student, raised), (teacher, other) = ((percent(m.surfaces), percent(m.projected)) for m in sides.values())
    found.append(
        f"{student} of the student's and {teacher} of the teacher's probability lies on matched entries; projection "
        f"(--loss projected or events) raises that to {raised} and {other}."
    )
    for role, side in sides.items():
        for kind, words in _SPOKEN.items():
            share = side.share_of_routed(kind)
            if side.routed > 0.01 and share > _NOTABLE:  # where hardly anything is routed, its parts say nothing
                found.append(
                    f"Of what the {role} gains by projection, {percent(share, 0)} comes from {words} "
                    f"(--projection_mask {kind} excludes them)."
                )
    return found
