"""Which entry of the teacher's vocabulary is which entry of the student's, and where the others' probability goes."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Self

import numpy as np

from gold_jax.loss_spec import MASKS
from gold_jax.notebook import table
from gold_jax.text.surface import Surfaces


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Two vocabularies aligned with each other, as the order in which the rows of each head are to be read.

    Orders are permutations of a head's rows: first the `matched` ones, in the order of the student's ids, so that row `i`
    of one side matches row `i` of the other, then the others, sorted by their prefix columns, then by id. The prefix columns
    say for each of these others the matched column whose surface is the longest prefix of the row's own:
    `matched` where there is none (special tokens, padding rows), `matched + 1` where the row is masked. A further stop
    token goes to the stop tokens' column.
    """

    student_order: np.ndarray  # int32 [V]
    teacher_order: np.ndarray  # int32 [W]
    matched: int  # pairs, the stop tokens' among them
    shared: int  # different surfaces (or strings) that both vocabularies have
    student_distinct: int  # different surfaces (or strings) of the student's
    teacher_distinct: int
    student_prefix_of_unmatched: np.ndarray  # int32 [V - matched]
    teacher_prefix_of_unmatched: np.ndarray  # int32 [W - matched]

    def __repr__(self) -> str:
        sizes = f"student_rows={len(self.student_order)}, teacher_rows={len(self.teacher_order)}"
        return f"VocabularyMap(matched={self.matched}, shared={self.shared}, {sizes})"

    def _repr_html_(self) -> str:
        """What notebooks show."""
        rows = []
        for name, order, distinct, route in (
            ("student", self.student_order, self.student_distinct, self.student_prefix_of_unmatched),
            ("teacher", self.teacher_order, self.teacher_distinct, self.teacher_prefix_of_unmatched),
        ):
            routed, none = (int(np.count_nonzero(x)) for x in (route < self.matched, route >= self.matched))
            rows.append((name, len(order), distinct, self.matched, routed, none))
        heads = (
            "",
            "rows",
            "different surfaces",
            "matched",
            "unmatched, with a matched prefix",
            "without one, or masked",
        )
        return table(f"{self.shared:,} surfaces in both vocabularies, Jaccard index {self.jaccard():.3f}", rows, heads)

    @classmethod
    def build(
        cls,
        student: Surfaces,
        teacher: Surfaces,
        *,
        student_size: int,
        teacher_size: int,
        stop: tuple[int | Sequence[int], int | Sequence[int]] | None = None,
        by: str = "surfaces",
        mask: Collection[str] = (),
    ) -> Self:
        """Match two vocabularies.

        Where several entries of one side spell the same, an ordinary entry goes before a byte-fallback one, then the
        lowest id; the others stay unmatched (their longest prefix is the surface itself).

        Args:
            student, teacher: either side's surfaces.
            student_size, teacher_size: rows of the heads (V and W). Rows beyond the tokenizer's ids are padding and
                stay unmatched; special tokens beyond the rows (Gemma 3's image token) are left out.
            stop: either model's stop token, or all of them with the one that is written first. The two first match each
                other by role, whatever they are called.
            by: "surfaces", or "strings" for the rule of TRL, where entries match whose raw vocabulary strings are
                equal, special tokens included.
            mask: kinds of unmatched entries, of `MASKS`, that give their probability to no prefix.

        Raises:
            ValueError: a head has fewer rows than its tokenizer has entries that spell something, a stop token lies
                outside its head, `by` is neither of the two, or `mask` names something else.
        """
        if by not in ("surfaces", "strings"):
            raise ValueError(f"vocabularies are matched by 'surfaces' or by 'strings', not by {by!r}")
        if unknown := sorted(set(mask) - set(MASKS)):
            raise ValueError(f"entries are masked by kind, {' or '.join(MASKS)}, not {unknown[0]!r}")
        sizes = (student_size, teacher_size)
        ours = _keys(student, student_size, by, "student")
        theirs = _keys(teacher, teacher_size, by, "teacher")
        pairs = {i: theirs[key] for key, i in ours.items() if key in theirs}
        shared = len(pairs)
        stops: list[tuple[int, ...]] = [(), ()]
        if stop is not None:
            stops = [tuple(np.atleast_1d(ids).tolist()) for ids in stop]
            for side, ids, size in zip(("student", "teacher"), stops, sizes):
                if outside := [i for i in ids if not 0 <= i < size]:
                    raise ValueError(f"the {side}'s stop token {outside[0]} lies outside its head of {size} rows")
            pairs = _with_stops(pairs, stops)
        column: dict[bytes, int] = {}
        if by == "surfaces":
            ids = [(k, i) for k, i in enumerate(sorted(pairs)) if i not in stops[0]]
            column = {entry: k for k, i in ids if (entry := student.table[i]) is not None}
        distinct = (len(ours), len(theirs))
        return cls._in_step(pairs, sizes, stops, shared, distinct, (student, teacher), column, mask)

    @classmethod
    def _in_step(cls, pairs, sizes, stops, shared, distinct, surfaces=(None, None), column=None, mask=()) -> Self:
        """The map of these pairs of rows; `column` is that of every matched surface (none where rows match by id)."""
        matched, sides = sorted(pairs.items()), []
        for k, size in enumerate(sizes):
            first = np.array([pair[k] for pair in matched], np.int32)
            rest = np.setdiff1d(np.arange(size, dtype=np.int32), first, assume_unique=True)
            route = _routes(surfaces[k], rest, column, len(matched), mask)
            if stops[k]:
                route[np.isin(rest, stops[k])] = next(c for c, pair in enumerate(matched) if pair[k] == stops[k][0])
            by_route = np.argsort(route, kind="stable")
            sides.append((np.concatenate([first, rest[by_route]]), route[by_route]))
        (ours, our_route), (theirs, their_route) = sides
        return cls(ours, theirs, len(matched), shared, *distinct, our_route, their_route)

    @classmethod
    def identity(
        cls,
        student_size: int,
        teacher_size: int | None = None,
        *,
        stop: tuple[Sequence[int], Sequence[int]] | None = None,
        unmatched: Collection[int] = (),
    ) -> Self:
        """The map of a vocabulary to itself: row to row, what one head has beyond the other's rows unmatched.

        Padding rows of both heads match each other.

        Args:
            student_size, teacher_size: rows of the heads; None: as many as the student's.
            stop: the stop tokens of either model, that first which it writes. Where these two differ they match each
                other by role, as in `build`; the same id then means two things, so that no stop token matches its own
                id.
            unmatched: ids that are an entry of one side alone, see `one_sided_ids`.
        """
        sizes = (student_size, student_size if teacher_size is None else teacher_size)
        pairs = {i: i for i in range(min(sizes)) if i not in unmatched}
        if stop is None or stop[0][0] == stop[1][0]:
            stop = ((), ())
        else:
            pairs = _with_stops(pairs, stop)
        shared = min(sizes) - sum(i < min(sizes) for i in unmatched)
        return cls._in_step(pairs, sizes, stop, shared, sizes)

    def jaccard(self) -> float:
        """What both vocabularies have over what either has, each surface (or string) counted once.

        Special tokens, which have no surface, padding rows and the stop tokens' pair do not count, so that Gemma 3 and
        Qwen 3 give 95,968 / 317,713 = 0.302 by surfaces, and Llama 3.2 and Qwen 3 give 0.644.
        """
        union = self.student_distinct + self.teacher_distinct - self.shared
        return self.shared / union if union else 1.0


def one_sided_ids(student: Any, teacher: Any) -> tuple[frozenset[int], frozenset[int]] | None:
    """The added tokens that one of two transformers tokenizers alone has, where they have one vocabulary beside these.

    Returns:
        The ids of the student's and of the teacher's; None for two vocabularies: an entry has another id on the other
        side, or one side alone has an entry that is no added token.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if any(theirs.get(string, i) != i for string, i in ours.items()):
        return None
    alone = []
    for own, other, tokenizer in ((ours, theirs, student), (theirs, ours, teacher)):
        ids = {i for string, i in own.items() if string not in other}
        if not ids <= tokenizer.added_tokens_decoder.keys():
            return None
        alone.append(frozenset(ids))
    return alone[0], alone[1]


def _with_stops(pairs: dict[int, int], stops: Sequence[Sequence[int]]) -> dict[int, int]:
    """Pairs of ids in which no stop token is matched but the first of either side, with each other."""
    ours, theirs = stops
    return {i: j for i, j in pairs.items() if i not in ours and j not in theirs} | {ours[0]: theirs[0]}


def kind_of(surface: bytes) -> str | None:
    """Which of `MASKS` an entry is: white space alone, two bytes or more; or several digits, blanks aside; else None."""
    bare = surface.strip()
    if not bare:
        return "whitespace" if len(surface) > 1 else None
    return "numerals" if len(bare) > 1 and bare.isdigit() else None


def _routes(surfaces: Surfaces | None, rows: np.ndarray, column: dict | None, matched: int, mask) -> np.ndarray:
    """For each row the column of its longest matched prefix, `matched` without one, `matched + 1` if it is masked."""
    route = np.full(len(rows), matched, np.int32)
    if not column or surfaces is None:
        return route
    longest = max(map(len, column))
    for k, i in enumerate(rows.tolist()):
        entry = surfaces.table[i] if i < len(surfaces) else None
        if entry and mask and kind_of(entry) in mask:
            route[k] = matched + 1
        elif entry:
            for end in range(min(len(entry), longest), 0, -1):
                if (found := column.get(entry[:end])) is not None:
                    route[k] = found
                    break
    return route


def _keys(surfaces: Surfaces, size: int, by: str, side: str) -> dict:
    """The id that stands for each surface (or string) among the first `size` ids."""
    beyond = [i for i, entry in enumerate(surfaces.table[size:], size) if entry is not None]
    if beyond:
        raise ValueError(
            f"the {side}'s head has {size} rows, but {surfaces.name} has the entry {surfaces.strings[beyond[0]]!r} with "
            f"id {beyond[0]} ({len(surfaces)} ids in all): the model and the tokenizer do not belong together"
        )
    keys: dict = {}
    if by == "strings":
        for i, string in enumerate(surfaces.strings[:size]):
            if string is not None:
                keys.setdefault(string, i)
        return keys
    for fallback in (False, True):
        for i, entry in enumerate(surfaces.table[:size]):
            if entry and surfaces.is_fallback[i] == fallback:
                keys.setdefault(entry, i)
    return keys
