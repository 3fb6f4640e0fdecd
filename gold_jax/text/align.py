"""Groups: the pieces of a text at whose ends both tokenizations end a token."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from gold_jax.notebook import token_table
from gold_jax.text.encode import Encoded, PlainEncoder
from gold_jax.wording import plural

_SHOWN = 400  # groups in a notebook


def group_ends(student_ends, teacher_ends) -> tuple[np.ndarray, np.ndarray, int]:
    """Cut two tokenizations of one text into the smallest groups that hold the same bytes on both sides.

    A token that spells no bytes belongs to the group that ends where it stands, at the text's start to the first.
    Every group has at least one token on either side, and every token is in one group. (The one exception is a text of
    no bytes that only one side has tokens for: there is no group then, and those tokens get 0, the number of the group
    that a caller may put after the text, such as that of the stop tokens.)

    `student_ends` [T] and `teacher_ends` [U] are the byte offsets at which tokens end: they never fall, and the last
    ones are equal (else a ValueError). Returned are the group of each student token, int32 [T], that of each teacher
    token, int32 [U], and the number of groups.

    >>> group_ends([2, 4, 5], [4, 5])
    (array([0, 0, 1], dtype=int32), array([0, 1], dtype=int32), 2)
    """
    return groups_of([student_ends], [teacher_ends])[0]


def groups_of(student_ends: Sequence, teacher_ends: Sequence) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """`group_ends` of many texts at once: its arguments and its results, one for each text."""
    ours, theirs = ([np.asarray(ends, np.int32) for ends in side] for side in (student_ends, teacher_ends))
    totals, others = (np.array([int(x[-1]) if x.size else 0 for x in side], np.int64) for side in (ours, theirs))
    for total, other in zip(totals.tolist(), others.tolist()):
        if total != other:
            raise ValueError(
                f"two tokenizations of one text end at the same byte, but the student's ends at {total} and the "
                f"teacher's at {other}"
            )
    # All texts lie end to end, a byte apart, so that a token without bytes at a text's start is none at another's end.
    starts = np.cumsum(totals + 1) - totals - 1
    (ours, our_cuts), (theirs, their_cuts) = (_end_to_end(side, starts) for side in (ours, theirs))
    for side, ends, cuts in (("student", ours, our_cuts), ("teacher", theirs, their_cuts)):
        falls = np.flatnonzero(ends[1:] < ends[:-1])
        below = np.flatnonzero(ends < np.repeat(starts, np.diff(cuts)))
        if falls.size or below.size:
            row = np.searchsorted(cuts, min([*falls[:1], *below[:1]]), side="right") - 1
            shown = (ends[cuts[row] : cuts[row + 1]][:20] - starts[row]).tolist()
            raise ValueError(f"the ends of the {side}'s tokens must not fall, as they do in {shown}…")
    # One mark per byte is cheaper than any merge of the two lists: nothing is sorted or searched for.
    ends_here = np.zeros(int(starts[-1] + totals[-1]) + 1 if len(starts) else 0, np.bool_)
    ends_here[theirs] = True
    ends_here[starts] = False
    student_group = _number(ours, ends_here)
    ends_here[theirs] = False
    ends_here[ours] = True
    ends_here[starts] = False
    teacher_group = _number(theirs, ends_here)
    found, before = [], 0
    for row, total in enumerate(totals):
        a, b = student_group[our_cuts[row] : our_cuts[row + 1]], teacher_group[their_cuts[row] : their_cuts[row + 1]]
        if total:
            count = int(a[-1]) + 1 - before
            found.append((a - np.int32(before), b - np.int32(before), count))
            before += count
        else:
            found.append((np.zeros(len(a), np.int32), np.zeros(len(b), np.int32), int(len(a) > 0 and len(b) > 0)))
    return found


def _end_to_end(ends: Sequence[np.ndarray], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of all texts' tokens where texts begin at `starts`, and where each text's tokens begin and end among them."""
    sizes = np.array([len(x) for x in ends], np.int64)
    joined = np.concatenate([*ends, np.zeros(0, np.int32)])
    return joined + np.repeat(starts, sizes), np.concatenate([[0], np.cumsum(sizes)])


def _number(ends: np.ndarray, other_ends_here: np.ndarray) -> np.ndarray:
    """The group of each token of one side, int32, counted through all texts."""
    closes = other_ends_here[ends]
    closes[:-1] &= ends[1:] != ends[:-1]  # of tokens that end together, the last closes the group
    after = np.cumsum(closes, dtype=np.int32)
    after -= closes
    return after


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """One text as two tokenizers cut it."""

    text: bytes  # UTF-8
    student: Encoded
    teacher: Encoded
    student_group: np.ndarray  # int32 [T], the group of every token
    teacher_group: np.ndarray  # int32 [U]
    count: int  # groups

    def __len__(self) -> int:
        return self.count

    def __str__(self) -> str:
        """Both sides' tokens, one line each: `·` between the tokens of a group, `│` between groups."""
        rows = [["·".join(cell) for cell in cells] for cells in self._cells()]
        widths = [max(map(len, pair)) for pair in zip(*rows)]
        lines = ("│".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
        return "\n".join(f"{name}  {line}" for name, line in zip(("student", "teacher"), lines))

    def _repr_html_(self) -> str:
        """What notebooks show."""
        sizes = f"{plural(self.count, 'group')}, {int(self.one_to_one().sum()):,} of them one token to one"
        return token_table(sizes, dict(zip(("student", "teacher"), self._cells())), _SHOWN)

    def _cells(self) -> list[list[list[str]]]:
        """The texts of every group's tokens, for student and teacher."""
        sides = []
        for encoded, group in ((self.student, self.student_group), (self.teacher, self.teacher_group)):
            cells: list[list[str]] = [[] for _ in range(self.count)]
            for (begin, end), g in zip(encoded.spans.tolist(), group.tolist()):
                if g < self.count:
                    cells[g].append(self.text[begin:end].decode(errors="replace").replace("\n", "\\n"))
            sides.append(cells)
        return sides

    def one_to_one(self) -> np.ndarray:
        """Bool [G]: the groups that have one token on either side."""
        ours, theirs = (np.bincount(g, minlength=self.count) for g in (self.student_group, self.teacher_group))
        return ((ours == 1) & (theirs == 1))[: self.count] if self.text else np.zeros(self.count, np.bool_)

    def unknown(self) -> np.ndarray:
        """Bool [G]: the groups in which a token of either side stands for text without saying which."""
        marked = np.concatenate([self.student_group[self.student.unknown], self.teacher_group[self.teacher.unknown]])
        return np.isin(np.arange(self.count), marked)

    def groups(self) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
        """The groups one by one: their bytes, the student's ids, the teacher's ids."""
        numbers = np.arange(self.count + 1)
        ours, theirs = (np.searchsorted(group, numbers) for group in (self.student_group, self.teacher_group))
        begin = 0
        for (a, b), (c, d) in zip(itertools.pairwise(ours), itertools.pairwise(theirs)):
            end = int(self.student.spans[b - 1, 1])
            yield self.text[begin:end], self.student.ids[a:b], self.teacher.ids[c:d]
            begin = end

    __iter__ = groups


def align(student_tokenizer, teacher_tokenizer, text: str) -> Alignment:
    """Tokenize a text on both sides and group the tokens.

    Either tokenizer is anything that `surfaces_of` takes, or a `PlainEncoder` (quicker where many texts are aligned).
    The text is read as plain text: special strings in it are characters like others. ValueError where a tokenizer is of
    an unknown kind, or its tokens cannot be located in the text.
    """
    given = student_tokenizer, teacher_tokenizer
    encoders = (side if isinstance(side, PlainEncoder) else PlainEncoder(side) for side in given)
    ours, theirs = (encoder.encode([text])[0] for encoder in encoders)
    return Alignment(text.encode(), ours, theirs, *group_ends(ours.spans[:, 1], theirs.spans[:, 1]))
