"""What a plan says of a run: numbers as attributes, as a dict, in the terminal."""

import dataclasses
from typing import Any

from rich.console import Console

from gold_jax.planning.advice import Advice
from gold_jax.planning.arithmetic import parameter_count
from gold_jax.planning.footprint import ERROR, FORMULA
from gold_jax.planning.models import ASSUMED_SHARE, Model, Vocabularies
from gold_jax.planning.plan import Plan
from gold_jax.planning.search import Candidate
from gold_jax.planning.terminal import show
from gold_jax.planning.wording import MOMENTS, RESOURCES, duration, size


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What is known of a run before anything of it is there.

    Attributes:
        student, teacher: the models; no teacher is fine-tuning.
        vocabularies: what their vocabularies share, and who says so; None without a teacher.
        plan: what the run takes.
        advice: what to change where it does not fit.
        search: other ways to spread it, the best first; None where none was looked for.
        notes: what else the reader should know, one sentence each.
    """

    student: Model
    teacher: Model | None
    vocabularies: Vocabularies | None
    plan: Plan
    advice: tuple[Advice, ...] = ()
    search: tuple[Candidate, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def loss(self) -> str:
        """What is minimised, in words."""
        if self.teacher is None:
            return "cross-entropy"
        return self.plan.request.args.loss_spec(self.vocabularies.matched is None).describe()

    def describe_vocabularies(self) -> str:
        """What the vocabularies share, and who says so."""
        sizes = " and ".join(f"{model.config.vocab_size:,}" for model in (self.student, self.teacher))
        matched, how = self.vocabularies
        if matched is None:
            return {
                "tokenizers": "one and the same",
                "configs": f"taken for one and the same ({sizes} rows, one family; the tokenizers are not both here)",
            }[how]
        said = {
            "tokenizers": "by the tokenizers",
            "given": "by --matched",
            "assumed": f"assumed, {ASSUMED_SHARE:.0%} of the smaller: the tokenizers are not both here, and --matched says nothing",
        }[how]
        return f"{sizes} rows, {matched:,} matched ({said})"

    def findings(self) -> list[str]:
        """What the plan says, one sentence each."""
        plan = self.plan
        device, when = ("chip" if plan.request.topology.chip.cores == 1 else "core"), MOMENTS[plan.peak_program.program]
        held, limit = size(plan.peak), size(plan.limit)
        found = []
        if plan.fits:
            free = size(plan.limit - plan.peak)
            found.append(f"It fits: at its fullest, when {when}, a {device} holds {held} of {limit}; {free} are free.")
            by_formula = sum(plan.peak_program.parts.get(part, 0) for part in FORMULA)
            if not plan.compiled and plan.limit - plan.peak < ERROR * by_formula:
                found.append("That is too close to tell by arithmetic.")
        elif plan.peak > plan.limit:
            over = size(plan.peak - plan.limit)
            found.append(
                f"It does not fit: when {when}, a {device} would have to hold {held}, {over} more than its {limit}."
            )
        else:
            found.append("It does not fit: the compiler refuses a program.")
        for program in plan.refused:
            found.append(
                f"The program in which {MOMENTS[program.program]} is refused by the compiler: «{program.error}»"
            )
        found += self._of_time()
        if plan.compile_seconds is not None:
            count = sum(program.seconds is not None for program in plan.programs)
            found.append(
                f"Compiling {count} programs took {duration(plan.compile_seconds)} here; the run does the same when it starts."
            )
        else:
            found.append(
                "Nothing was compiled. What stays is exact; activations, loss and temporaries are by a formula that comes out up to "
                f"{ERROR:.0%} too small where it was compared with compiled programs, for TPUs."
            )
        return found

    def _of_time(self) -> list[str]:
        plan, chips = self.plan, self.plan.request.topology.chips
        speed, most = plan.tokens_per_second, RESOURCES[plan.slowest]
        update = (
            f"An update of {plan.tokens:,} tokens takes {duration(plan.seconds)} at least, most of it for {most}: "
            f"{speed:,.0f} tokens a second at most, {speed / chips:,.0f} a chip. Of the operations that the chips could do in that "
            f"time the models need {plan.model_share:.0%}."
        )
        floor = (
            "That is a floor for rows as long as they may be: computing, reading and sending are taken to overlap wholly, and the "
            "host to take no time. What share of it a run reaches is not known before one is run."
        )
        return [update, floor]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for `json.dumps`."""
        plan, args = self.plan, self.plan.request.args
        topology, sizes = plan.request.topology, plan.request.footprint()
        vocabularies = None
        if self.vocabularies is not None:
            vocabularies = {**self.vocabularies._asdict(), "one": self.vocabularies.matched is None}
        return {
            "student": _described(self.student),
            "teacher": None if self.teacher is None else _described(self.teacher),
            "vocabularies": vocabularies,
            "loss": self.loss,
            "topology": {
                "name": topology.name,
                "kind": topology.kind,
                "chips": topology.chips,
                "devices": topology.devices,
                "hosts": topology.hosts,
                "memory_bytes": topology.chip.hbm_bytes,
            },
            "mesh": plan.request.mesh,
            "update": {
                "rows": sizes.rows * args.gradient_accumulation_steps,
                "micro_batches": args.gradient_accumulation_steps,
                "length": sizes.length,
                "tokens": plan.tokens,
                "sampled_rows": sizes.sampled_rows if sizes.samples else 0,
            },
            "compiled": plan.compiled,
            "fits": plan.fits,
            "memory": {
                "limit_bytes": plan.limit,
                "peak_bytes": plan.peak,
                "free_bytes": plan.limit - plan.peak,
                "fullest": plan.peak_program.program,
                "always": plan.resident,
                "moments": [{**dataclasses.asdict(program), "total": program.total} for program in plan.programs],
            },
            "time": {
                "seconds": plan.seconds,
                "slowest": plan.slowest,
                "tokens_per_second": plan.tokens_per_second,
                "tokens_per_second_per_chip": plan.tokens_per_second / topology.chips,
                "model_flops_share": plan.model_share,
                "sent_bytes": plan.sent,
                "phases": [
                    {**dataclasses.asdict(phase), "least": phase.seconds.seconds, "slowest": phase.seconds.slowest}
                    for phase in plan.phases
                ],
            },
            "compile_seconds": plan.compile_seconds,
            "advice": [dataclasses.asdict(one) for one in self.advice],
            "search": None if self.search is None else [one.to_dict() for one in self.search],
            "findings": self.findings(),
            "notes": list(self.notes),
        }

    def print(self, console: Console | None = None) -> None:
        """Show everything in the terminal; `console`: where, and how wide."""
        show(self, console or Console())


def _described(model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "name": model.name,
        "family": config.family,
        "parameters": parameter_count(config).total,
        "layers": config.layers,
        "width": config.width,
        "vocabulary": config.vocab_size,
    }


__all__ = ["Report"]
