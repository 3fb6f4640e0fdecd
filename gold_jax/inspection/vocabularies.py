"""What two vocabularies share, and where the probability of the entries that they do not share goes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.inspection.characters import brief
from gold_jax.text.surface import Surfaces
from gold_jax.text.vocabulary import VocabularyMap, kind_of

EXAMPLES = 4
#: What a row of a head can be, see `VocabularyFigures.rows`.
KINDS = ("strings", "surfaces", "routed", "whitespace", "numerals")


class Vocabulary(NamedTuple):
    """One side's vocabulary."""

    surfaces: Surfaces  # what its entries spell; stop tokens spell nothing
    rows: int  # of the head, at least as many as entries that spell something
    stop_ids: Sequence[int] = ()  # first the one that is written; empty where they are not known


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How many different entries both vocabularies and each of them have, and the Jaccard index."""

    shared: int
    student: int
    teacher: int
    jaccard: float


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """The rows of one side's head that are not matched by surfaces."""

    rows: int  # special tokens and padding among them
    routed: int  # give their probability to a matched entry, their longest prefix (or the stop token: further ones)
    lost: int  # give it to none
    whitespace: int  # runs of white space among the routed
    numerals: int  # numerals of several digits among the routed
    examples: Mapping[str, tuple[tuple[str, str], ...]]  # by kind a few of the routed as visible text: entry, prefix


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyFigures:
    """Two vocabularies compared.

    `rows` has for the student and for the teacher a bool array [len(KINDS), rows of the head]: which rows are matched
    by strings, matched by surfaces, unmatched by surfaces but routed to a matched entry, and of the latter which are
    runs of white space and which are numerals of several digits.
    """

    identical: bool  # the same entries under the same ids: every row is its own partner
    strings: Overlap  # by raw vocabulary strings, the rule of TRL
    surfaces: Overlap  # the rule of this project
    student: Unmatched
    teacher: Unmatched
    rows: tuple[np.ndarray, np.ndarray]

    def to_dict(self) -> dict:
        """All but `rows`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "rows"}


def compare(student: Vocabulary, teacher: Vocabulary) -> VocabularyFigures:
    """Compare two vocabularies.

    Raises:
        ValueError: a head has fewer rows than its tokenizer has entries that spell something.
    """
    surfaces, sizes = (student.surfaces, teacher.surfaces), {"student_size": student.rows, "teacher_size": teacher.rows}
    stop = (student.stop_ids, teacher.stop_ids) if student.stop_ids and teacher.stop_ids else None
    by_strings = VocabularyMap.build(*surfaces, by="strings", **sizes)
    by_surfaces = mapping = VocabularyMap.build(*surfaces, stop=stop, **sizes)
    identical = student.surfaces.strings == teacher.surfaces.strings
    if identical:  # as training has it
        mapping = VocabularyMap.identity(student.rows, teacher.rows)
    maps = (by_strings, by_surfaces)
    overlaps = (Overlap(m.shared, m.student_distinct, m.teacher_distinct, m.jaccard()) for m in maps)
    found = [_side(role, side, by_strings, mapping) for role, side in (("student", student), ("teacher", teacher))]
    rows, unmatched = zip(*found)
    return VocabularyFigures(identical, *overlaps, *unmatched, rows)


def _side(role: str, side: Vocabulary, by_strings: VocabularyMap, mapping: VocabularyMap):
    """What the rows of one side's head are, bool [len(KINDS), rows], and those that are unmatched."""
    order, prefixes = (getattr(mapping, f"{role}_{name}") for name in ("order", "prefix_of_unmatched"))
    routed = prefixes < mapping.matched
    partner = dict(sorted(zip(order[mapping.matched :][routed].tolist(), order[prefixes[routed]].tolist())))
    by_kind: dict[str, list[int]] = {"whitespace": [], "numerals": [], "others": []}
    for i in partner:  # a further stop token spells nothing
        by_kind[kind_of(_surface(side, i) or b"") or "others"].append(i)
    matched = getattr(by_strings, f"{role}_order")[: by_strings.matched], order[: mapping.matched]
    kinds = np.zeros((len(KINDS), side.rows), np.bool_)
    for row, ids in zip(kinds, (*matched, list(partner), by_kind["whitespace"], by_kind["numerals"])):
        row[ids] = True
    _, surfaces, count, whitespace, numerals = kinds.sum(1).tolist()
    shown = {kind: [(i, partner[i]) for i in _spread(ids)] for kind, ids in by_kind.items()}
    examples = {kind: tuple((_written(side, i), _written(side, j)) for i, j in pairs) for kind, pairs in shown.items()}
    rows = side.rows - surfaces
    return kinds, Unmatched(rows, count, rows - count, whitespace, numerals, examples)


def _surface(side: Vocabulary, i: int) -> bytes | None:
    """What a row of the head spells; rows beyond the tokenizer's ids spell nothing."""
    return side.surfaces.table[i] if i < len(side.surfaces) else None


def _written(side: Vocabulary, i: int) -> str:
    """A row of the head as visible text: its surface, or its string where that says more."""
    surface = _surface(side, i)
    if surface is not None and not side.surfaces.is_fallback[i]:
        return brief(surface)
    string = side.surfaces.strings[i] if i < len(side.surfaces) else None
    return f"row {i}" if string is None else brief(string.encode())


def _spread(ids: list[int]) -> list[int]:
    """A few of the ids at even distances."""
    few = range(1, 2 * EXAMPLES, 2)
    return ids if len(ids) <= EXAMPLES else [ids[k * len(ids) // (2 * EXAMPLES)] for k in few]
