"""A plan from the very programs that training would run, compiled for TPUs that are only described."""

import re
from collections.abc import Callable, Sequence

from jax.experimental import topologies

from gold_jax.planning.environment import need_compiler
from gold_jax.planning.footprint import STUDENT, Footprint
from gold_jax.planning.hardware import GIB, Topology
from gold_jax.planning.plan import Plan, PlanRequest, ProgramMemory, check, cost
from gold_jax.planning.programs import PlannedRun, Program, compile_program
from gold_jax.planning.traffic import sent_by
from gold_jax.planning.wording import MOMENTS
from gold_jax.sharding.mesh import make_mesh
from gold_jax.sharding.placement import Placement

_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def by_compiling(
    request: PlanRequest, progress: Callable[[str], None] = lambda _: None, *, leave_out: Sequence[str] = ()
) -> Plan:
    """A plan for TPUs.

    Args:
        request: the run.
        progress: is told what is being done.
        leave_out: programs that are not compiled; their moments are left out.

    Raises:
        ImportError: the TPU compiler is not installed.
        ValueError: settings that make no run.
    """
    footprint = request.footprint()
    check(request, footprint)
    devices = described_devices(request.topology)
    placement = Placement(make_mesh(request.mesh, devices), request.args.layout)
    run = PlannedRun(request.args, request.pair, placement, platform=request.platform, attention=request.attention)
    programs = run.programs()
    memories, code, sent = [], 0, {}
    for number, (name, lower) in enumerate(programs.items(), 1):
        refused = any(program.error and program.program in STUDENT for program in memories)
        if name in leave_out or (name in STUDENT and refused):
            continue  # a second program with the same gradient is refused as well, and takes as long
        progress(f"compiling {number} of {len(programs)}: {MOMENTS[name]}")
        program = compile_program(lower, request.mesh)
        code += program.code
        memories.append(_moment(footprint, name, program))
        if program.collectives is not None:
            sent[name] = {axes: program.collectives.over(axes).bytes for axes in program.collectives.by_axes}
    for name in footprint.programs():
        # Both student's programs send the same; of one that was refused arithmetic has to tell.
        same = next((sent[other] for other in STUDENT if name in STUDENT and other in sent), None)
        sent.setdefault(name, sent_by(footprint, name) if same is None else same)
    return Plan(
        request,
        {**footprint.resident(), "programs": code},
        tuple(memories),
        cost(request, footprint, sent),
        compiled=True,
    )


def _moment(footprint: Footprint, name: str, program: Program) -> ProgramMemory:
    """What a device holds while a compiled program runs."""
    if program.error is None:
        parts = footprint.split(name, program.temporaries)
    else:
        stated = stated_bytes(program.error)
        needed = None if stated is None else max(0, stated[0] - footprint.arguments(name))
        parts = footprint.temporaries(name) if needed is None else footprint.split(name, needed)
    return ProgramMemory(name, {**footprint.transient(name), **parts}, program.seconds, program.error)


def described_devices(topology: Topology) -> Sequence:
    """The devices of a slice that need not exist.

    Raises:
        ImportError: the TPU compiler is not installed.
    """
    need_compiler(topology.name)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.compile_name, **topology.compile_options
    ).devices


def stated_bytes(error: str) -> tuple[int, int] | None:
    """What a refused program would have needed, its arguments too, and what there is, as the compiler says: «… (22.89G) exceeds
    available HBM (15.75G)»."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds[^(]*\(([\d.]+)([KMGT])\)", error)
    if not found:
        return None
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])


__all__ = ["by_compiling", "described_devices", "stated_bytes"]
