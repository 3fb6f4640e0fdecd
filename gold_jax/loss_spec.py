"""What a distillation run compares: the points of the grid of merges, groups and comparisons, and their names.

The comparisons themselves, with their options, are in `losses.compare`. It is imported when it is first used:
reading flags does not wait for JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gold_jax.losses.compare import BoundCompare, Comparison

MERGES = ("chain", "observed", "boundary")
GROUPS = ("all", "one_to_one", "positional")
NORMALIZATIONS = ("groups", "row_mean")
SORTS = ("auto", "host", "xla")
MASKS = ("whitespace", "numerals")

# name -> (merge, groups, compare), where that is not (boundary, all, name) as for every other comparison. With one tokenizer
# every entry is shared, which makes "shared" GKD.
PRESETS: dict[str, tuple[str, str, str]] = {
    "gold": ("chain", "all", "hybrid"),
    "uld": ("chain", "positional", "sorted"),
    "uld_extended": ("chain", "all", "sorted"),
    "gkd": ("chain", "all", "shared"),
    "strict": ("boundary", "one_to_one", "shared"),
}


def comparisons() -> Mapping[str, Comparison]:
    """The table of comparisons."""
    from gold_jax.losses.compare import COMPARISONS

    return COMPARISONS


def presets() -> dict[str, tuple[str, str, str]]:
    """Every `--loss` with its point of the grid: (merge, groups, compare)."""
    return {**PRESETS, **{name: ("boundary", "all", name) for name in comparisons() if name not in PRESETS}}


class Names(Collection[str]):
    """Names of a table that is loaded when they are first used."""

    def __init__(self, table: Callable[[], Mapping[str, Any]]):
        self._table = table

    def __contains__(self, name: object) -> bool:
        return name in self._table()

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


def options_help() -> str:
    """The options of every comparison that `--loss_kwargs` sets, in words; "" where there are none."""
    from gold_jax.losses.options import describe

    own = {
        name: {key: p for key, p in comparison.options.items() if not p.option.flag}
        for name, comparison in comparisons().items()
    }
    return "; ".join(f"{name}: {describe(known)}" for name, known in own.items() if known)


def read_options(compare: str, flags: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a comparison from the command line.

    Args:
        compare: its name.
        flags: every setting by its flag; those that set an option of this comparison are read.
        kwargs: `--loss_kwargs`: options that have no flag of their own.

    Raises:
        ValueError: an option that it has not, that has a flag, or that may not have this value.
    """
    from gold_jax.losses.options import complete

    comparison = comparisons()[compare]
    flagged = {name: p.option.flag for name, p in comparison.options.items() if p.option.flag}
    for name in kwargs:
        if name in flagged:
            raise ValueError(f"--loss_kwargs has {name!r}, which has a flag of its own: --{flagged[name]}.")
    given = {name: flags[flag] for name, flag in flagged.items()} | dict(kwargs)
    return complete(compare, comparison.function, given, "--loss_kwargs: ")


@dataclass(frozen=True)
class LossSpec:
    """One distillation loss, with nothing left to decide.

    Attributes:
        merge: how the tokens of a group become one distribution: "chain", "observed" or "boundary".
        groups: which groups count: "all", "one_to_one", or "positional" (no alignment: token k against token k).
        compare: how two distributions are compared, a name in `losses.compare.COMPARISONS`.
        options: the comparison's own options by name; those that are not given get its defaults.
        crossentropy_weight: weight of the student's cross-entropy on the completion.
        distillation_weight: weight of the distillation itself.
        student_temperature: the student's logits are divided by it.
        teacher_temperature: the teacher's logits are divided by it.
        skip_student_stop: leave the student's stop token out of the loss.
        skip_teacher_stop: leave the teacher's stop token out of the loss.
        mask: kinds of unmatched entries that a projection leaves out: "whitespace", "numerals".
        normalization: "groups" (sum over the global batch / its number of groups) or "row_mean" (as TRL).
        name: the preset this came from, for people to read.

    Raises:
        ValueError: an option that the comparison has not, or that may not have this value.
    """

    merge: str = "chain"
    groups: str = "all"
    compare: str = "hybrid"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    crossentropy_weight: float = 0.0
    distillation_weight: float = 1.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    skip_student_stop: bool = False
    skip_teacher_stop: bool = False
    mask: tuple[str, ...] = ()
    normalization: str = "groups"
    name: str = "gold"

    def __post_init__(self):
        from gold_jax.losses.options import complete

        options = complete(self.compare, self.comparison.function, self.options)
        object.__setattr__(self, "options", options)

    @property
    def comparison(self) -> Comparison:
        """The comparison's line in the table."""
        return comparisons()[self.compare]

    def bound(self) -> BoundCompare:
        """The comparison with its options, as `distill_loss` takes it."""
        return self.comparison.bind(**self.options)

    @property
    def of_text(self) -> bool:
        """Whether the comparison asks what the text of a group costs."""
        return self.comparison.reads_text

    def check(self) -> None:
        """Refuses points of the grid that mean nothing.

        Raises:
            ValueError: naming the flags and what would be right.
        """
        comparison = self.comparison
        if self.merge == "observed" and (comparison.reads_text or comparison.projects):
            raise ValueError(
                f"--merge is 'observed', which reads the distributions one position late, for parity with TRL alone; "
                f"--compare {self.compare} needs boundary or chain."
            )
        if self.groups == "positional" and self.of_text:
            raise ValueError(
                f"--groups is 'positional', so that the two sides of a group are different texts; --compare "
                f"{self.compare} needs all or one_to_one."
            )
        if self.mask and not comparison.projects:
            raise ValueError(
                f"--projection_mask is {','.join(self.mask)}, but --compare {self.compare} projects nothing; it goes "
                f"with {' or '.join(name for name, other in comparisons().items() if other.projects)}."
            )

    def describe(self) -> str:
        """The loss in one line, such as `gold: chain/all/hybrid, beta 0.5`."""
        parts = [f"{self.name}: {self.merge}/{self.groups}/{self.compare}"]
        for name, (_, _, option) in self.comparison.options.items():
            parts.append(option.show(self.options[name]) if option.show else f"{name} {self.options[name]}")
        if self.mask:
            parts.append(f"{' and '.join(self.mask)} masked")
        if (self.student_temperature, self.teacher_temperature) != (1.0, 1.0):
            parts.append(f"temperatures {self.student_temperature:g} student, {self.teacher_temperature:g} teacher")
        if self.distillation_weight != 1.0:
            parts.append(f"distillation x {self.distillation_weight:g}")
        if self.crossentropy_weight:
            parts.append(f"cross-entropy x {self.crossentropy_weight:g}")
        if self.skip_student_stop or self.skip_teacher_stop:
            parts.append("stop tokens left out")
        if self.normalization != "groups":
            parts.append(self.normalization)
        return ", ".join(filter(None, parts))
