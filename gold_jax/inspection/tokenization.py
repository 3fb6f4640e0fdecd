"""How two tokenizers cut texts: groups, their shapes, and the shares of those that are 1:1."""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gold_jax.inspection.characters import brief, marked
from gold_jax.text.align import group_ends
from gold_jax.text.encode import Encoded

EXAMPLES = 3
#: What turns a text, read from its beginning, into tokens.
Reader = Callable[[str], Encoded]


class Token(NamedTuple):
    """A token in a text: its id, and the bytes of the text that it spells there."""

    id: int
    data: bytes

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """Its visible text, each piece with whether it is a sign for a space, to be drawn faintly."""
        return [(piece, is_mark and "⟨" not in piece) for piece, is_mark in marked(self.data) or [("∅", True)]]


class Group(NamedTuple):
    """The tokens of both sides between two neighbouring boundaries."""

    student: tuple[Token, ...]
    teacher: tuple[Token, ...]

    @property
    def data(self) -> bytes:
        """The bytes that either side spells."""
        return b"".join(token.data for token in self.student)

    @property
    def shape(self) -> tuple[int, int]:
        """How many tokens of the student and of the teacher."""
        return len(self.student), len(self.teacher)

    @property
    def merged(self) -> bool:
        """Whether it is not 1:1."""
        return self.shape != (1, 1)


class Counts(NamedTuple):
    """What groups come to."""

    bytes: int
    student_tokens: int
    teacher_tokens: int
    groups: int
    one_to_one: int
    one_to_one_bytes: int
    share_of_groups: float  # that are 1:1
    share_of_bytes: float  # in 1:1 groups
    student_bytes_per_token: float
    teacher_bytes_per_token: float

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Counts":
        """Counts the groups, at least one."""
        size = sum(len(group.data) for group in groups)
        student, teacher = map(sum, zip(*(group.shape for group in groups)))
        alone = [len(group.data) for group in groups if not group.merged]
        shares = len(alone) / len(groups), sum(alone) / size
        return cls(size, student, teacher, len(groups), len(alone), sum(alone), *shares, size / student, size / teacher)


class CutText(NamedTuple):
    """One text as both tokenizers cut it: its name, the text, and its groups in order."""

    name: str
    text: str
    groups: tuple[Group, ...]

    @property
    def counts(self) -> Counts:
        """What the groups come to."""
        return Counts.of(self.groups)


class Shape(NamedTuple):
    """Merged groups of so many student and teacher tokens: how many there are, and a few of them, the commonest first.

    An example is the student's tokens and the teacher's, as visible text.
    """

    student: int
    teacher: int
    count: int
    examples: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]

    @property
    def name(self) -> str:
        """As it is written: `2:1`."""
        return f"{self.student}:{self.teacher}"


def cut_text(student: Reader, teacher: Reader, name: str, text: str) -> CutText:
    """Cut a text of at least one character with both tokenizers and group the tokens.

    Raises:
        ValueError: the text is not valid Unicode, or the tokens of a side cannot be located in it.
    """
    data = text.encode("utf-8", "surrogatepass")  # what is no Unicode is refused by the readers, in better words
    sides = [read(text) for read in (student, teacher)]
    halves = []
    for side, group in zip(sides, group_ends(*(side.spans[:, 1] for side in sides))):
        tokens = [Token(i, data[begin:end]) for i, (begin, end) in zip(side.ids.tolist(), side.spans.tolist())]
        cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(tokens)]
        halves.append([tuple(tokens[begin:end]) for begin, end in itertools.pairwise(cuts)])
    return CutText(name, text, tuple(Group(*pair) for pair in zip(*halves, strict=True)))


def shapes_of(texts: Sequence[CutText]) -> tuple[Shape, ...]:
    """The merged groups of texts by their shape, the commonest first."""
    found = collections.defaultdict(collections.Counter)
    for group in (group for text in texts for group in text.groups if group.merged):
        found[group.shape][tuple(tuple(brief(token.data) for token in side) for side in group)] += 1
    shapes = []
    for shape, examples in found.items():
        few = tuple(written for written, _ in examples.most_common(EXAMPLES))
        shapes.append(Shape(*shape, examples.total(), few))
    return tuple(sorted(shapes, key=lambda shape: (-shape.count, shape.student, shape.teacher)))
