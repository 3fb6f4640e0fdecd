"""What is known of a pair of models before training: data that the terminal and the page show."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from gold_jax.inspection.prompts import Prompts
from gold_jax.inspection.tokenization import Counts, CutText, Shape
from gold_jax.inspection.vocabularies import VocabularyFigures


class Mass(NamedTuple):
    """Where one model's probability lies, as the mean over positions."""

    positions: int
    strings: float  # on entries matched by strings
    surfaces: float  # on entries matched by surfaces
    routed: float  # on unmatched entries that give it to a matched prefix
    whitespace: float  # the part of `routed` on runs of white space
    numerals: float  # the part of `routed` on numerals of several digits

    @property
    def projected(self) -> float:
        """Mass on matched entries after projection: all but what finds no prefix."""
        return self.surfaces + self.routed

    def share_of_routed(self, kind: str) -> float:
        """The part of the routed mass from "whitespace" or "numerals"; NaN where nothing is routed."""
        return getattr(self, kind) / self.routed if self.routed > 0 else math.nan

    def to_dict(self) -> dict:
        """The fields and `projected`; None for what is the mean of no position."""
        values = self._asdict() | {"projected": self.projected}
        return {name: None if math.isnan(value) else value for name, value in values.items()}

    @classmethod
    def mean(cls, parts: Sequence["Mass"]) -> "Mass":
        """The mean over all positions of the parts; NaN where there is none."""
        parts = [part for part in parts if part.positions]
        if not parts:
            return cls(0, *[math.nan] * 5)
        weights, *columns = zip(*parts)
        return cls(sum(weights), *(sum(w * x for w, x in zip(weights, column)) / sum(weights) for column in columns))


class PairMass(NamedTuple):
    """Where the probability of both models lies: over all texts, and of either for every text."""

    student: Mass
    teacher: Mass
    by_text: tuple[tuple[Mass, Mass], ...]
    dtype: str  # what was computed in

    def to_dict(self) -> dict:
        """As nested dicts."""
        pairs = (self[:2], *self.by_text)
        whole, *by_text = ({"student": one.to_dict(), "teacher": other.to_dict()} for one, other in pairs)
        return {"dtype": self.dtype, **whole, "by_text": by_text}


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What is known of a pair."""

    student: str  # what the two are called
    teacher: str
    texts: tuple[CutText, ...]  # as both cut them
    shapes: tuple[Shape, ...]  # the merged groups of all texts
    vocabularies: VocabularyFigures
    mass: PairMass | None = None  # None where tokenizers alone were compared
    notes: tuple[str, ...] = ()  # what else the reader should know, one sentence each
    prompts: Prompts | None = None  # None where a side has no chat template that can be used

    @functools.cached_property
    def total(self) -> Counts:
        """Bytes, tokens and groups of all texts."""
        return Counts.of([group for text in self.texts for group in text.groups])

    def to_dict(self) -> dict:
        """All numbers, ready for `json.dumps`."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "total": self.total._asdict(),
            "texts": [{"name": text.name, **text.counts._asdict()} for text in self.texts],
            "merged_groups": [shape._asdict() for shape in self.shapes],
            "vocabularies": self.vocabularies.to_dict(),
            "mass": None if self.mass is None else self.mass.to_dict(),
            "notes": list(self.notes),
            "prompts": None if self.prompts is None else self.prompts.to_dict(),
        }
