"""What a plan comes to: memory by part and program, least seconds by phase, whether it fits."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from gold_jax.planning.hardware import GPU_SHARE, Topology
from gold_jax.planning.request import STUDENT, PlanRequest

Sent = dict[str, float]  # bytes by the mesh axes that the devices differ along, as in `Collectives.by_axes`
RESOURCES = ("compute", "memory", "interconnect")
_ORDER = ("prefill", "decoding", "teacher", "student", "optimizer")


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What a device holds while a program runs, beside what is resident.

    Attributes:
        program: its name, of `PlanRequest.programs`.
        parts: bytes by part.
        seconds: that compiling took; None where nothing was compiled.
        error: what the compiler said where it refused the program.
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

    Attributes:
        flops: operations, those done again too.
        model_flops: those that the models need, however they are computed.
        hbm_bytes: between memory and compute.
        sent: bytes by mesh axes.
    """

    flops: float = 0.0
    model_flops: float = 0.0
    hbm_bytes: float = 0.0
    sent: Sent = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        sums = (getattr(self, name) + getattr(other, name) for name in ("flops", "model_flops", "hbm_bytes"))
        axes = dict.fromkeys([*self.sent, *other.sent])
        return Cost(*sums, {key: self.sent.get(key, 0.0) + other.sent.get(key, 0.0) for key in axes})

    def __mul__(self, times: float) -> "Cost":
        sent = {axes: times * size for axes, size in self.sent.items()}
        return Cost(times * self.flops, times * self.model_flops, times * self.hbm_bytes, sent)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of an update, on one device.

    Attributes:
        name: "teacher", "student", "optimizer", "prefill" or "decoding".
        cost: what it takes.
        resources: seconds that each of `RESOURCES` alone would take; together they take at least as long as the slowest.
    """

    name: str
    cost: Cost
    resources: dict[str, float]

    @property
    def seconds(self) -> float:
        """The least time."""
        return max(self.resources.values())

    @property
    def slowest(self) -> str:
        """The resource that takes longest."""
        return max(self.resources, key=self.resources.get)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes of each device.

    Attributes:
        request: the run.
        resident: bytes by part of what lies there all the time.
        programs: the programs of an update and what each needs besides.
        costs: what one run of each program costs.
        compiled: whether programs and costs are the compiler's; else all is by the analytic model.
    """

    request: PlanRequest
    resident: dict[str, int]
    programs: tuple[ProgramMemory, ...]
    costs: dict[str, Cost]
    compiled: bool = False

    @property
    def limit(self) -> int:
        """Bytes that a run may fill of a device: on GPUs what JAX takes when it starts."""
        chip = self.request.topology.chip
        return chip.hbm_bytes if self.request.topology.kind == "tpu" else int(GPU_SHARE * chip.hbm_bytes)

    @property
    def peak_program(self) -> ProgramMemory:
        """The program that needs most."""
        return max(self.programs, key=lambda program: program.total)

    @property
    def peak(self) -> int:
        """Bytes of a device at its fullest."""
        return sum(self.resident.values()) + self.peak_program.total

    @property
    def refused(self) -> tuple[ProgramMemory, ...]:
        """The programs that the compiler refused."""
        return tuple(program for program in self.programs if program.error)

    @property
    def fits(self) -> bool:
        """Whether it all fits into a device, and the compiler took every program."""
        return self.peak <= self.limit and not self.refused

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of an update, in their order: each program as often as it runs."""
        found: dict[str, Cost] = {}
        for program, times in self.request.programs().items():
            name = STUDENT[0] if program in STUDENT else program
            found[name] = found.get(name, Cost()) + self.costs[program] * times
        topology = self.request.topology

        def phase(name: str, cost: Cost) -> Phase:
            seconds = cost.flops / topology.chip.flops, cost.hbm_bytes / topology.chip.hbm_bandwidth
            sending = link_seconds(cost.sent, self.request.mesh, topology)
            return Phase(name, cost, dict(zip(RESOURCES, (*seconds, sending))))

        return tuple(phase(name, found[name]) for name in _ORDER if name in found)

    @property
    def together(self) -> Cost:
        """All phases."""
        return sum((phase.cost for phase in self.phases), Cost())

    @property
    def seconds(self) -> float:
        """The least time of an update."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens that the student learns from in an update, prompts too."""
        return self.request.rows * self.request.length * self.request.passes

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, at most."""
        return self.tokens / self.seconds

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Of each chip, at most."""
        return self.tokens_per_second / self.request.topology.chips

    @property
    def model_share(self) -> float:
        """Share of the chips' operations in an update's least time that the models need."""
        return self.together.model_flops / (self.seconds * self.request.topology.chip.flops)

    @property
    def slowest(self) -> str:
        """The resource that most of the time is for."""
        spent: dict[str, float] = {}
        for phase in self.phases:
            spent[phase.slowest] = spent.get(phase.slowest, 0.0) + phase.seconds
        return max(spent, key=spent.get)

    @property
    def compile_seconds(self) -> float | None:
        """That compiling took; None where nothing was compiled."""
        spent = [program.seconds for program in self.programs if program.seconds is not None]
        return sum(spent) if spent else None


def link_seconds(sent: Mapping[str, float], mesh: Mapping[str, int], topology: Topology) -> float:
    """The least time that sending takes.

    On TPUs all links of the slice share all traffic. GPUs of one host have their links to each other,
    `Chip.interconnect`; what a group of several hosts' GPUs has to bring from host to host goes over the hosts'
    networks besides, at the same time.
    """
    within, between = sum(sent.values()), 0.0
    if not within:
        return 0.0
    if topology.kind == "gpu" and topology.hosts > 1:
        for axes, size in sent.items():
            here, hosts = _spread(axes.split("+"), mesh, topology.chip.host)
            n = here * hosts
            # Of what is gathered, `size·n/(n-1)`, a host brings in the other hosts' share, through all of its group's cards.
            between += size * n / (n - 1) * (hosts - 1) / hosts / here if hosts > 1 else 0.0
    speed, network = topology.interconnect, topology.between_hosts
    return max(within / speed if speed else math.inf, between / network if between and network else 0.0)


def _spread(axes: list[str], mesh: Mapping[str, int], host: int) -> tuple[int, int]:
    """Of a group along some axes, how many devices it has on one host, and on how many hosts."""
    inside, here, hosts = 1, 1, 1  # devices lie in the mesh rows first: the last axis changes fastest
    for axis in reversed(list(mesh)):
        size = mesh[axis]
        fits = max(1, min(size, host // inside))
        if axis in axes:
            here, hosts = here * fits, hosts * (size // fits)
        inside *= size
    return here, hosts
