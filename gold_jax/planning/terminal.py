"""A report in the terminal: memory by part and program, time by phase, what would help."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gold_jax.planning.analytic import parameter_count
from gold_jax.planning.models import Model
from gold_jax.planning.plan import RESOURCES
from gold_jax.planning.report import Report
from gold_jax.planning.request import PlanRequest, mesh_flag
from gold_jax.planning.units import amount, duration, seconds_unit, size, unit_of
from gold_jax.terminal import columns, put, say, section

# The programs over their columns of memory, in two lines; in rows of time "teacher forward" and so on.
_PROGRAMS = {
    "teacher": "teacher\nforward",
    "student": "student\nfwd+bwd",
    "student, further micro-batches": "and\nfurther",
    "optimizer": "opti-\nmizer",
    "prefill": "prefill",
    "decoding": "decode",
}
_PHASES = {
    "prefill": "prefill",
    "decoding": "decode",
    "teacher": "teacher forward",
    "student": "student fwd+bwd",
    "optimizer": "optimizer",
}
# Parts of memory, in their order.
_PARTS = {
    "student": "student, float32",
    "optimizer": "its optimizer",
    "teacher": "teacher",
    "programs": "programs",
    "gradients": "gradients so far",
    "batch": "batch",
    "teacher's hidden states": "teacher's hidden states",
    "activations": "activations",
    "loss": "loss",
    "new gradients": "new gradients",
    "decoding weights": "weights for decoding",
    "cache": "cache",
    "smaller cache": "cache it grows from",
    "temporaries": "temporaries",
}


def show(report: Report, console: Console) -> None:
    """Print a report."""
    for part in (_title, _memory, _time, _advice, _search):
        part(report, console)
    section(console, "in short")
    for sentence in report.findings():
        say(console, sentence, "yellow" if "«" in sentence else "")
    for note in report.notes:
        say(console, note, "yellow")


def _title(report: Report, console: Console) -> None:
    request, args = report.plan.request, report.plan.request.args
    topology, tensor = request.topology, request.mesh["tensor"]
    rows = {"student": _model(report.student)}
    if report.teacher is not None:
        rows |= {"teacher": _model(report.teacher), "vocabularies": report.describe_vocabularies()}
    rows["loss"] = report.loss
    batches = f" in {request.passes} micro-batches" if request.passes > 1 else ""
    rows["update"] = (
        f"{request.rows * request.passes:,} rows of {request.length:,} tokens{batches}, {args.per_device_train_batch_size} at a "
        f"time on {'each device' if tensor == 1 else f'each {tensor} devices'}"
    )
    if request.samples:
        rows["sampling"] = (
            f"{args.lmbda:.0%} of the completions, {request.sampled_rows:,} at once, of {args.max_completion_length:,} tokens "
            f"after prompts of {request.prompt_length:,}"
        )
    many = f"{topology.chips} {'chip' if topology.chips == 1 else 'chips'}"
    cores = f" of {topology.chip.cores} cores" if topology.chip.cores > 1 else ""
    rows["devices"] = f"{topology.name}: {many}{cores}; {_describe_memory(report)}"
    mesh = mesh_flag(request.mesh) if topology.devices > 1 else "one device"
    layouts = [f"; layout of the {whose} {layout}" for whose, layout in _layouts(request).items() if layout != "fsdp"]
    rows["mesh"] = "".join([mesh, *layouts])
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, words in rows.items():
        table.add_row(Text(f"  {name}", "dim"), Text(words, overflow="fold"))
    console.print(Text("gold_jax.plan", "bold"))
    console.print(table)


def _layouts(request: PlanRequest) -> dict[str, str]:
    found = {"student": request.args.layout}
    return found if request.pair.teacher is None else {**found, "teacher": request.args.teacher_layout}


def _model(model: Model) -> str:
    count = parameter_count(model.config)
    shown = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    return f"{model.name} ({model.config.family}, {shown} parameters)"


def _describe_memory(report: Report) -> str:
    plan, memory = report.plan, report.plan.request.topology.chip.hbm_bytes
    if plan.request.topology.kind == "tpu":
        return f"{size(plan.limit)} each"
    share = f"{plan.limit / memory:.0%}, {size(plan.limit)}"
    return f"of {size(memory)} each JAX takes {share}, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"


def _table(console: Console, *names: str, first: str = "", wrap: bool = False) -> Table:
    return columns(*names, first=first, wrap=wrap, gap=0 if console.width < 100 else 1)


def _memory(report: Report, console: Console) -> None:
    plan = report.plan
    unit, name = unit_of(plan.peak)
    section(console, f"memory of a {report.device}, {name}")
    table = _table(console, "resident", *(_PROGRAMS[program.program] for program in plan.programs))

    def shown(count: int | None) -> str:
        return "" if count is None else f"{count / unit:,.2f}"

    for part, label in _PARTS.items():
        sizes = [plan.resident.get(part), *(program.parts.get(part) for program in plan.programs)]
        if any(size is not None for size in sizes):
            table.add_row(f"{label}, {plan.request.dtype}" if part == "teacher" else label, *map(shown, sizes))
    table.add_section()
    resident = sum(plan.resident.values())
    totals = [resident + program.total for program in plan.programs]
    cells = [Text(shown(total), "bold" if total <= plan.limit else "bold red") for total in totals]
    table.add_row(Text("together", "bold"), shown(resident), *cells)
    whole, its_name = unit_of(plan.limit)
    free = [
        Text("refused", "red")
        if program.error
        else Text(f"{(plan.limit - total) / whole:,.2f}", "green" if total <= plan.limit else "red")
        for total, program in zip(totals, plan.programs)
    ]
    label = f"free of {plan.limit / whole:,.2f}" + (f" {its_name}" if whole != unit else "")
    table.add_row(label, "", *free)
    put(console, table)


def _time(report: Report, console: Console) -> None:
    plan = report.plan
    factor, unit = seconds_unit(plan.seconds)
    section(console, f"an update on each {report.device}, at least")
    table = _table(console, "FLOP", "HBM B", "sent B", *RESOURCES, "least", first=f"times in {unit}")
    sums = [0.0] * 7

    def row(name: str | Text, counts: list[float], slowest: str) -> None:
        *resources, least = (f"{value / factor:,.2f}" if value else "" for value in counts[3:])
        styled = (Text(text, "yellow" if slowest == which else "") for text, which in zip(resources, RESOURCES))
        table.add_row(name, *map(amount, counts[:3]), *styled, Text(least, "bold"))

    for phase in plan.phases:
        cost = phase.cost
        counts = [cost.flops, cost.hbm_bytes, sum(cost.sent.values()), *phase.resources.values(), phase.seconds]
        sums = [total + one for total, one in zip(sums, counts)]
        row(_PHASES[phase.name], counts, phase.slowest)
    table.add_section()
    row(Text("together", "bold"), sums, plan.slowest)
    put(console, table)
    sent = plan.together.sent
    if len(sent) > 1:
        by_axes = ", ".join(f"{axes} {amount(count)}B" for axes, count in sorted(sent.items()) if count)
        say(console, f"sent along {by_axes}", "dim")


def _advice(report: Report, console: Console) -> None:
    if not report.advice:
        return
    section(console, "what would help, by the analytic model")
    unit, name = unit_of(report.plan.peak)
    table = _table(console, f"saves {name}", "leaves", "fits", first="change", wrap=True)
    for one in report.advice:
        mark = Text("yes", "green") if one.fits else Text("no", "red")
        what = Text(one.flags).append(f"\n{one.why}", "dim")
        table.add_row(what, f"{one.saves / unit:,.2f}", f"{one.peak / unit:,.2f}", mark)
    put(console, table)


def _search(report: Report, console: Console) -> None:
    if report.search is None:
        return
    section(console, f"ways to spread it, {'compiled' if report.plan.compiled else 'by the analytic model'}")
    unit, name = unit_of(report.plan.peak)
    table = _table(console, "rows", "update", name, "fits", "time", "tok/s/chip", first="  mesh")
    for one in report.search:
        plan, request = one.plan, one.plan.request
        layout = _layouts(request).get("teacher", "fsdp")
        mesh = mesh_flag(request.mesh) + (f" T {layout}" if layout != "fsdp" else "")
        fits = Text("yes", "green") if plan.fits else Text("refused" if plan.refused else "no", "red")
        table.add_row(
            Text("› " if one.requested else "  ").append(mesh),
            f"{request.args.per_device_train_batch_size} x {request.passes}",
            f"{one.update_rows:,}",
            f"{plan.peak / unit:,.2f}",
            fits,
            duration(plan.seconds),
            f"{plan.tokens_per_second_per_chip:,.0f}",
        )
    put(console, table)
    words = "rows: at once on a device (along tensor: on a shard), times micro-batches; update: rows of one; ›: as asked for"
    if any(_layouts(one.plan.request).get("teacher", "fsdp") != "fsdp" for one in report.search):
        words += "; T: layout of the teacher"
    say(console, words, "dim")
    best = report.search[0]
    asked = " (as asked)" if best.requested else ""
    say(console, f"The first: {best.flags}{asked}" if best.plan.fits else "None of them fits.")
