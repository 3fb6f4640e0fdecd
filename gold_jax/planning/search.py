"""Other meshes, layouts and numbers of rows for the same run, tried by arithmetic and the best of them by compiling."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from gold_jax.planning.meshes import mesh_flag, meshes
from gold_jax.planning.plan import Plan, PlanRequest, by_arithmetic

_SLACK = 1.1  # arithmetic is sometimes too large: what does not fit by it may fit when it is compiled
_AS_GOOD = 0.995  # rows at once are as good as others that learn hardly more tokens a second


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to spread a run.

    Attributes:
        flags: what makes it, as flags.
        plan: what it comes to.
        requested: whether it is the one that was asked for.
    """

    flags: str
    plan: Plan
    requested: bool = False

    @property
    def update_rows(self) -> int:
        """Rows of an update."""
        return self.plan.request.footprint().rows * self.plan.request.args.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """The numbers that it is compared by."""
        args, plan = self.plan.request.args, self.plan
        return {
            "flags": self.flags,
            "asked": self.requested,
            "mesh": plan.request.mesh,
            "rows": args.per_device_train_batch_size,
            "micro_batches": args.gradient_accumulation_steps,
            "update_rows": self.update_rows,
            "compiled": plan.compiled,
            "fits": plan.fits,
            "peak_bytes": plan.peak,
            "seconds": plan.seconds,
            "tokens_per_second_per_chip": plan.tokens_per_second / plan.request.topology.chips,
            "slowest": plan.slowest,
            "compile_seconds": plan.compile_seconds,
        }


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
        compile_plan: makes a plan by compiling; None: arithmetic decides.
        limit: how many are compiled, or shown, at most, the first included.
        progress: is told what is being done.
    """
    progress("trying meshes and rows by arithmetic")
    slack = 1.0 if compile_plan is None else _SLACK
    ways = [rows for rows in _ways(first.request, slack) if rows]
    ways.sort(key=lambda rows: -rows[0].tokens_per_second)
    found, seen = [Candidate(flags_of(first.request), first, requested=True)], {_key(first.request)}
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
        found.append(Candidate(flags_of(plan.request), plan))
    return tuple(sorted(found, key=lambda one: (not one.plan.fits, -one.plan.tokens_per_second)))


def _ways(request: PlanRequest, slack: float) -> Iterator[list[Plan]]:
    """For each mesh and layout, plans by arithmetic that fit: that with the most rows at once of the best, then with fewer rows."""
    for mesh in meshes(request.topology.devices, request.pair):
        for layouts in _layouts(request, mesh):
            fitting = []
            for plan in map(by_arithmetic, _rows(request, mesh, layouts)):
                if plan.peak > slack * plan.limit:
                    break
                fitting.append(plan)
            best = max((plan.tokens_per_second for plan in fitting), default=0.0)
            most = max((k for k, plan in enumerate(fitting) if plan.tokens_per_second >= _AS_GOOD * best), default=-1)
            yield fitting[most::-1] if fitting else []


def _rows(request: PlanRequest, mesh: dict[str, int], layouts: dict[str, str]) -> Iterator[PlanRequest]:
    """A mesh with one row at once on each shard, then twice as many each time, as far as the rows of an update go."""
    args, shards = request.args, mesh["data"] * mesh["fsdp"]
    update_rows, rest = divmod(request.footprint().rows * args.gradient_accumulation_steps, shards)
    update_rows += rest > 0  # more rows, where they cannot be shared out evenly
    counts = {2**k for k in range(update_rows.bit_length())} | {update_rows}
    for rows in sorted(count for count in counts if update_rows % count == 0):
        if update_rows % getattr(args, "num_generations", 1) == 0:
            settings = {
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": update_rows // rows,
                **layouts,
            }
            yield request.changed(mesh=mesh, **settings)


def _layouts(request: PlanRequest, mesh: dict[str, int]) -> list[dict[str, str]]:
    """Layouts that differ on a mesh: where a model is there several times, the teacher may be cut over all devices instead."""
    if request.pair.teacher is None:
        return [{"layout": "fsdp"}]
    choices = ("fsdp",) if mesh["data"] == 1 else ("fsdp", "full")
    return [{"layout": "fsdp", "teacher_layout": choice} for choice in choices]


def _key(request: PlanRequest) -> tuple:
    args = request.args
    layouts = [args.layout, getattr(args, "teacher_layout", None)]
    if request.mesh["data"] == 1:  # the two are the same then
        layouts = ["fsdp" if layout == "full" else layout for layout in layouts]
    return (*request.mesh.values(), args.per_device_train_batch_size, args.gradient_accumulation_steps, *layouts)


def flags_of(request: PlanRequest) -> str:
    """What spreads a run so, as flags."""
    args = request.args
    flags = [
        f"--mesh {mesh_flag(request.mesh)}",
        f"--per_device_train_batch_size {args.per_device_train_batch_size}",
        f"--gradient_accumulation_steps {args.gradient_accumulation_steps}",
    ]
    for name in ("layout", "teacher_layout"):
        if getattr(args, name, "fsdp") != "fsdp":
            flags.append(f"--{name} {getattr(args, name)}")
    return " ".join(flags)


__all__ = ["Candidate", "flags_of", "search"]
