"""What a distillation run compares: the points of the grid of merges, groups and comparisons, and their names.

The comparisons themselves, with their options, are in `losses.compare`. It is imported when it is first used:
reading flags does not wait for JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gold_jax.values import NOT_NEGATIVE, POSITIVE

if TYPE_CHECKING:
    from gold_jax.losses.compare import BoundCompare, Comparison

MERGES = ("chain", "observed", "boundary")
GROUPS = ("all", "one_to_one", "positional")
NORMALIZATIONS = ("groups", "row_mean")
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


def options_help() -> str:
    """The options of every comparison that `--loss_kwargs` sets, in words; "" where there are none."""
    from gold_jax.losses.options import describe

    own = {
        name: {key: parameter for key, parameter in comparison.options.items() if not parameter.option.flag}
        for name, comparison in comparisons().items()
    }
    return "; ".join(f"{name}: {describe(known)}" for name, known in own.items() if known)


def read_options(compare: str, flags: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the comparison `compare`: those that have a flag from `flags`, the others from `--loss_kwargs`.

    An option that it has not, that has a flag, or that may not have this value is a ValueError.
    """
    from gold_jax.losses.options import complete

    known = comparisons()[compare].options
    flagged = {name: parameter.option.flag for name, parameter in known.items() if parameter.option.flag}
    for name in kwargs:
        if name in flagged:
            raise ValueError(f"--loss_kwargs has {name!r}, which has a flag of its own: --{flagged[name]}.")
    given = {name: flags[flag] for name, flag in flagged.items()} | dict(kwargs)
    return complete(compare, known, given, "--loss_kwargs: ")


_RANGES = {"crossentropy_weight": NOT_NEGATIVE, "distillation_weight": NOT_NEGATIVE}
_RANGES |= {"student_temperature": POSITIVE, "teacher_temperature": POSITIVE}


@dataclass(frozen=True)
class LossSpec:
    """A fully specified distillation loss.

    Attributes:
        merge: how the tokens of a group become one distribution, one of `MERGES`.
        groups: which groups count, one of `GROUPS`; "positional" is no alignment: token k against token k.
        compare: how two distributions are compared, a name in `COMPARISONS`.
        options: options of the comparison; those left out have its defaults.
        crossentropy_weight: weight of the student's cross-entropy on the completion.
        distillation_weight: weight of the comparison.
        student_temperature, teacher_temperature: the logits of each side are divided by it.
        skip_student_stop, skip_teacher_stop: leave that side's stop token out of the loss.
        mask: kinds of unmatched entries that a projection leaves out, of `MASKS`.
        normalization: "groups", the sum over the global batch by its number of groups; "row_mean": as TRL.
        name: the preset that it came from, for messages.

    Raises:
        ValueError: an unknown name, a number out of range, or an option that the comparison does not have.
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
    # The line of the table when this was made: registering its name again changes nothing made before.
    comparison: Comparison = field(init=False, repr=False)

    def __post_init__(self):
        from gold_jax.losses.options import complete

        choices = {"merge": MERGES, "groups": GROUPS, "compare": comparisons(), "normalization": NORMALIZATIONS}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
        for name, legal in _RANGES.items():
            if not legal.holds(value := getattr(self, name)):
                raise ValueError(f"{name} is {value!r}; it must be a number {legal.words}.")
        object.__setattr__(self, "mask", tuple(self.mask))
        object.__setattr__(self, "comparison", comparisons()[self.compare])
        object.__setattr__(self, "options", complete(self.compare, self.comparison.options, self.options))

    def bound(self) -> BoundCompare:
        """The comparison with its options, as `distill_loss` takes it."""
        return self.comparison.bind(**self.options)

    @property
    def of_text(self) -> bool:
        """Whether the comparison asks what the text of a group costs."""
        return self.comparison.reads_text

    def check(self) -> None:
        """Refuses points of the grid that mean nothing, with a ValueError that names the flags and what would be right."""
        reads_text, projects = self.comparison.reads_text, self.comparison.projects
        if self.merge == "observed" and (reads_text or projects):
            raise ValueError(
                f"--merge is 'observed', which reads the distributions one position late, for parity with TRL alone; "
                f"--compare {self.compare} needs boundary or chain."
            )
        if self.groups == "positional" and reads_text:
            raise ValueError(
                f"--groups is 'positional', so that the two sides of a group are different texts; --compare "
                f"{self.compare} needs all or one_to_one."
            )
        if self.mask and not projects:
            fitting = " or ".join(name for name, other in comparisons().items() if other.projects)
            raise ValueError(
                f"--projection_mask is {','.join(self.mask)}, but --compare {self.compare} projects nothing; it goes "
                f"with {fitting}."
            )

    def describe(self) -> str:
        """The loss in one line, such as `gold: chain/all/hybrid, beta 0.5`."""
        options = self.comparison.options.items()
        temperatures = self.student_temperature, self.teacher_temperature
        parts = [
            f"{self.name}: {self.merge}/{self.groups}/{self.compare}",
            *(p.option.show(self.options[k]) if p.option.show else f"{k} {self.options[k]}" for k, p in options),
            f"{' and '.join(self.mask)} masked" if self.mask else "",
            "temperatures {:g} student, {:g} teacher".format(*temperatures) if temperatures != (1.0, 1.0) else "",
            f"distillation x {self.distillation_weight:g}" if self.distillation_weight != 1.0 else "",
            f"cross-entropy x {self.crossentropy_weight:g}" if self.crossentropy_weight else "",
            "stop tokens left out" if self.skip_student_stop or self.skip_teacher_stop else "",
            self.normalization if self.normalization != "groups" else "",
        ]
        return ", ".join(filter(None, parts))
