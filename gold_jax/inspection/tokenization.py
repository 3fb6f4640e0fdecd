"""How two tokenizers cut texts: groups, their shapes, and the shares of those that are 1:1."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gold_jax.inspection.characters import brief
from gold_jax.text.align import group_ends
from gold_jax.text.encode import Encoded

EXAMPLES = 3
#: What turns a text, read from its beginning, into tokens.
Reader = Callable[[str], Encoded]


@dataclasses.dataclass(frozen=True)
class Token:
    """A token in a text: its id, and the bytes of the text that it spells there."""

    id: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Group:
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


@dataclasses.dataclass(frozen=True)
class Counts:
    """What texts come to: bytes, tokens of either side, groups, and those that are 1:1."""

    bytes: int = 0
    student_tokens: int = 0
    teacher_tokens: int = 0
    groups: int = 0
    one_to_one: int = 0
    one_to_one_bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def share_of_groups(self) -> float:
        """The share of groups that are 1:1."""
        return self.one_to_one / self.groups

    @property
    def share_of_bytes(self) -> float:
        """The share of bytes in 1:1 groups."""
        return self.one_to_one_bytes / self.bytes

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Of the student and of the teacher."""
        return self.bytes / self.student_tokens, self.bytes / self.teacher_tokens

    def to_dict(self) -> dict:
        """Counts and shares."""
        student, teacher = self.bytes_per_token
        return dataclasses.asdict(self) | {
            "share_of_groups": self.share_of_groups,
            "share_of_bytes": self.share_of_bytes,
            "student_bytes_per_token": student,
            "teacher_bytes_per_token": teacher,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class CutText:
    """One text as both tokenizers cut it.

    Attributes:
        name: what the text is called.
        text: the text.
        groups: its groups in order.
    """

    name: str
    text: str
    groups: tuple[Group, ...]

    @functools.cached_property
    def counts(self) -> Counts:
        """What the text comes to."""
        alone = [group for group in self.groups if not group.merged]
        return Counts(
            bytes=len(self.text.encode()),
            student_tokens=sum(len(group.student) for group in self.groups),
            teacher_tokens=sum(len(group.teacher) for group in self.groups),
            groups=len(self.groups),
            one_to_one=len(alone),
            one_to_one_bytes=sum(len(group.data) for group in alone),
        )


@dataclasses.dataclass(frozen=True)
class Shape:
    """Merged groups of one shape.

    Attributes:
        student, teacher: how many tokens of either side such a group has.
        count: how many such groups there are.
        examples: a few of them as visible text, the commonest first: student's tokens, teacher's tokens.
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
    """Cut a text with both tokenizers and group the tokens.

    Args:
        student: the student's reader.
        teacher: the teacher's.
        name: what the text is called.
        text: a text of at least one character.

    Raises:
        ValueError: the text is not valid Unicode, or the tokens of a side cannot be located in it.
    """
    data = text.encode("utf-8", "surrogatepass")  # what is no Unicode is refused by the readers, in better words
    sides = [read(text) for read in (student, teacher)]
    numbers = group_ends(*(side.spans[:, 1] for side in sides))
    halves = [_by_group(data, side, group) for side, group in zip(sides, numbers)]
    return CutText(name, text, tuple(Group(*pair) for pair in zip(*halves, strict=True)))


def _by_group(data: bytes, side: Encoded, group: np.ndarray) -> list[tuple[Token, ...]]:
    """One side's tokens, those of each group together."""
    tokens = [Token(int(i), data[begin:end]) for i, (begin, end) in zip(side.ids, side.spans.tolist())]
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(tokens)]
    return [tuple(tokens[begin:end]) for begin, end in zip(cuts, cuts[1:])]


def total(texts: Iterable[CutText]) -> Counts:
    """What all texts come to."""
    return sum((text.counts for text in texts), Counts())


def shapes_of(texts: Sequence[CutText]) -> tuple[Shape, ...]:
    """The merged groups of texts by their shape, the commonest first."""
    found: dict[tuple[int, int], collections.Counter] = {}
    for text in texts:
        for group in text.groups:
            if group.merged:
                written = tuple(tuple(brief(token.data) for token in side) for side in (group.student, group.teacher))
                found.setdefault(group.shape, collections.Counter())[written] += 1
    shapes = [
        Shape(*shape, examples.total(), tuple(written for written, _ in examples.most_common(EXAMPLES)))
        for shape, examples in found.items()
    ]
    return tuple(sorted(shapes, key=lambda shape: (-shape.count, shape.student, shape.teacher)))
