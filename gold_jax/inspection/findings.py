"""The numbers of a report in a few plain sentences."""

from gold_jax.inspection.characters import percent
from gold_jax.inspection.report import Report

#: A kind of entries is spoken of where it has this part of what is unmatched.
_NOTABLE = 0.25
_WORDS = {
    "whitespace": "runs of white space, which shrink to shorter ones",
    "numerals": "numerals of several digits, of which only the first digits or a blank remain",
}


def findings(report: Report) -> list[str]:
    """What a report says, one sentence each."""
    figures, counts = report.vocabularies, report.total
    if figures.identical:
        return [
            "Both sides have one and the same vocabulary: every entry is its own partner, and distillation here is GKD."
        ]
    found = [
        f"{percent(counts.share_of_groups, 0)} of the groups are 1:1 and hold {percent(counts.share_of_bytes, 0)} of the "
        "bytes; the rest takes merging, or is left out where 1:1 groups alone count (--loss strict)."
    ]
    strings, surfaces = figures.strings, figures.surfaces
    if strings.shared < 0.95 * surfaces.shared:
        found.append(
            f"The vocabularies share {surfaces.shared:,} surfaces, but only {strings.shared:,} raw strings: matched by "
            "strings, most of what they share would look different."
            if strings.shared < 0.5 * surfaces.shared
            else f"The vocabularies share {surfaces.shared:,} surfaces, but only {strings.shared:,} raw strings."
        )
    if report.mass is not None and report.mass.student.positions and report.mass.teacher.positions:
        sides = {"student": report.mass.student, "teacher": report.mass.teacher}
        student, teacher = (percent(side.surfaces) for side in sides.values())
        found.append(
            f"{student} of the student's and {teacher} of the teacher's probability lies on matched entries; projection "
            f"(--loss projected or events) raises that to {percent(sides['student'].projected)} and {percent(sides['teacher'].projected)}."
        )
        for role, side in sides.items():
            for kind, words in _WORDS.items():
                # Where hardly anything is routed, its parts say nothing.
                if side.routed > 0.01 and side.share_of_routed(kind) > _NOTABLE:
                    share = percent(side.share_of_routed(kind), 0)
                    found.append(
                        f"Of what projection brings in on the {role}'s side, {share} stands on {words} "
                        f"(--projection_mask {kind} leaves them out)."
                    )
    return found
