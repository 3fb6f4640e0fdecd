"""The plan in the terminal: memory by part and moment, time by phase, what would help."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gold_jax.planning.arithmetic import parameter_count
from gold_jax.planning.meshes import mesh_flag
from gold_jax.planning.wording import COLUMNS, PARTS, RESOURCES, SHARES, amount, duration, seconds_unit, size, unit_of
from gold_jax.terminal import columns, put, say, section

if TYPE_CHECKING:
    from gold_jax.planning.models import Model
    from gold_jax.planning.plan import ProgramMemory
    from gold_jax.planning.report import Report

_PHASES = {
    "prefill": "prefill",
    "decoding": "decode",
    "teacher": "teacher forward",
    "student": "student forward+backward",
    "optimizer": "optimizer",
}


def show(report: "Report", console: Console) -> None:
    """Print a report."""
    _title(report, console)
    for part in (_memory, _time, _advice, _search):
        part(report, console)
    section(console, "in short")
    for sentence in report.findings():
        say(console, sentence, "yellow" if "«" in sentence else "")
    for note in report.notes:
        say(console, note, "yellow")


def _title(report: "Report", console: Console) -> None:
    plan, args = report.plan, report.plan.request.args
    topology, sizes = plan.request.topology, plan.request.footprint()
    console.print(Text("gold_jax.plan", "bold"))
    rows = {"student": _model(report.student)}
    if report.teacher is not None:
        rows["teacher"] = _model(report.teacher)
        rows["vocabularies"] = report.describe_vocabularies()
    rows["loss"] = report.loss
    passes = args.gradient_accumulation_steps
    batches = f" in {passes} micro-batches" if passes > 1 else ""
    rows["update"] = (
        f"{sizes.rows * passes:,} rows of {sizes.length:,} tokens{batches}, {args.per_device_train_batch_size} at a time on "
        f"{'each device' if sizes.placement.tensor_size == 1 else f'each {sizes.placement.tensor_size} devices'}"
    )
    if sizes.samples:
        rows["sampling"] = (
            f"{args.lmbda:.0%} of the completions, {sizes.sampled_rows:,} at once, of {args.max_completion_length:,} tokens after "
            f"prompts of {sizes.prompt_length:,}"
        )
    many = f"{topology.chips} {'chip' if topology.chips == 1 else 'chips'}"
    cores = f" of {topology.chip.cores} cores" if topology.chip.cores > 1 else ""
    rows["devices"] = f"{topology.name}: {many}{cores}; {_describe_memory(report)}"
    layouts = [
        f"{who} {layout}"
        for who, layout in (("student", args.layout), ("teacher", getattr(args, "teacher_layout", "fsdp")))
        if layout != "fsdp" and (who == "student" or report.teacher is not None)
    ]
    mesh = mesh_flag(plan.request.mesh) if topology.devices > 1 else "one device"
    rows["mesh"] = "; ".join([mesh, *(f"layout of the {layout}" for layout in layouts)])
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for name, words in rows.items():
        table.add_row(Text(f"  {name}", "dim"), Text(words, overflow="fold"))
    console.print(table)


def _model(model: "Model") -> str:
    config, count = model.config, parameter_count(model.config).total
    shown = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
    return f"{model.name} ({config.family}, {shown} parameters)"


def _describe_memory(report: "Report") -> str:
    plan, chip = report.plan, report.plan.request.topology.chip
    if plan.request.topology.kind == "tpu":
        return f"{size(plan.limit)} each"
    share = plan.limit / chip.hbm_bytes
    return (
        f"of {size(chip.hbm_bytes)} each JAX takes {share:.0%}, {size(plan.limit)}, unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
        "otherwise"
    )


def _table(console: Console, *names: str, first: str = "", wrap: bool = False) -> Table:
    return columns(*names, first=first, wrap=wrap, gap=0 if console.width < 100 else 1)


def _memory(report: "Report", console: Console) -> None:
    plan = report.plan
    unit, name = unit_of(plan.peak)
    device = "chip" if plan.request.topology.chip.cores == 1 else "core"
    section(console, f"memory of a {device}, {name}")
    table = _table(console, "always", *(COLUMNS[program.program] for program in plan.programs))

    def shown(count: int | None) -> str:
        return "" if count is None else f"{count / unit:,.2f}"

    labels = {**PARTS, "teacher": f"{PARTS['teacher']}, {plan.request.footprint().dtype}"}
    if plan.compiled:
        labels |= {part: f"{PARTS[part]}*" for part in SHARES}
    for part, label in labels.items():
        sizes = [plan.resident.get(part), *(program.parts.get(part) for program in plan.programs)]
        if any(size is not None for size in sizes):
            table.add_row(label, *map(shown, sizes))
    table.add_section()
    always = sum(plan.resident.values())
    totals = [always + program.total for program in plan.programs]
    cells = [Text(shown(total), "bold" if total <= plan.limit else "bold red") for total in totals]
    table.add_row(Text("together", "bold"), shown(always), *cells)
    whole, its_name = unit_of(plan.limit)
    label = f"free of {plan.limit / whole:,.2f}" + (f" {its_name}" if whole != unit else "")
    free = [_free((plan.limit - total) / whole, program) for total, program in zip(totals, plan.programs)]
    table.add_row(label, "", *free)
    put(console, table)
    if any(part in program.parts for program in plan.programs for part in SHARES) and plan.compiled:
        say(console, "* by arithmetic, out of what the compiler says of the whole", "dim")


def _free(amount: float, program: "ProgramMemory") -> Text:
    if program.error:
        return Text("refused", "red")
    return Text(f"{amount:,.2f}", "green" if amount >= 0 else "red")


def _time(report: "Report", console: Console) -> None:
    plan = report.plan
    device = "chip" if plan.request.topology.chip.cores == 1 else "core"
    factor, unit = seconds_unit(plan.seconds)
    section(console, f"an update on each {device}, at least")
    table = _table(
        console, "FLOP", "HBM B", "sent B", *RESOURCES.values(), "least", "bound by", first=f"times in {unit}"
    )

    def row(name: str, counts: list[float], seconds: list[float], slowest: str, style: str = "") -> None:
        *resources, least = (f"{value / factor:,.2f}" if value else "" for value in seconds)
        table.add_row(Text(name, style), *map(amount, counts), *resources, Text(least, "bold"), RESOURCES[slowest])

    sums = [0.0] * 7
    for phase in plan.phases:
        counts = [phase.flops, phase.hbm_bytes, sum(phase.sent.values())]
        seconds = [*(getattr(phase.seconds, resource) for resource in RESOURCES), phase.seconds.seconds]
        row(_PHASES[phase.name], counts, seconds, phase.seconds.slowest)
        sums = [total + one for total, one in zip(sums, counts + seconds)]
    table.add_section()
    row("together", sums[:3], sums[3:], plan.slowest, "bold")
    put(console, table)
    if len(plan.sent) > 1:
        by_axes = ", ".join(f"{axes} {amount(count)}B" for axes, count in sorted(plan.sent.items()) if count)
        say(console, f"sent along {by_axes}", "dim")


def _advice(report: "Report", console: Console) -> None:
    if not report.advice:
        return
    section(console, "what would help, by arithmetic")
    unit, name = unit_of(report.plan.peak)
    table = _table(console, f"saves {name}", "leaves", "fits", first="change", wrap=True)
    for one in report.advice:
        mark = Text("yes", "green") if one.fits else Text("no", "red")
        what = Text(one.flags).append(f"\n{one.why}", "dim")
        table.add_row(what, f"{one.saves / unit:,.2f}", f"{one.peak / unit:,.2f}", mark)
    put(console, table)


def _search(report: "Report", console: Console) -> None:
    if report.search is None:
        return
    compiled = "compiled" if report.plan.compiled else "by arithmetic"
    section(console, f"ways to spread it, {compiled}")
    unit, name = unit_of(report.plan.peak)
    table = _table(console, "rows", "update", name, "fits", "time", "tok/s/chip", first="  mesh")
    for one in report.search:
        plan, args = one.plan, one.plan.request.args
        layout = getattr(args, "teacher_layout", "fsdp")
        mesh = mesh_flag(plan.request.mesh) + (f" T {layout}" if layout != "fsdp" else "")
        fits = Text("yes", "green") if plan.fits else Text("refused" if plan.refused else "no", "red")
        table.add_row(
            Text("› " if one.requested else "  ").append(mesh),
            f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}",
            f"{one.update_rows:,}",
            f"{plan.peak / unit:,.2f}",
            fits,
            duration(plan.seconds),
            f"{plan.tokens_per_second / plan.request.topology.chips:,.0f}",
        )
    put(console, table)
    words = "rows: at once on a device (along tensor: on a shard), times micro-batches; update: rows of one; ›: as asked for"
    if any(getattr(one.plan.request.args, "teacher_layout", "fsdp") != "fsdp" for one in report.search):
        words += "; T: layout of the teacher"
    say(console, words, "dim")
    best = report.search[0]
    request = " (as asked)" if best.requested else ""
    say(console, f"The first: {best.flags}{request}" if best.plan.fits else "None of them fits.")


__all__ = ["show"]
