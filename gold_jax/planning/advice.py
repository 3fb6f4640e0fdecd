"""What to change where a plan does not fit, ordered by what it would save by the analytic model."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gold_jax.config import GOLDConfig
from gold_jax.losses.fused_head import chunk_size
from gold_jax.planning.analytic import estimate
from gold_jax.planning.hardware import Topology, read_topology
from gold_jax.planning.plan import Plan
from gold_jax.planning.request import PlanRequest, mesh_flag, meshes

_WORTH = 0.01  # of the limit: what saves less gets no line
_LARGEST = 64  # how many times larger a slice may be that is suggested
_LAST_RESORTS = ("slice", "length")  # kinds of changes that cost money or change the data
_FLAGS = {"max_completion_length": "max_new_tokens"}


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change, and what it would come to.

    Attributes:
        flags: the change as flags.
        why: what it does, in a few words.
        peak: bytes of a device at its fullest then: the plan's, less what the change saves.
        saves: bytes.
        fits: whether that is little enough.
    """

    flags: str
    why: str
    peak: int
    saves: int
    fits: bool


class _Change(NamedTuple):
    kind: str
    why: str
    settings: dict[str, Any] = {}
    mesh: dict[str, int] | None = None
    topology: Topology | None = None


def advice(plan: Plan) -> tuple[Advice, ...]:
    """Changes that would make a plan smaller, the one that saves most first; then, if none of them alone is enough, several.

    Of each kind it is the least change that is enough, or else the one that saves most. Rows of an update stay as they
    are, where they can: fewer at a time are more micro-batches.
    """
    changes = list(_changes(plan.request))
    estimated = functools.partial(_estimated, plan, estimate(plan.request).peak)
    best: dict[str, Advice] = {}
    for change in changes:
        made = estimated([change])
        if made is not None and made.saves >= _WORTH * plan.limit:
            best[change.kind] = max(best.get(change.kind, made), made, key=_rank)
    found = tuple(sorted(best.values(), key=lambda made: -made.saves))
    if any(made.fits for kind, made in best.items() if kind not in _LAST_RESORTS):
        return found
    return found + _together([change for change in changes if change.kind not in _LAST_RESORTS], estimated)


def _rank(made: Advice) -> tuple[bool, int]:
    """The least change that is enough is best, or else the one that saves most."""
    return made.fits, -made.saves if made.fits else made.saves


def _together(changes: Sequence[_Change], estimated) -> tuple[Advice, ...]:
    """Changes added one by one, always the best, until it fits; none where all of them are not enough."""
    chosen: list[_Change] = []
    while True:
        kinds = {change.kind for change in chosen}
        tried = [(estimated([*chosen, change]), change) for change in changes if change.kind not in kinds]
        tried = [(made, change) for made, change in tried if made is not None]
        if not tried:
            return ()
        made, change = max(tried, key=lambda pair: _rank(pair[0]))
        chosen.append(change)
        if made.fits:
            return (made,)


def _estimated(plan: Plan, before: int, changes: Sequence[_Change]) -> Advice | None:
    """What changes would come to together; None where they make no run."""
    try:
        request, flags = _changed(plan.request, changes)
        saves = before - estimate(request).peak
    except ValueError:
        return None
    peak = max(0, plan.peak - saves)
    return Advice(flags, "; ".join(change.why for change in changes), peak, saves, peak <= plan.limit)


def _changed(request: PlanRequest, changes: Sequence[_Change]) -> tuple[PlanRequest, str]:
    """A run with changes, its micro-batches such that an update keeps its rows, and the flags that make it.

    Raises:
        ValueError: its rows cannot be kept.
    """
    settings = {name: value for change in changes for name, value in change.settings.items()}
    mesh = next((change.mesh for change in changes if change.mesh), request.mesh)
    topology = next((change.topology for change in changes if change.topology), None)
    rows, passes = request.args.per_device_train_batch_size, request.passes
    whole, rest = divmod(request.rows * passes, mesh["data"] * mesh["fsdp"])
    if topology is not None and (rest or not whole):  # there are more rows, for so many devices
        whole, rest = rows * passes, 0
    if rest or not whole or whole % getattr(request.args, "num_generations", 1):
        raise ValueError("the rows of an update cannot be shared out so")
    at_once = math.gcd(whole, settings.pop("per_device_train_batch_size", rows))
    if at_once != rows:
        settings["per_device_train_batch_size"] = at_once
    if whole // at_once != passes:
        settings["gradient_accumulation_steps"] = whole // at_once
    flags = [f"--topology {topology.name}"] if topology else []
    if request.args.mesh not in (None, "auto") if topology else mesh != request.mesh:
        flags.append(f"--mesh {mesh_flag(mesh)}")
    flags += [
        f"--{name}" if value is True else f"--{_FLAGS.get(name, name)} {value}" for name, value in settings.items()
    ]
    return request.changed(mesh=mesh, topology=topology, **settings), " ".join(flags)


def _changes(request: PlanRequest) -> Iterator[_Change]:
    """Every change to try."""
    args = request.args
    rows = args.per_device_train_batch_size
    for fewer in range(rows - 1, 0, -1):
        if rows % fewer == 0:
            yield _Change("rows", "fewer rows at a time", {"per_device_train_batch_size": fewer})
    if not args.gradient_checkpointing:
        yield _Change("checkpointing", "activations computed again", {"gradient_checkpointing": True})
    for name, whose in (("layout", "student"), ("teacher_layout", "teacher")):
        for layout, over in (("fsdp", "fsdp"), ("full", "data and fsdp")):
            if getattr(args, name, layout) != layout and (whose == "student" or request.pair.teacher):
                yield _Change(name, f"the {whose} cut over {over}", {name: layout})
    for mesh in meshes(request.topology.devices, request.pair):
        if mesh != request.mesh:
            yield _Change("mesh", "another mesh", mesh=mesh)
    chunk = chunk_size(args.loss_chunk, request.platform)
    while chunk > 64:
        chunk //= 2
        yield _Change("chunk", "fewer positions' logits at once", {"loss_chunk": chunk})
    fewer = request.sampled_rows if request.samples else 0
    while fewer := fewer // 2 // request.shards * request.shards:
        yield _Change("sampled", "fewer completions at once", {"generation_batch_size": fewer})
    yield from _shorter(args)
    yield from _larger(request)


def _shorter(args: Any) -> Iterator[_Change]:
    if not isinstance(args, GOLDConfig):
        yield _Change("length", "rows half as long", {"max_length": (args.max_length or 1024) // 2})
    elif args.max_completion_length > 1:
        new = args.max_completion_length // 2
        longest = args.max_length - args.max_completion_length + new
        yield _Change("length", "completions half as long", {"max_completion_length": new, "max_length": longest})


def _larger(request: PlanRequest) -> Iterator[_Change]:
    """Slices of twice as many chips and more, whose new devices join `fsdp`."""
    factor = 2
    while factor <= _LARGEST:
        larger = times_the_chips(request.topology, factor)
        if larger is not None:
            mesh = request.mesh | {"fsdp": request.mesh["fsdp"] * (larger.devices // request.topology.devices)}
            yield _Change("slice", f"{larger.chips} chips", mesh=mesh, topology=larger)
        factor *= 2


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
