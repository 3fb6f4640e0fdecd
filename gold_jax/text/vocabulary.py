"""Which entry of the teacher's vocabulary is which entry of the student's."""

import dataclasses

import numpy as np

from gold_jax.text.surface import Surfaces


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Two vocabularies brought into step, as the order in which the rows of either head are to be read.

    Attributes:
        student_order: int32 [V], a permutation of the rows of the student's head: first the matched ones in the order
            of their ids, then the others in the order of theirs.
        teacher_order: int32 [W], the same for the teacher's head; its first `matched` rows are the partners of the
            student's, one by one.
        matched: how many pairs there are, the stop tokens' among them.
        shared: how many different surfaces (or strings) both vocabularies have.
        student_distinct, teacher_distinct: how many different surfaces (or strings) each has.
    """

    student_order: np.ndarray
    teacher_order: np.ndarray
    matched: int
    shared: int
    student_distinct: int
    teacher_distinct: int

    @classmethod
    def build(
        cls,
        student: Surfaces,
        teacher: Surfaces,
        *,
        student_size: int,
        teacher_size: int,
        stop: tuple[int, int] | None = None,
        by: str = "surfaces",
    ) -> "VocabularyMap":
        """Match two vocabularies.

        Where several entries of one side spell the same, an ordinary entry goes before a byte-fallback one, then the
        lowest id; the others stay unmatched.

        Args:
            student: the student's surfaces.
            teacher: the teacher's surfaces.
            student_size: rows of the student's head (V). Rows beyond the tokenizer's ids are padding and stay unmatched;
                special tokens beyond the rows (Gemma 3's image token) are left out.
            teacher_size: rows of the teacher's head (W).
            stop: the ids of the two stop tokens, which match each other by role whatever they are called.
            by: "surfaces", or "strings" for the rule of TRL, where entries match whose raw vocabulary strings are
                equal, special tokens included.

        Raises:
            ValueError: a head has fewer rows than its tokenizer has entries that spell something, a stop token lies
                outside its head, or `by` is neither of the two.
        """
        if by not in ("surfaces", "strings"):
            raise ValueError(f"vocabularies are matched by 'surfaces' or by 'strings', not by {by!r}")
        ours = _keys(student, student_size, by, "student")
        theirs = _keys(teacher, teacher_size, by, "teacher")
        pairs = {i: theirs[key] for key, i in ours.items() if key in theirs}
        shared = len(pairs)
        if stop is not None:
            for side, i, size in (("student", stop[0], student_size), ("teacher", stop[1], teacher_size)):
                if not 0 <= i < size:
                    raise ValueError(f"the {side}'s stop token {i} lies outside its head of {size} rows")
            pairs = {i: j for i, j in pairs.items() if i != stop[0] and j != stop[1]}
            pairs[stop[0]] = stop[1]
        matched = sorted(pairs.items())
        return cls(
            student_order=_order([i for i, _ in matched], student_size),
            teacher_order=_order([j for _, j in matched], teacher_size),
            matched=len(matched),
            shared=shared,
            student_distinct=len(ours),
            teacher_distinct=len(theirs),
        )

    @classmethod
    def identity(cls, size: int) -> "VocabularyMap":
        """The map of a vocabulary to itself: `size` rows, every one matched."""
        order = np.arange(size, dtype=np.int32)
        return cls(order, order.copy(), size, size, size, size)

    def jaccard(self) -> float:
        """What both vocabularies have over what either has, each surface (or string) counted once.

        Special tokens, which have no surface, padding rows and the stop tokens' pair do not count, so that Gemma 3 and
        Qwen 3 give 95,968 / 317,713 = 0.302 by surfaces, and Llama 3.2 and Qwen 3 give 0.644.
        """
        union = self.student_distinct + self.teacher_distinct - self.shared
        return self.shared / union if union else 1.0


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


def _order(first: list[int], size: int) -> np.ndarray:
    head = np.asarray(first, np.int32)
    rest = np.ones(size, np.bool_)
    rest[head] = False
    return np.concatenate([head, np.flatnonzero(rest).astype(np.int32)])
