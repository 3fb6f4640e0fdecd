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
    """One side's vocabulary.

    Attributes:
        surfaces: what its entries spell; stop tokens spell nothing.
        rows: the rows of the head, at least as many as entries that spell something.
        stop_ids: the stop tokens, the one that is written first; empty where they are not known.
    """

    surfaces: Surfaces
    rows: int
    stop_ids: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How much two vocabularies share, each string or surface counted once.

    Attributes:
        shared: how many both have.
        student, teacher: how many different ones each has.
        jaccard: shared over those that either has.
    """

    shared: int
    student: int
    teacher: int
    jaccard: float


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """The rows of one side's head that have no partner by surfaces.

    Attributes:
        rows: how many there are, special tokens and padding among them.
        routed: how many of them give their probability to a matched entry, the longest prefix of their surface (further
            stop tokens: to the stop token).
        lost: how many give it to none.
        whitespace: runs of white space among the routed.
        numerals: numerals of several digits among the routed.
        examples: by kind ("whitespace", "numerals", "others"), a few of the routed as visible text, from all over
            the vocabulary: entry, prefix.
    """

    rows: int
    routed: int
    lost: int
    whitespace: int
    numerals: int
    examples: Mapping[str, tuple[tuple[str, str], ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyFigures:
    """Two vocabularies compared.

    Attributes:
        strings: the overlap by raw vocabulary strings, the rule of TRL.
        surfaces: the overlap by surfaces, the rule of this project.
        identical: whether both sides have the same entries under the same ids; then every row is its own partner.
        student, teacher: the unmatched rows of either side.
        rows: for the student and for the teacher a bool array [len(KINDS), rows of the head]: which rows are matched by
            strings, matched by surfaces, unmatched by surfaces but routed to a matched entry, and of the latter which
            are runs of white space and which are numerals of several digits.
    """

    strings: Overlap
    surfaces: Overlap
    identical: bool
    student: Unmatched
    teacher: Unmatched
    rows: tuple[np.ndarray, np.ndarray]

    def to_dict(self) -> dict:
        """All but `rows`."""
        names = ("strings", "surfaces", "student", "teacher")
        return {"identical": self.identical} | {name: dataclasses.asdict(getattr(self, name)) for name in names}


def compare(student: Vocabulary, teacher: Vocabulary) -> VocabularyFigures:
    """Compare two vocabularies.

    Raises:
        ValueError: a head has fewer rows than its tokenizer has entries that spell something.
    """
    sides, sizes = (student, teacher), {"student_size": student.rows, "teacher_size": teacher.rows}
    stop = (student.stop_ids, teacher.stop_ids) if student.stop_ids and teacher.stop_ids else None
    by_strings = VocabularyMap.build(student.surfaces, teacher.surfaces, by="strings", **sizes)
    by_surfaces = mapping = VocabularyMap.build(student.surfaces, teacher.surfaces, stop=stop, **sizes)
    identical = student.surfaces.strings == teacher.surfaces.strings
    if identical:  # as training has it
        mapping = VocabularyMap.identity(student.rows, teacher.rows)
    partners = [_matched_orders(by_strings), _matched_orders(mapping)]
    rows, unmatched = [], []
    for k, (side, route) in enumerate(
        zip(sides, (mapping.student_prefix_of_unmatched, mapping.teacher_prefix_of_unmatched))
    ):
        order = (mapping.student_order, mapping.teacher_order)[k]
        kinds = _kinds(side, [pair[k] for pair in partners], order[mapping.matched :], route < mapping.matched)
        rows.append(kinds)
        gives_to = dict(zip(order[mapping.matched :].tolist(), order[route.clip(max=mapping.matched - 1)].tolist()))
        unmatched.append(_unmatched(side, kinds, gives_to))
    return VocabularyFigures(_overlap(by_strings), _overlap(by_surfaces), identical, *unmatched, tuple(rows))


def _matched_orders(mapping: VocabularyMap) -> tuple[np.ndarray, np.ndarray]:
    return mapping.student_order[: mapping.matched], mapping.teacher_order[: mapping.matched]


def _overlap(mapping: VocabularyMap) -> Overlap:
    return Overlap(mapping.shared, mapping.student_distinct, mapping.teacher_distinct, mapping.jaccard())


def _kinds(side: Vocabulary, matched: list[np.ndarray], others: np.ndarray, has_route: np.ndarray) -> np.ndarray:
    """Bool [len(KINDS), rows], from the rows matched by strings and by surfaces, the others, and which have a route."""
    kinds = np.zeros((len(KINDS), side.rows), np.bool_)
    for k, rows in enumerate(matched):
        kinds[k, rows] = True
    routed = others[has_route]
    kinds[KINDS.index("routed"), routed] = True
    for i in routed.tolist():
        surface = _surface(side, i)
        kind = None if surface is None else kind_of(surface)  # a further stop token spells nothing
        if kind is not None:
            kinds[KINDS.index(kind), i] = True
    return kinds


def _unmatched(side: Vocabulary, kinds: np.ndarray, gives_to: Mapping[int, int]) -> Unmatched:
    rows = side.rows - int(kinds[KINDS.index("surfaces")].sum())
    routed, whitespace, numerals = (kinds[KINDS.index(name)] for name in ("routed", "whitespace", "numerals"))
    chosen = {"whitespace": whitespace, "numerals": numerals, "others": routed & ~whitespace & ~numerals}
    examples = {
        name: tuple((_written(side, i), _written(side, gives_to[i])) for i in _spread(np.flatnonzero(which)))
        for name, which in chosen.items()
    }
    count = int(routed.sum())
    return Unmatched(rows, count, rows - count, int(whitespace.sum()), int(numerals.sum()), examples)


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


def _spread(ids: np.ndarray) -> list[int]:
    """A few of the ids at even distances."""
    if len(ids) <= EXAMPLES:
        return ids.tolist()
    return ids[(2 * np.arange(EXAMPLES) + 1) * len(ids) // (2 * EXAMPLES)].tolist()
