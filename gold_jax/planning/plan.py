"""What a plan comes to: memory by part and moment, seconds by phase, whether it fits."""

import dataclasses
from typing import Any

import jax

from gold_jax.models.attention import check_model
from gold_jax.planning.estimate import Phase, phases
from gold_jax.planning.footprint import Footprint
from gold_jax.planning.hardware import GPU_SHARE, Topology
from gold_jax.planning.sizes import Pair
from gold_jax.planning.traffic import Sent, added, sent_by
from gold_jax.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """A run to plan.

    Attributes:
        args: its settings.
        pair: its models.
        topology: its devices.
        mesh: size of each axis.
        attention: as in `models.attention.choose`; None: "auto".
    """

    args: Any
    pair: Pair
    topology: Topology
    mesh: dict[str, int]
    attention: str | None = None

    @property
    def platform(self) -> str:
        """What the devices are, of `models.attention.PLATFORMS`."""
        return "tpu" if self.topology.kind == "tpu" else "cuda"

    def footprint(self) -> Footprint:
        """Its bytes by arithmetic."""
        mesh = jax.sharding.AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh))
        return Footprint(self.args, self.pair, Placement(mesh, self.args.layout))

    def changed(
        self, *, mesh: dict[str, int] | None = None, topology: Topology | None = None, **settings: Any
    ) -> "PlanRequest":
        """The same with other settings, or on another mesh."""
        return dataclasses.replace(
            self, args=self.args.replace(**settings), mesh=mesh or self.mesh, topology=topology or self.topology
        )


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What a device holds while a program runs, beside what lies there always.

    Attributes:
        program: its name, of `Footprint.programs`.
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
class Plan:
    """What a run takes of each device.

    Attributes:
        request: the run.
        resident: bytes by part of what lies there all the time.
        programs: the programs of an update and what each needs besides.
        phases: what an update costs.
        compiled: whether moments and phases are those of compiled programs; else all is arithmetic.
    """

    request: PlanRequest
    resident: dict[str, int]
    programs: tuple[ProgramMemory, ...]
    phases: tuple[Phase, ...]
    compiled: bool = False

    @property
    def limit(self) -> int:
        """Bytes that a run may fill of a device: on GPUs what JAX takes when it starts."""
        chip = self.request.topology.chip
        return chip.hbm_bytes if self.request.topology.kind == "tpu" else int(GPU_SHARE * chip.hbm_bytes)

    @property
    def peak_program(self) -> ProgramMemory:
        """The moment that needs most."""
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

    @property
    def seconds(self) -> float:
        """The least time of an update."""
        return sum(phase.seconds.seconds for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens that the student learns from in an update, prompts too."""
        sizes = self.request.footprint()
        return sizes.rows * sizes.length * self.request.args.gradient_accumulation_steps

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, at most."""
        return self.tokens / self.seconds

    @property
    def model_share(self) -> float:
        """Share of the chips' operations in an update's least time that the models need."""
        needed = sum(phase.model_flops for phase in self.phases)
        return needed / (self.seconds * self.request.topology.chip.flops)

    @property
    def slowest(self) -> str:
        """The resource that most of the time is for: "compute", "memory" or "interconnect"."""
        spent: dict[str, float] = {}
        for phase in self.phases:
            spent[phase.seconds.slowest] = spent.get(phase.seconds.slowest, 0.0) + phase.seconds.seconds
        return max(spent, key=spent.get)

    @property
    def sent(self) -> Sent:
        """Bytes that one device sends in an update, by mesh axes."""
        return added(phase.sent for phase in self.phases)

    @property
    def compile_seconds(self) -> float | None:
        """That compiling took; None where nothing was compiled."""
        spent = [program.seconds for program in self.programs if program.seconds is not None]
        return sum(spent) if spent else None


def by_arithmetic(request: PlanRequest) -> Plan:
    """A plan for which nothing is compiled.

    Raises:
        ValueError: settings that make no run, such as attention that the devices cannot compute.
    """
    footprint = request.footprint()
    check(request, footprint)
    programs = tuple(
        ProgramMemory(program, {**footprint.transient(program), **footprint.temporaries(program)})
        for program in footprint.programs()
    )
    sent = {program: sent_by(footprint, program) for program in footprint.programs()}
    return Plan(request, footprint.resident(), programs, cost(request, footprint, sent))


def check(request: PlanRequest, footprint: Footprint) -> None:
    """See that the models can be computed on the devices.

    Raises:
        ValueError: they cannot, and why.
    """
    for config in filter(None, request.pair[:2]):
        check_model(config, footprint.dtype, request.attention or "auto", request.platform)


def cost(request: PlanRequest, footprint: Footprint, sent: dict[str, Sent]) -> tuple[Phase, ...]:
    """The phases of an update in which each program sends so much."""
    return phases(footprint, request.topology, sent, platform=request.platform, attention=request.attention or "auto")


__all__ = ["Plan", "PlanRequest", "ProgramMemory", "by_arithmetic", "check", "cost"]
