"""Other meshes, layouts and numbers of rows for the same run, ranked by the analytic model and the best of them compiled."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gold_jax.planning.analytic import estimate
from gold_jax.planning.plan import Plan
from gold_jax.planning.request import PlanRequest, mesh_flag, meshes

_SLACK = 1.1  # the analytic model is sometimes too large: what does not fit by it may fit when it is compiled
_AS_GOOD = 0.995  # rows at once are as good as others that learn hardly more tokens a second


class Candidate(NamedTuple):
    """A way to spread a run, and whether it is the one that was asked for."""

    plan: Plan
    requested: bool = False


def search(
    first: Plan,
    compile_plan: Callable[[PlanRequest], Plan] | None = None,
    *,
    limit: int = 6,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Candidate, ...]:
    """The best ways to spread a run, the one with most tokens a second first, those that do not fit last.

    An update keeps its rows (it has a few more where a mesh cannot share them out evenly), in more or fewer
    micro-batches. For each mesh and layout, rows at once are doubled while they fit; of those that are as good the most
    are taken, and fewer where these turn out not to fit.

    Args:
        first: the plan of what was asked for.
        compile_plan: makes a plan by compiling; None: the analytic model decides.
        limit: how many are compiled, or shown, at most, the first included.
        progress: is told what is being done.
    """
    progress("ranking meshes and rows")
    ways = [rows for rows in _ways(first.request, 1.0 if compile_plan is None else _SLACK) if rows]
    ways.sort(key=lambda rows: -rows[0].tokens_per_second)
    found, seen = [Candidate(first, requested=True)], {_key(first.request)}
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
        found.append(Candidate(plan))
    return tuple(sorted(found, key=lambda one: (not one.plan.fits, -one.plan.tokens_per_second)))


def _ways(request: PlanRequest, slack: float) -> Iterator[list[Plan]]:
    """For each mesh and layout, estimates that fit: that with the most rows at once of the best, then with fewer rows."""
    for mesh in meshes(request.topology.devices, request.pair):
        layouts = [{"layout": "fsdp"}]
        if request.pair.teacher is not None:  # which may be cut over all devices where it would be there several times
            layouts = [{"layout": "fsdp", "teacher_layout": one} for one in ("fsdp", "full")[: 1 + (mesh["data"] > 1)]]
        # An update has more rows where a mesh cannot share them out evenly.
        update_rows = -(-request.update_rows // (mesh["data"] * mesh["fsdp"]))
        if update_rows % getattr(request.args, "num_generations", 1):
            continue
        counts = sorted({2**k for k in range(update_rows.bit_length())} | {update_rows})
        for layout in layouts:
            fitting = []
            for rows in (count for count in counts if update_rows % count == 0):
                batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": update_rows // rows}
                plan = estimate(request.changed(mesh, **batch, **layout))
                if plan.peak_bytes > slack * plan.limit_bytes:
                    break
                fitting.append(plan)
            best = max((plan.tokens_per_second for plan in fitting), default=0.0)
            while fitting and fitting[-1].tokens_per_second < _AS_GOOD * best:
                fitting.pop()
            yield fitting[::-1]


def _key(request: PlanRequest) -> tuple:
    layouts = [request.args.layout, getattr(request.args, "teacher_layout", None)]
    if request.mesh["data"] == 1:  # the two are the same then
        layouts = ["fsdp" if layout == "full" else layout for layout in layouts]
    return (*request.mesh.values(), request.rows, request.micro_batches, *layouts)


def flags_of(request: PlanRequest) -> str:
    """What spreads a run so, as flags."""
    flags = {"mesh": mesh_flag(request.mesh)}
    flags |= {key: getattr(request.args, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    layouts = {key: getattr(request.args, key, "fsdp") for key in ("layout", "teacher_layout")}
    flags |= {key: layout for key, layout in layouts.items() if layout != "fsdp"}
    return " ".join(f"--{name} {value}" for name, value in flags.items())
