"""What is known of a pair of models before training: data that the terminal and the page show."""

import dataclasses
import functools
import math
from collections.abc import Sequence

from gold_jax.inspection.tokenization import Counts, CutText, Shape, total
from gold_jax.inspection.vocabularies import VocabularyFigures


@dataclasses.dataclass(frozen=True)
class Mass:
    """Where one model's probability lies, as the mean over positions.

    Attributes:
        positions: how many positions it is the mean of.
        strings: mass on entries matched by strings.
        surfaces: mass on entries matched by surfaces.
        routed: mass on unmatched entries that give it to a matched prefix.
        whitespace: the part of `routed` on runs of white space.
        numerals: the part of `routed` on numerals of several digits.
    """

    positions: int
    strings: float
    surfaces: float
    routed: float
    whitespace: float
    numerals: float

    @property
    def projected(self) -> float:
        """Mass on matched entries after projection: all but what finds no prefix."""
        return self.surfaces + self.routed

    def share_of_routed(self, kind: str) -> float:
        """The part of the routed mass from "whitespace" or "numerals"; NaN where nothing is routed."""
        return getattr(self, kind) / self.routed if self.routed > 0 else float("nan")

    def to_dict(self) -> dict:
        """The attributes and `projected`; None for what is the mean of no position."""
        values = dataclasses.asdict(self) | {"projected": self.projected}
        return {name: None if math.isnan(value) else value for name, value in values.items()}

    @classmethod
    def mean(cls, parts: Sequence["Mass"]) -> "Mass":
        """The mean over all positions of the parts; NaN where there is none."""
        positions = sum(part.positions for part in parts)
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        parts = [part for part in parts if part.positions]
        sums = {name: sum(part.positions * getattr(part, name) for part in parts) for name in names}
        return cls(
            positions, **{name: value / positions if positions else float("nan") for name, value in sums.items()}
        )


@dataclasses.dataclass(frozen=True)
class PairMass:
    """Where the probability of both models lies.

    Attributes:
        student, teacher: over all texts.
        by_text: of either, for every text.
        dtype: what was computed in.
    """

    student: Mass
    teacher: Mass
    by_text: tuple[tuple[Mass, Mass], ...]
    dtype: str

    def to_dict(self) -> dict:
        """As nested dicts."""
        by_text = [{"student": one.to_dict(), "teacher": other.to_dict()} for one, other in self.by_text]
        return {
            "dtype": self.dtype,
            "student": self.student.to_dict(),
            "teacher": self.teacher.to_dict(),
            "by_text": by_text,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What is known of a pair.

    Attributes:
        student, teacher: what the two are called.
        texts: the texts as both cut them.
        shapes: the merged groups of all texts by their shape.
        vocabularies: what the two vocabularies share.
        mass: where the models' probability lies; None where tokenizers alone were compared.
        notes: what else the reader should know, one sentence each.
        total: bytes, tokens and groups of all texts.
    """

    student: str
    teacher: str
    texts: tuple[CutText, ...]
    shapes: tuple[Shape, ...]
    vocabularies: VocabularyFigures
    mass: PairMass | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def total(self) -> Counts:
        """Bytes, tokens and groups of all texts."""
        return total(self.texts)

    def to_dict(self) -> dict:
        """All numbers, ready for `json.dumps`."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "total": self.total.to_dict(),
            "texts": [{"name": text.name, **text.counts.to_dict()} for text in self.texts],
            "merged_groups": [dataclasses.asdict(shape) for shape in self.shapes],
            "vocabularies": self.vocabularies.to_dict(),
            "mass": None if self.mass is None else self.mass.to_dict(),
            "notes": list(self.notes),
        }
