"""What a plan comes to: memory by part and program, least seconds by phase, whether it fits."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from gold_jax.planning.hardware import GPU_SHARE, Topology
from gold_jax.planning.request import STUDENT, PlanRequest

RESOURCES = ("compute", "memory", "interconnect")
_ORDER = ("prefill", "decoding", "teacher", "student", "optimizer")


class ProgramMemory(NamedTuple):
    """Bytes by part that a device holds while a program runs, beside what is resident.

    `seconds` is what compiling took (None: nothing was compiled), `error` what the compiler said where it refused.
    """

    program: str
    parts: dict[str, int]
    seconds: float | None = None
    error: str | None = None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program, or in a phase of an update.

    Operations, those done again too; those that the models need, however they are computed; bytes between memory and
    compute; and bytes sent by the mesh axes that the devices differ along, as in `read_collectives`.
    """

    flops: float = 0.0
    model_flops: float = 0.0
    hbm_bytes: float = 0.0
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        sent = {axes: self.sent.get(axes, 0.0) + other.sent.get(axes, 0.0) for axes in {**self.sent, **other.sent}}
        flops, model_flops = self.flops + other.flops, self.model_flops + other.model_flops
        return Cost(flops, model_flops, self.hbm_bytes + other.hbm_bytes, sent)

    def __mul__(self, times: float) -> "Cost":
        sent = {axes: times * size for axes, size in self.sent.items()}
        return Cost(times * self.flops, times * self.model_flops, times * self.hbm_bytes, sent)


class Phase(NamedTuple):
    """A part of an update on one device, and the seconds that each of `RESOURCES` alone would take."""

    name: str
    cost: Cost
    seconds: dict[str, float]

    @property
    def least(self) -> float:
        """The least time: that of the slowest resource."""
        return max(self.seconds.values())

    @property
    def slowest(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=self.seconds.get)


@dataclasses.dataclass
class Plan:
    """What a run takes of each device: bytes by part of what is resident, and by program besides; costs of one run of each.

    `compiled`: programs and costs are the compiler's; else all is by the analytic model. `together` is the cost of all
    phases of an update, `seconds` its least time and `slowest` the resource that most of that is for; tokens a second are
    at most so many; `model_flops_share` is of the chips' operations in that time what the models need.
    """

    request: PlanRequest
    resident: dict[str, int]
    programs: tuple[ProgramMemory, ...]
    costs: dict[str, Cost]
    compiled: bool = False

    def __post_init__(self):
        topology, chip = self.request.topology, self.request.topology.chip
        # What a run may fill of a device: on GPUs what JAX takes when it starts.
        self.limit_bytes = chip.hbm_bytes if topology.kind == "tpu" else int(GPU_SHARE * chip.hbm_bytes)
        self.peak_program = max(self.programs, key=lambda program: program.total)
        self.peak_bytes = sum(self.resident.values()) + self.peak_program.total
        self.free_bytes = self.limit_bytes - self.peak_bytes
        self.refused = [program for program in self.programs if program.error]
        self.fits = self.free_bytes >= 0 and not self.refused
        costs: dict[str, Cost] = {}  # each program as often as it runs
        for program, times in self.request.programs.items():
            name = STUDENT[0] if program in STUDENT else program
            costs[name] = costs.get(name, Cost()) + self.costs[program] * times
        self.phases, spent = [], Counter()
        for name, cost in sorted(costs.items(), key=lambda phase: _ORDER.index(phase[0])):
            sending = link_seconds(cost.sent, self.request.mesh, topology)
            seconds = cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, sending
            self.phases.append(phase := Phase(name, cost, dict(zip(RESOURCES, seconds))))
            spent[phase.slowest] += phase.least
        self.together = sum((phase.cost for phase in self.phases), Cost())
        self.seconds = sum(phase.least for phase in self.phases)
        self.slowest = max(spent, key=spent.get)
        self.tokens_per_second = self.request.tokens / self.seconds
        self.tokens_per_second_per_chip = self.tokens_per_second / topology.chips
        self.model_flops_share = self.together.model_flops / (self.seconds * chip.flops)
        compiling = [program.seconds for program in self.programs if program.seconds is not None]
        self.compile_seconds = sum(compiling) if compiling else None


def link_seconds(sent: Mapping[str, float], mesh: Mapping[str, int], topology: Topology) -> float:
    """The least time that sending takes.

    On TPUs all links of the slice share all traffic. GPUs of one host have their links to each other,
    `Chip.interconnect`; what a group of several hosts' GPUs has to bring from host to host goes over the hosts'
    networks besides, at the same time.
    """
    within, between = sum(sent.values()), 0.0
    if not within:
        return 0.0
    for axes, size in sent.items() if topology.kind == "gpu" else ():
        inside, here, hosts = (
            1,
            1,
            1,
        )  # of a group: devices on one host, and hosts. The mesh's last axis changes fastest
        for axis in reversed(list(mesh)):
            fits = max(1, min(mesh[axis], topology.chip.host // inside))
            if axis in axes.split("+"):
                here, hosts = here * fits, hosts * (mesh[axis] // fits)
            inside *= mesh[axis]
        if hosts > 1:  # of what is gathered, `size·n/(n-1)`, a host brings in the others' share, through all its cards
            n = here * hosts
            between += size * n / (n - 1) * (hosts - 1) / hosts / here
    speed, network = topology.interconnect, topology.between_hosts
    return max(within / speed if speed else math.inf, between / network if between and network else 0.0)
