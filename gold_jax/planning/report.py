"""What a plan says of a run: as one object, in sentences, and in the terminal."""

import dataclasses
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gold_jax.planning.advice import Advice, flags_of
from gold_jax.planning.analytic import ERROR, FORMULA, parameter_count
from gold_jax.planning.hardware import MEASURED_ON
from gold_jax.planning.models import ASSUMED_SHARE, Model, Vocabularies
from gold_jax.planning.plan import RESOURCES, Plan
from gold_jax.sharding.axes import mesh_flag
from gold_jax.terminal import columns, put, say, section
from gold_jax.wording import plural

# The programs: over their columns of memory (in rows of time in one line), and what happens while they run.
_PROGRAMS = {
    "teacher": ("teacher\nforward", "the teacher's forward pass runs"),
    "student": ("student\nfwd+bwd", "the student's forward and backward pass runs"),
    "student, further micro-batches": ("and\nfurther", "the student's pass over further micro-batches runs"),
    "optimizer": ("opti-\nmizer", "the optimizer updates"),
    "prefill": ("prefill", "prompts are prefilled"),
    "decoding": ("decode", "tokens are decoded"),
}
# Parts of memory whose rows say more than their names.
_PARTS = {
    "student": "student, float32",
    "optimizer": "its optimizer",
    "gradients": "gradients so far",
    "decoding weights": "weights for decoding",
    "smaller cache": "cache it grows from",
}
_BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_SECONDS = {" s": 1.0, " ms": 1e-3, " µs": 1e-6}
_COUNTS = {" P": 1e15, " T": 1e12, " G": 1e9, " M": 1e6, " k": 1e3, "": 1.0}


@dataclasses.dataclass
class Report:
    """What is known of a run before anything of it is there."""

    student: Model
    teacher: Model | None  # None: fine-tuning
    vocabularies: Vocabularies | None
    plan: Plan
    advice: tuple[Advice, ...]  # changes for where it does not fit
    search: list[Plan] | None  # ways to spread it, the best first
    notes: list[str]
    not_compiled: str | None = None  # why the plan is not by the compiler, no sentence yet

    def __post_init__(self):
        request = self.plan.request
        self.loss = "cross-entropy" if self.teacher is None else request.spec.describe()
        self.device = "chip" if request.topology.chip.cores == 1 else "core"
        self.unit = _unit(2 * self.plan.peak_bytes, _BYTES)  # of tables of memory

    def findings(self) -> list[str]:
        """What the plan says, one sentence each."""
        plan, (_, when) = self.plan, _PROGRAMS[self.plan.fullest["program"]]
        peak, limit, free = (_size(abs(count)) for count in (plan.peak_bytes, plan.limit_bytes, plan.free_bytes))
        found = ["It does not fit: the compiler refuses a program."]
        if plan.fits:
            found = [f"It fits: at its peak, when {when}, a {self.device} holds {peak} of {limit}; {free} are free."]
            by_formula = sum(plan.fullest["parts"].get(part, 0) for part in FORMULA)
            if not plan.compiled and plan.free_bytes < ERROR * by_formula:
                found.append("That is too close to tell without compiling.")
        elif plan.free_bytes < 0:
            held = f"when {when}, a {self.device} would have to hold {peak}, {free} more than its {limit}."
            found = [f"It does not fit: {held}"]
        for one in plan.refused:
            when = _PROGRAMS[one["program"]][1]
            found.append(f"The program in which {when} is refused by the compiler: «{one['error']}»")
        nothing = f"Nothing was compiled: {self.not_compiled}." if self.not_compiled else "Nothing was compiled."
        exact = "The resident memory is exact; activations, loss and temporaries come from a formula,"
        compared = f"which was up to {ERROR:.0%} too low where it was compared with compiled programs."
        source = f"{nothing} {exact} {compared}"
        if plan.compile_seconds is not None:
            count, took = len(plan.compiling), _short(plan.compile_seconds, _SECONDS)
            source = f"Compiling {count} programs took {took} here; the run does the same when it starts."
            if plan.request.topology.kind == "gpu":
                left = "kernels of products, and the scratch memory of these and of sorts, are chosen on the card"
                source += f" They are those of jax {jax.__version__}; {left}."
        expected = []
        if plan.expected_seconds is not None:
            rate = f"{plan.request.tokens / plan.expected_seconds:,.0f} tokens/s"
            expected = [f"About {_short(plan.expected_seconds, _SECONDS)}, {rate}, by {_measured(plan)}"]
        return [
            *found,
            f"An update of {plan.request.tokens:,} tokens takes at least {_short(plan.seconds, _SECONDS)}, most of it for "
            f"{plan.slowest}: at most {plan.tokens_per_second:,.0f} tokens/s, {plan.tokens_per_second_per_chip:,.0f} per "
            f"chip. The models' FLOPs are {plan.model_flops_share:.0%} of what the chips could do in that time.",
            "This is a lower bound for rows of the greatest length: it assumes that compute, memory traffic and communication "
            "overlap completely and that the host takes no time. How close a run comes to it only a run can show.",
            *expected,
            *self._drawn_together(),
            source,
        ]

    def _drawn_together(self) -> list[str]:
        """What the best way's `--rollout_batches` would change in what is learned."""
        best = self.search[0].request if self.search else self.plan.request
        if best.rollout_batches == 1 or best.rollout_batches == self.plan.request.rollout_batches:
            return []
        draws = f"--rollout_batches {best.rollout_batches} decodes more rows at once (--rollout_batches 1 searches without it)"
        learns = "later updates learn, weighted, from text of an earlier student"
        return [f"{draws}, and changes what is learned: {learns}."]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for `json.dumps`."""
        plan, vocabularies = self.plan, self.vocabularies
        request, topology = plan.request, plan.request.topology
        rates = "seconds expected_seconds slowest tokens_per_second tokens_per_second_per_chip model_flops_share"
        held = {"fullest": plan.fullest["program"], "always": plan.resident, "moments": plan.moments}
        compared = "compiled fits peak_bytes seconds tokens_per_second_per_chip slowest compile_seconds"
        ways = [
            {"flags": flags_of(way.request), "asked": way is plan, "mesh": way.request.mesh}
            | {"rows": way.request.device_rows, **_picked(way.request, "micro_batches update_rows")}
            | _picked(way, compared)
            for way in self.search or ()
        ]
        return {
            "student": _model(self.student),
            "teacher": self.teacher and _model(self.teacher),
            "vocabularies": vocabularies and vocabularies._asdict() | {"one": vocabularies.matched is None},
            "loss": self.loss,
            "topology": _picked(topology, "name kind chips devices hosts") | {"memory_bytes": topology.chip.hbm_bytes},
            "mesh": request.mesh,
            "update": {
                "rows": request.update_rows,
                **_picked(request, "micro_batches length tokens sampled_rows rollout_batches"),
            },
            **_picked(plan, "compiled fits"),
            "memory": _picked(plan, "limit_bytes peak_bytes free_bytes") | held,
            "time": _picked(plan, rates) | {"sent_bytes": plan.together.sent, "phases": plan.phases},
            "compile_seconds": plan.compile_seconds,
            "advice": [one._asdict() for one in self.advice],
            "search": self.search and ways,
            "findings": self.findings(),
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Prints it all."""
        console.print(Text("gold_jax.plan", "bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for name, words in _title(self).items():
            table.add_row(Text(f"  {name}", "dim"), Text(words, overflow="fold"))
        console.print(table)
        for part in (_memory, _time, _advice, _search):
            part(self, console)
        section(console, "in short")
        for sentence in (*self.findings(), *self.notes):
            say(console, sentence, "yellow" if "«" in sentence or sentence in self.notes else "")


def _measured(plan: Plan) -> str:
    """Where a plan's expected time is from."""
    shares = plan.request.topology.efficiency
    said = [f"{_PROGRAMS[phase['name']][0]} {shares[phase['name']]:.0%}" for phase in plan.phases]
    shown = ", ".join(said).replace("-\n", "").replace("\n", " ")
    other = "" if plan.request.topology.chip.name == MEASURED_ON else ", which has this card's multiprocessors"
    return f"the shares of a least time that were measured on an {MEASURED_ON.split('-')[0].upper()}{other}: {shown} (docs/benchmarks.md)."


def _picked(of: Any, names: str) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names.split()}


def _model(model: Model) -> dict[str, Any]:
    sizes = _picked(model.config, "layers width") | {"vocabulary": model.config.vocab_size}
    return {"name": model.name, "family": model.config.family, "parameters": parameter_count(model.config), **sizes}


def _title(report: Report) -> dict[str, str]:
    plan, request, args = report.plan, report.plan.request, report.plan.request.args
    topology, chip, tensor = request.topology, request.topology.chip, request.mesh["tensor"]
    rows = {}
    for role in ("student", "teacher") if report.teacher else ("student",):
        name, family, count, *_ = _model(getattr(report, role)).values()
        shown = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
        rows[role] = f"{name} ({family}, {shown} parameters)"
    if report.teacher:
        rows["vocabularies"] = _describe_vocabularies(report)
    rows["loss"] = report.loss
    batches = f" in {request.micro_batches} micro-batches" if request.micro_batches > 1 else ""
    at_once = f"{request.device_rows} at a time on {'each device' if tensor == 1 else f'each {tensor} devices'}"
    rows["update"] = f"{request.update_rows:,} rows of {request.length:,} tokens{batches}, {at_once}"
    if request.samples:
        together = f", those of {request.rollout_batches} updates together" if request.rollout_batches > 1 else ""
        written = f"{args.lmbda:.0%} of the completions, {request.sampled_rows:,} at once{together}"
        lengths = f"{args.max_completion_length:,} tokens after prompts of {request.prompt_length:,}"
        rows["sampling"] = f"{written}, of {lengths}"
    limit, memory = _size(plan.limit_bytes), f"{_size(plan.limit_bytes)} each"
    if topology.kind == "gpu":
        taken = f"of {_size(chip.hbm_bytes)} each JAX takes {plan.limit_bytes / chip.hbm_bytes:.0%}, {limit}"
        memory = f"{taken}, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
    chips = plural(topology.chips, "chip")
    rows["devices"] = f"{topology.name}: {chips}{f' of {chip.cores} cores' if chip.cores > 1 else ''}; {memory}"
    rows["mesh"] = mesh_flag(request.mesh) if topology.devices > 1 else "one device"
    for whose, layout in (("student", args.layout), ("teacher", request.teacher_layout)):
        rows["mesh"] += f"; layout of the {whose} {layout}" if layout != "fsdp" else ""
    return rows


def _describe_vocabularies(report: Report) -> str:
    sizes = " and ".join(f"{model.config.vocab_size:,}" for model in (report.student, report.teacher))
    matched, how = report.vocabularies
    if matched is None and how == "tokenizers":
        return "one and the same"
    if matched is None:
        return f"taken for one and the same ({sizes} rows, one family; the tokenizers are not both here)"
    assumed = (
        f"assumed, {ASSUMED_SHARE:.0%} of the smaller: the tokenizers are not both here, and --matched says nothing"
    )
    said = {"tokenizers": "by the tokenizers", "given": "by --matched", "assumed": assumed}[how]
    return f"{sizes} rows, {matched:,} matched ({said})"


def _memory(report: Report, console: Console) -> None:
    plan, (name, unit), (its_name, its_unit) = report.plan, report.unit, _unit(2 * report.plan.limit_bytes, _BYTES)
    held, rows = [plan.resident, *(moment["parts"] for moment in plan.moments)], []
    names = dict.fromkeys(part for parts in held for part in parts)
    for part in sorted(names, key=lambda part: part == "temporaries"):  # these last
        label = f"teacher, {plan.request.dtype}" if part == "teacher" else _PARTS.get(part, part)
        rows.append((label, *(f"{parts[part] / unit:,.2f}" if part in parts else "" for parts in held)))
    resident, totals, free = sum(plan.resident.values()), [], []
    for moment in plan.moments:
        left = plan.limit_bytes - resident - moment["total"]
        totals.append(Text(f"{(resident + moment['total']) / unit:,.2f}", "bold" if left >= 0 else "bold red"))
        text = "refused" if moment["error"] else f"{left / its_unit:,.2f}"
        free.append(Text(text, "green" if left >= 0 and not moment["error"] else "red"))
    label = f"free of {plan.limit_bytes / its_unit:,.2f}" + (f" {its_name}" if its_unit != unit else "")
    rows += [None, (Text("together", "bold"), f"{resident / unit:,.2f}", *totals), (label, "", *free)]
    names = ["resident", *(_PROGRAMS[moment["program"]][0] for moment in plan.moments)]
    _table(console, f"memory of a {report.device}, {name}", names, rows)


def _time(report: Report, console: Console) -> None:
    plan, (unit, factor), rows = report.plan, _unit(report.plan.seconds, _SECONDS), []
    seconds = {which: sum(phase["seconds"][which] for phase in plan.phases) for which in RESOURCES}
    total = {**vars(plan.together), "seconds": seconds, "least": plan.seconds, "slowest": plan.slowest}
    for one in (*plan.phases, total):
        name = "together" if one is total else _PROGRAMS[one["name"]][0].replace("-\n", "").replace("\n", " ")
        *times, least = (f"{n / factor:,.2f}" if n else "" for n in (*one["seconds"].values(), one["least"]))
        styled = (Text(time, "yellow" if one["slowest"] == which else "") for time, which in zip(times, RESOURCES))
        amounts = (_short(n, _COUNTS) for n in (one["flops"], one["hbm_bytes"], sum(one["sent"].values())))
        rows.append((Text(name, "bold" * (one is total)), *amounts, *styled, Text(least, "bold")))
    rows.insert(-1, None)
    names = ["FLOP", "HBM B", "sent B", *RESOURCES, "least"]
    _table(console, f"an update on each {report.device}, at least", names, rows, first=f"times in{unit}")
    sent = plan.together.sent
    if len(sent) > 1:
        by_axes = ", ".join(f"{axes} {_short(count, _COUNTS)}B" for axes, count in sorted(sent.items()) if count)
        say(console, f"sent along {by_axes}", "dim")


def _advice(report: Report, console: Console) -> None:
    (name, unit), rows = report.unit, []
    for flags, why, peak, saves, fits in report.advice:
        change = Text(flags).append(f"\n{why}", "dim")
        mark = Text("yes", "green") if fits else Text("no", "red")
        rows.append((change, f"{saves / unit:,.2f}", f"{peak / unit:,.2f}", mark))
    names = [f"saves {name}", "leaves", "fits"]
    if rows:
        _table(console, "what would help, by the analytic model", names, rows, first="change", wrap=True)


def _search(report: Report, console: Console) -> None:
    if report.search is None:
        return
    (name, unit), rows, layouts = report.unit, [], False
    for plan in report.search:
        request, mesh = plan.request, mesh_flag(plan.request.mesh)
        if request.teacher_layout != "fsdp":
            mesh, layouts = f"{mesh} T {request.teacher_layout}", True
        mesh += f" K {request.rollout_batches}" if request.rollout_batches > 1 else ""
        mesh = Text("› " if plan is report.plan else "  ").append(mesh)
        update = f"{request.device_rows} x {request.micro_batches}", f"{request.update_rows:,}"
        fits = Text("yes", "green") if plan.fits else Text("refused" if plan.refused else "no", "red")
        speed = _short(plan.seconds, _SECONDS), f"{plan.tokens_per_second_per_chip:,.0f}"
        rows.append((mesh, *update, f"{plan.peak_bytes / unit:,.2f}", fits, *speed))
    title = f"ways to spread it, {'compiled' if report.plan.compiled else 'by the analytic model'}"
    _table(console, title, ["rows", "update", name, "fits", "time", "tok/s/chip"], rows, first="  mesh")
    words = "rows: at once on a device (along tensor: on a shard), times micro-batches; update: rows of one; ›: as asked for"
    words += "; T: layout of the teacher" if layouts else ""
    best, drawn = report.search[0], any(way.request.rollout_batches > 1 for way in report.search)
    say(console, words + ("; K: --rollout_batches" if drawn else ""), "dim")
    first = f"The first: {flags_of(best.request)}{' (as asked)' if best is report.plan else ''}"
    say(console, first if best.fits else "None of them fits.")


def _table(console: Console, title: str, names: list[str], rows: list, first: str = "", wrap: bool = False) -> None:
    """A section with a table of rows; None begins another part of it."""
    section(console, title)
    table = columns(*names, first=first, wrap=wrap, gap=0 if console.width < 100 else 1)
    for row in rows:
        table.add_section() if row is None else table.add_row(*row)
    put(console, table)


def _unit(value: float, units: dict[str, float]) -> tuple[str, float]:
    """The largest unit that there is one of, or the smallest."""
    return next((unit for unit in units.items() if value >= unit[1]), list(units.items())[-1])


def _size(count: float) -> str:
    name, unit = _unit(count, _BYTES)
    return f"{count / unit:.2f} {name}" if count >= unit else f"{count:.0f} B"


def _short(value: float, units: dict[str, float]) -> str:
    """Three digits and a unit, such as 1.24 T or 15.0 ms; nothing for nothing."""
    if not value or math.isinf(value):
        return "for ever" if value else ""
    name, factor = _unit(value, units)
    count = value / factor
    return (f"{count:.2f}" if count < 10 else f"{count:.1f}" if count < 100 else f"{count:,.0f}") + name
