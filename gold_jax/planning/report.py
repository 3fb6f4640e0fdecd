"""What a plan says of a run, as data: models, numbers, findings in words, and a dict of it all."""

import dataclasses
from typing import Any

from gold_jax.planning.advice import Advice
from gold_jax.planning.analytic import ERROR, FORMULA, parameter_count
from gold_jax.planning.models import ASSUMED_SHARE, Model, Vocabularies
from gold_jax.planning.plan import Plan
from gold_jax.planning.search import Candidate
from gold_jax.planning.units import duration, size

#: What happens while each program runs.
MOMENTS = {
    "teacher": "the teacher's forward pass runs",
    "student": "the student's forward and backward pass runs",
    "student, further micro-batches": "the student's pass over further micro-batches runs",
    "optimizer": "the optimizer updates",
    "prefill": "prompts are prefilled",
    "decoding": "tokens are decoded",
}


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
        return "cross-entropy" if self.teacher is None else self.plan.request.spec.describe()

    @property
    def device(self) -> str:
        """What a device is: "chip" or "core"."""
        return "chip" if self.plan.request.topology.chip.cores == 1 else "core"

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
        plan, found = self.plan, []
        when, peak, limit = MOMENTS[plan.peak_program.program], size(plan.peak), size(plan.limit)
        if plan.fits:
            free = size(plan.limit - plan.peak)
            found.append(
                f"It fits: at its fullest, when {when}, a {self.device} holds {peak} of {limit}; {free} are free."
            )
            by_formula = sum(plan.peak_program.parts.get(part, 0) for part in FORMULA)
            if not plan.compiled and plan.limit - plan.peak < ERROR * by_formula:
                found.append("That is too close to tell without compiling.")
        elif plan.peak > plan.limit:
            over = size(plan.peak - plan.limit)
            found.append(
                f"It does not fit: when {when}, a {self.device} would have to hold {peak}, {over} more than its {limit}."
            )
        else:
            found.append("It does not fit: the compiler refuses a program.")
        for program in plan.refused:
            found.append(
                f"The program in which {MOMENTS[program.program]} is refused by the compiler: «{program.error}»"
            )
        found.append(
            f"An update of {plan.tokens:,} tokens takes {duration(plan.seconds)} at least, most of it for {plan.slowest}: "
            f"{plan.tokens_per_second:,.0f} tokens a second at most, {plan.tokens_per_second_per_chip:,.0f} a chip. Of the "
            f"operations that the chips could do in that time the models need {plan.model_share:.0%}."
        )
        found.append(
            "That is a floor for rows as long as they may be: computing, reading and sending are taken to overlap wholly, and "
            "the host to take no time. What share of it a run reaches is not known before one is run."
        )
        if plan.compile_seconds is not None:
            count = sum(program.seconds is not None for program in plan.programs)
            found.append(
                f"Compiling {count} programs took {duration(plan.compile_seconds)} here; the run does the same when it starts."
            )
        else:
            found.append(
                "Nothing was compiled. What stays is exact; activations, loss and temporaries are by a formula that comes out up "
                f"to {ERROR:.0%} too small where it was compared with compiled programs, for TPUs."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for `json.dumps`."""
        plan, request, topology = self.plan, self.plan.request, self.plan.request.topology
        one = self.vocabularies and {**self.vocabularies._asdict(), "one": self.vocabularies.matched is None}
        return {
            "student": _described(self.student),
            "teacher": self.teacher and _described(self.teacher),
            "vocabularies": one,
            "loss": self.loss,
            "topology": {
                **{name: getattr(topology, name) for name in ("name", "kind", "chips", "devices", "hosts")},
                "memory_bytes": topology.chip.hbm_bytes,
            },
            "mesh": request.mesh,
            "update": {
                "rows": request.rows * request.passes,
                "micro_batches": request.passes,
                "length": request.length,
                "tokens": plan.tokens,
                "sampled_rows": request.sampled_rows if request.samples else 0,
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
                "tokens_per_second_per_chip": plan.tokens_per_second_per_chip,
                "model_flops_share": plan.model_share,
                "sent_bytes": plan.together.sent,
                "phases": [
                    {
                        "name": phase.name,
                        **dataclasses.asdict(phase.cost),
                        "seconds": phase.resources,
                        "least": phase.seconds,
                        "slowest": phase.slowest,
                    }
                    for phase in plan.phases
                ],
            },
            "compile_seconds": plan.compile_seconds,
            "advice": [dataclasses.asdict(one) for one in self.advice],
            "search": None if self.search is None else [one.to_dict() for one in self.search],
            "findings": self.findings(),
            "notes": list(self.notes),
        }


def _described(model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "name": model.name,
        "family": config.family,
        "parameters": parameter_count(config),
        "layers": config.layers,
        "width": config.width,
        "vocabulary": config.vocab_size,
    }
