"""Other ways to run, by the analytic model: what to change where a plan does not fit, and the best meshes, layouts and rows."""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from gold_jax.config import GOLDConfig
from gold_jax.losses.fused_head import chunk_size
from gold_jax.planning.analytic import estimate
from gold_jax.planning.hardware import Topology, read_topology
from gold_jax.planning.plan import Plan, PlanRequest, Progress, meshes
from gold_jax.sharding.axes import mesh_flag

_WORTH = 0.01  # of the limit: what saves less gets no line
_LAST_RESORTS = ("slice", "length")  # kinds of changes that cost money or change the data
_SLACK = 1.1  # the analytic model is sometimes too large: what does not fit by it may fit when it is compiled
_TOGETHER = 1, 2, 4, 8  # updates whose completions may be drawn together
_AS_GOOD = 0.995  # rows at once are as good as others that learn hardly more tokens a second


class Advice(NamedTuple):
    """A change and what it does."""

    flags: str
    why: str
    peak: int  # bytes of a device at its fullest then
    saves: int  # bytes
    fits: bool


def advice(plan: Plan) -> tuple[Advice, ...]:
    """Changes that would make a plan smaller, the one that saves most first; then, if none of them alone is enough, several.

    Of each kind it is the least change that is enough, or else the one that saves most. An update keeps its rows.
    """
    changes, before = list(_changes(plan.request)), estimate(plan.request).peak_bytes

    def estimated(*changes: tuple[str, str, dict[str, Any]]) -> Advice | None:
        made = {name: value for *_, settings in changes for name, value in settings.items()}
        try:
            request, flags = _changed(plan.request, made)
            saves = before - estimate(request).peak_bytes
        except ValueError:  # they make no run
            return None
        peak = max(0, plan.peak_bytes - saves)
        return Advice(flags, "; ".join(why for _, why, _ in changes), peak, saves, peak <= plan.limit_bytes)

    def rank(one: Advice) -> tuple[bool, int]:
        return one.fits, -one.saves if one.fits else one.saves

    best: dict[str, Advice] = {}
    for change in changes:
        one = estimated(change)
        if one and one.saves >= _WORTH * plan.limit_bytes:
            best[change[0]] = max(best.get(change[0], one), one, key=rank)
    found = tuple(sorted(best.values(), key=lambda one: -one.saves))
    if any(one.fits for kind, one in best.items() if kind not in _LAST_RESORTS):
        return found
    left, chosen = [change for change in changes if change[0] not in _LAST_RESORTS], []
    while tried := [(one, change) for change in left if (one := estimated(*chosen, change))]:
        one, change = max(tried, key=lambda pair: rank(pair[0]))
        if one.fits:
            return (*found, one)
        chosen.append(change)
        left = [other for other in left if other[0] != change[0]]
    return found


def _changed(request: PlanRequest, settings: dict[str, Any]) -> tuple[PlanRequest, str]:
    """A run with changes, its micro-batches such that an update keeps its rows (else a ValueError), and the flags that make it."""
    mesh, topology = settings.pop("mesh", request.mesh), settings.pop("topology", None)
    rows = request.device_rows
    whole, rest = divmod(request.update_rows, mesh["data"] * mesh["fsdp"])
    if topology is not None and (rest or not whole):  # there are more rows, for so many devices
        whole, rest = rows * request.micro_batches, 0
    if rest or not whole or whole % request.args.completions_per_row:
        raise ValueError("the rows of an update cannot be shared out so")
    at_once = math.gcd(whole, settings.pop("per_device_train_batch_size", rows))
    if at_once != rows:
        settings["per_device_train_batch_size"] = at_once
    if whole // at_once != request.micro_batches:
        settings["gradient_accumulation_steps"] = whole // at_once
    flags = {"topology": topology.name} if topology else {}
    if request.args.mesh not in (None, "auto") if topology else mesh != request.mesh:
        flags["mesh"] = mesh_flag(mesh)
    flags = _flags(flags | settings).replace("max_completion_length", "max_new_tokens")
    return request.changed(mesh, topology, **settings), flags


def _flags(settings: dict[str, Any]) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in settings.items())


def _changes(request: PlanRequest) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every change to try: its kind, what it does, and what of the run it changes."""
    args, rows = request.args, request.device_rows
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:
            yield "rows", "fewer rows at a time", {"per_device_train_batch_size": fewer}
    if not args.gradient_checkpointing:
        yield "checkpointing", "activations computed again", {"gradient_checkpointing": True}
    for name, whose, now in (("layout", "student", args.layout), ("teacher_layout", "teacher", request.teacher_layout)):
        for layout, over in (("fsdp", "fsdp"), ("full", "data and fsdp")):
            if layout != now and (whose == "student" or request.pair.teacher):
                yield name, f"the {whose} cut over {over}", {name: layout}
    for mesh in meshes(request.topology.devices, request.pair):
        if mesh != request.mesh:
            yield "mesh", "another mesh", {"mesh": mesh}
    chunk = chunk_size(args.loss_chunk, request.platform)
    while chunk > 64:
        chunk //= 2
        yield "chunk", "fewer positions' logits at once", {"loss_chunk": chunk}
    fewer = request.sampled_rows
    while fewer := fewer // 2 // request.shards * request.shards:
        yield "sampled", "fewer completions at once", {"generation_batch_size": fewer}
    if not isinstance(args, GOLDConfig):
        yield "length", "rows half as long", {"max_length": (args.max_length or 1024) // 2}
    elif args.max_completion_length > 1:
        new = args.max_completion_length // 2
        shorter = {"max_completion_length": new, "max_length": args.max_length - args.max_completion_length + new}
        yield "length", "completions half as long", shorter
    for factor in (2, 4, 8, 16, 32, 64):
        if larger := times_the_chips(request.topology, factor):  # its new devices join `fsdp`
            fsdp = request.mesh["fsdp"] * (larger.devices // request.topology.devices)
            yield "slice", f"{larger.chips} chips", {"mesh": request.mesh | {"fsdp": fsdp}, "topology": larger}


def times_the_chips(topology: Topology, factor: int) -> Topology | None:
    """A slice, or so many cards, of `factor` (a power of two) times the chips; None where there is none."""
    try:
        if topology.kind == "gpu":
            return read_topology(f"gpu:{topology.chips * factor}x{topology.chip.name}")
        shape = list(topology.shape)
        if math.prod(shape) == 1:
            if factor < 4:
                return None  # the next larger slice is a whole host's four chips
            shape[:2], factor = [2, 2], factor // 4
        for _ in range(int(math.log2(factor))):
            smallest = max(range(len(shape)), key=lambda axis: (-shape[axis], axis))
            shape[smallest] *= 2
        return read_topology(f"{topology.chip.name}:{'x'.join(map(str, shape))}")
    except ValueError:
        return None


def search(
    first: Plan,
    compile_plan: Callable[[PlanRequest], Plan] | None,
    *,
    limit: int = 6,
    progress: Progress = lambda _: None,
) -> list[Plan]:
    """The best ways to spread a run, the one with most tokens a second first, those that do not fit last.

    An update keeps its rows (a few more where a mesh cannot share them out evenly). For each mesh and layout, rows at
    once are doubled while they fit; of those that are as good the most are taken, and fewer where these turn out not to
    fit. Where the student writes, completions of up to eight updates are drawn together if that is faster, unless
    `--rollout_batches` is named. `first`, the plan of what was asked for, is one of the at most `limit` that are compiled
    by `compile_plan` (None: by the analytic model).
    """
    progress("ranking meshes and rows")
    ways = [rows for rows in _ways(first.request, 1.0 if compile_plan is None else _SLACK) if rows]
    ways.sort(key=lambda rows: -rows[0].tokens_per_second)
    found, seen = [first], {_key(first.request)}
    while ways and len(found) < limit:
        plan, *fewer = ways.pop(0)
        if _key(plan.request) in seen:
            continue
        seen.add(_key(plan.request))
        if compile_plan is not None:
            progress(f"way {len(found) + 1} of at most {limit}: {flags_of(plan.request)}")
            plan = compile_plan(plan.request)
            if not plan.fits and fewer:
                ways.insert(0, fewer)
        found.append(plan)
    return sorted(found, key=lambda plan: (not plan.fits, -plan.tokens_per_second))


def _ways(request: PlanRequest, slack: float) -> Iterator[list[Plan]]:
    """For each mesh and layout, estimates that fit: that with the most rows at once of the best, then with fewer rows."""
    for mesh in meshes(request.topology.devices, request.pair):
        layouts = [{"layout": "fsdp"}]
        if request.pair.teacher is not None:  # which may be cut over all devices where it would be there several times
            layouts = [{"layout": "fsdp", "teacher_layout": one} for one in ("fsdp", "full")[: 1 + (mesh["data"] > 1)]]
        # An update has more rows where a mesh cannot share them out evenly.
        update_rows = -(-request.update_rows // (mesh["data"] * mesh["fsdp"]))
        if update_rows % request.args.completions_per_row:
            continue
        counts = sorted({2**k for k in range(update_rows.bit_length())} | {update_rows})
        for layout in layouts:
            fitting = []
            for rows in (count for count in counts if update_rows % count == 0):
                batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": update_rows // rows}
                plan = estimate(request.changed(mesh, **batch, **layout))
                if plan.peak_bytes > slack * plan.limit_bytes:
                    break
                fitting.append(_drawn_together(plan, slack, request.args.given))
            best = max((plan.tokens_per_second for plan in fitting), default=0.0)
            while fitting and fitting[-1].tokens_per_second < _AS_GOOD * best:
                fitting.pop()
            yield fitting[::-1]


def _drawn_together(plan: Plan, slack: float, named: Collection[str]) -> Plan:
    """The run with completions of as many updates drawn together as make it fastest, of those that are as good the fewest."""
    if not plan.request.samples or "rollout_batches" in named:
        return plan
    tried = [estimate(plan.request.changed(rollout_batches=number)) for number in _TOGETHER]
    tried = [one for one in tried if one.peak_bytes <= slack * one.limit_bytes] or [plan]
    best = max(one.tokens_per_second for one in tried)
    return next(one for one in tried if one.tokens_per_second >= _AS_GOOD * best)


def _key(request: PlanRequest) -> tuple:
    same = {"full": "fsdp"} if request.mesh["data"] == 1 else {}
    layouts = [same.get(layout, layout) for layout in (request.args.layout, request.teacher_layout)]
    return (*request.mesh.values(), request.rows, request.micro_batches, request.rollout_batches, *layouts)


def flags_of(request: PlanRequest) -> str:
    """What spreads a run so, as flags."""
    flags = {"mesh": mesh_flag(request.mesh)}
    flags |= {key: getattr(request.args, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    layouts = {key: getattr(request.args, key, "fsdp") for key in ("layout", "teacher_layout")}
    flags |= {key: layout for key, layout in layouts.items() if layout != "fsdp"}
    if request.samples and "rollout_batches" in request.args.given:
        flags["rollout_batches"] = request.rollout_batches
    return _flags(flags)
