"""What a distillation run compares: the points of the grid of merges, groups and comparisons, and their presets."""

from __future__ import annotations

from dataclasses import dataclass

MERGES = ("chain", "observed", "boundary")
GROUPS = ("all", "one_to_one", "positional")
COMPARISONS = ("sorted", "hybrid", "shared", "shared_rest", "projected", "events", "alm", "reverse_kl")
# Comparisons that ask what the text of a group costs, and those for which unmatched entries go to a prefix.
OF_TEXT = ("events", "alm", "reverse_kl")
PROJECTING = ("projected", "events")
NORMALIZATIONS = ("groups", "row_mean")
SORTS = ("auto", "host", "xla")
MASKS = ("whitespace", "numerals")

# name -> (merge, groups, compare). With one tokenizer every entry is shared, which makes "shared" GKD.
PRESETS: dict[str, tuple[str, str, str]] = {
    "gold": ("chain", "all", "hybrid"),
    "uld": ("chain", "positional", "sorted"),
    "uld_extended": ("chain", "all", "sorted"),
    "gkd": ("chain", "all", "shared"),
    "strict": ("boundary", "one_to_one", "shared"),
    "projected": ("boundary", "all", "projected"),
    "events": ("boundary", "all", "events"),
    "alm": ("boundary", "all", "alm"),
    "reverse_kl": ("boundary", "all", "reverse_kl"),
}


@dataclass(frozen=True)
class LossSpec:
    """One distillation loss, with nothing left to decide.

    Attributes:
        merge: how the tokens of a group become one distribution: "chain", "observed" or "boundary".
        groups: which groups count: "all", "one_to_one", or "positional" (no alignment: token k against token k).
        compare: how two distributions are compared, one of `COMPARISONS`.
        beta: skew of the generalised Jensen-Shannon divergence; 0 is KL(teacher||student), 1 is KL(student||teacher).
        matched_weight: weight of the matched part of "hybrid"; None: matched entries / teacher vocabulary.
        unmatched_weight: weight of the sorted rest of "hybrid"; None: one less the matched weight.
        crossentropy_weight: weight of the student's cross-entropy on the completion.
        distillation_weight: weight of the distillation itself.
        student_temperature: the student's logits are divided by it.
        teacher_temperature: the teacher's logits are divided by it.
        skip_student_stop: leave the student's stop token out of the loss.
        skip_teacher_stop: leave the teacher's stop token out of the loss.
        top_k: sort only the top_k largest probabilities; 0 sorts all (exact).
        sort: who sorts whole tails: "host" (numpy), "xla", or "auto" (the host on CPUs, XLA elsewhere).
        mask: kinds of unmatched entries that a projection leaves out: "whitespace", "numerals".
        alm_temperature: "alm" raises probabilities to one over it.
        normalization: "groups" (sum over the global batch / its number of groups) or "row_mean" (as TRL).
        name: the preset this came from, for people to read.
    """

    merge: str = "chain"
    groups: str = "all"
    compare: str = "hybrid"
    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    crossentropy_weight: float = 0.0
    distillation_weight: float = 1.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    skip_student_stop: bool = False
    skip_teacher_stop: bool = False
    top_k: int = 0
    sort: str = "auto"
    mask: tuple[str, ...] = ()
    alm_temperature: float = 100.0
    normalization: str = "groups"
    name: str = "gold"

    @property
    def of_text(self) -> bool:
        """Whether the comparison asks what the text of a group costs."""
        return self.compare in OF_TEXT

    def check(self) -> None:
        """Refuses points of the grid that mean nothing.

        Raises:
            ValueError: naming the flags and what would be right.
        """
        if self.merge == "observed" and self.compare in (*OF_TEXT, *PROJECTING):
            raise ValueError(
                f"--merge is 'observed', which reads the distributions one position late, for parity with TRL alone; "
                f"--compare {self.compare} needs boundary or chain."
            )
        if self.groups == "positional" and self.of_text:
            raise ValueError(
                f"--groups is 'positional', so that the two sides of a group are different texts; --compare "
                f"{self.compare} needs all or one_to_one."
            )
        if self.mask and self.compare not in PROJECTING:
            raise ValueError(
                f"--projection_mask is {','.join(self.mask)}, but --compare {self.compare} projects nothing; it goes "
                f"with {' or '.join(PROJECTING)}."
            )

    def describe(self) -> str:
        """The loss in one line, such as `gold: chain/all/hybrid, beta 0.5`."""
        parts = [f"{self.name}: {self.merge}/{self.groups}/{self.compare}"]
        if self.compare not in ("sorted", "reverse_kl"):
            parts.append(f"beta {self.beta:g}")
        if self.compare == "alm":
            parts.append(f"probabilities to the power 1/{self.alm_temperature:g}")
        if self.mask:
            parts.append(f"{' and '.join(self.mask)} masked")
        if self.compare == "hybrid":
            if self.matched_weight is None:
                parts.append("weights by overlap")
            else:
                parts.append(f"weights {self.matched_weight:g} matched, {self.unmatched_weight:g} unmatched")
        if (self.student_temperature, self.teacher_temperature) != (1.0, 1.0):
            parts.append(f"temperatures {self.student_temperature:g} student, {self.teacher_temperature:g} teacher")
        if self.distillation_weight != 1.0:
            parts.append(f"distillation x {self.distillation_weight:g}")
        if self.crossentropy_weight:
            parts.append(f"cross-entropy x {self.crossentropy_weight:g}")
        if self.top_k:
            parts.append(f"sorted top {self.top_k}")
        if self.skip_student_stop or self.skip_teacher_stop:
            parts.append("stop tokens left out")
        if self.normalization != "groups":
            parts.append(self.normalization)
        return ", ".join(parts)
