"""`python -m gold_jax.plan`: what a training run would take of devices that are not here, and whether it fits."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gold_jax.cli import require, run, show
from gold_jax.config import DataArguments, GOLDConfig, ModelArguments, SFTConfig
from gold_jax.config.fields import Settings, flag
from gold_jax.config.parsing import parse_args
from gold_jax.planning.hardware import FORMS, need_compiler, prepare, read_topology
from gold_jax.values import AT_LEAST_ONE


# fmt: off
class PlanArguments(Settings):
    """For which devices `gold_jax.plan` plans, and what it looks for."""

    topology: str | None = flag(None,
        "The devices: a TPU slice such as v5e:2x4, v5e-8 or v5p:2x2x4, or GPUs such as gpu:8xh100-80gb.", important=True)
    search: bool = flag(False,
        "Also look for the mesh and the rows per device with which most tokens are learned a second.", important=True)
    search_limit: int = flag(6, "How many ways the search compiles at most, that which was asked for included.",
        range=AT_LEAST_ONE)
    matched: int | None = flag(None,
        "Entries that the two vocabularies share, where not both tokenizers are on this disk (gold_jax.inspect tells).",
        range=AT_LEAST_ONE)
    json: bool = flag(False, "Print one JSON object.", important=True)


# fmt: on
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the flags of `gold_jax.train` or `gold_jax.sft` and its own, plans, shows the report (with `--json`, an object)."""
    prepare()
    # Fine-tuning where nothing is named that it has not.
    kinds = ModelArguments, DataArguments, (SFTConfig, GOLDConfig), PlanArguments
    model, _, training, args, notices = parse_args(argv, *kinds, prog="gold_jax.plan", doc=__doc__)
    show(notices)
    from rich.console import Console

    to_terminal = Console(stderr=True, force_terminal=sys.stderr.isatty())  # FORCE_COLOR, as in notebooks, is none
    with to_terminal.status("reading configs") as status:
        report = plan_run(model, training, args, lambda what: status.update(f"gold_jax.plan: {what}"))
    if args.json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        report.show(Console())


def plan_run(model: ModelArguments, training: SFTConfig, args: PlanArguments, progress: Callable[[str], None]) -> Any:
    """The `planning.report.Report` of a run on `args.topology`; `progress` is told what is being done.

    ValueError: it makes no run. FileNotFoundError, ImportError: a model, or the TPU compiler, is not there.
    """
    require(args.topology, "topology", FORMS)
    topology = read_topology(args.topology)
    require(model.model_name_or_path, "model_name_or_path", "the student, a folder or a hub id")
    if topology.kind == "tpu":
        need_compiler(topology.name)
    from gold_jax.planning.advice import advice, search
    from gold_jax.planning.analytic import estimate
    from gold_jax.planning.compiled import compile_plan, why_not_compiled
    from gold_jax.planning.models import find_model, find_vocabularies
    from gold_jax.planning.plan import STUDENT, Pair, PlanRequest
    from gold_jax.planning.report import Report
    from gold_jax.sharding.axes import mesh_sizes
    from gold_jax.training.build import check_decode_lengths

    mesh = mesh_sizes(training.mesh, topology.devices)
    named = {"attn_implementation": model.attn_implementation, "revision": model.model_revision}
    options = named | training.model_init_kwargs
    student = find_model(model.model_name_or_path, options["revision"], "student")
    teacher = vocabularies = None
    if isinstance(training, GOLDConfig) and (name := training.teacher_model_name_or_path) is not None:
        revision = training.teacher_model_init_kwargs.get("revision") or training.teacher_model_revision
        teacher = find_model(name, revision, "teacher")
        check_decode_lengths(training, student.config, teacher.config)
        progress("reading tokenizers")
        vocabularies = find_vocabularies(student, teacher, training, args.matched)
    pair = Pair(student.config, teacher and teacher.config, vocabularies and vocabularies.matched)
    request = PlanRequest(training, pair, topology, mesh, options["attn_implementation"])

    def shorter(way: PlanRequest) -> Any:  # of two programs with the same gradient, the larger tells enough
        return compile_plan(way, leave_out=STUDENT[:1] if way.micro_batches > 1 else ())

    not_compiled = None if topology.kind == "tpu" else why_not_compiled(topology)
    compiles, ways = not_compiled is None, None
    plan = compile_plan(request, progress) if compiles else estimate(request)
    if args.search:
        ways = search(plan, shorter if compiles else None, limit=args.search_limit, progress=progress)
    progress("looking for what would help")
    helps = () if plan.fits else advice(plan)
    return Report(student, teacher, vocabularies, plan, helps, ways, _notes(training, pair, mesh), not_compiled)


def _notes(training: SFTConfig, pair: Any, mesh: dict[str, int]) -> list[str]:
    """What a plan leaves out or had to do without, one sentence each."""
    notes, tensor, distils = [], mesh["tensor"], isinstance(training, GOLDConfig)
    if distils and training.seq_kd:
        notes.append("What the teacher writes (--seq_kd) is not planned.")
    if distils and training.server_url and pair.teacher:
        own = "it has devices of its own, and no time of it is counted"
        notes.append(f"A server writes the student's completions: {own}.")
    if training.bf16 is False:
        counted = "Without --bf16 products of float32 factors are counted as six of bfloat16 ones, as on TPUs"
        notes.append(f"{counted}; on GPUs they can take longer.")
    for role, config in (("student", pair.student), ("teacher", pair.teacher)):
        if config and config.heads % tensor:
            heads = f"tensor={tensor} does not divide the {role}'s {config.heads} heads"
            notes.append(f"{heads}: each device computes all of its attention.")
    if pair.teacher is None and distils:
        notes.append("There is no teacher (--teacher_model_name_or_path): this is a plan of fine-tuning.")
    return notes


if __name__ == "__main__":
    run("gold_jax.plan", main)
