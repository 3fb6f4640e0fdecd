"""What a plan comes to: memory by part and moment, seconds by phase, whether it fits."""

import dataclasses
from typing import Any

import jax

from gold_jax.models.attention import check_model
from gold_jax.parallel.layout import Placement
from gold_jax.planning.estimate import Phase, phases
from gold_jax.planning.footprint import Footprint
from gold_jax.planning.hardware import GPU_SHARE, Topology
from gold_jax.planning.sizes import Pair
from gold_jax.planning.traffic import Sent, added, sent_by


@dataclasses.dataclass(frozen=True)
class Asked:
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
    ) -> "Asked":
        """The same with other settings, or on another mesh."""
        return dataclasses.replace(
            self, args=self.args.replace(**settings), mesh=mesh or self.mesh, topology=topology or self.topology
        )


@dataclasses.dataclass(frozen=True)
class Moment:
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
        asked: the run.
        always: bytes by part of what lies there all the time.
        moments: the programs of an update and what each needs besides.
        phases: what an update costs.
        compiled: whether moments and phases are those of compiled programs; else all is arithmetic.
    """

    asked: Asked
    always: dict[str, int]
    moments: tuple[Moment, ...]
    phases: tuple[Phase, ...]
    compiled: bool = False

    @property
    def limit(self) -> int:
        """Bytes that a run may fill of a device: on GPUs what JAX takes when it starts."""
        chip = self.asked.topology.chip
        return chip.hbm_bytes if self.asked.topology.kind == "tpu" else int(GPU_SHARE * chip.hbm_bytes)

    @property
    def fullest(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak(self) -> int:
        """Bytes of a device at its fullest."""
        return sum(self.always.values()) + self.fullest.total

    @property
    def refused(self) -> tuple[Moment, ...]:
        """The programs that the compiler refused."""
        return tuple(moment for moment in self.moments if moment.error)

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
        sizes = self.asked.footprint()
        return sizes.rows * sizes.length * self.asked.args.gradient_accumulation_steps

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, at most."""
        return self.tokens / self.seconds

    @property
    def model_share(self) -> float:
        """Share of the chips' operations in an update's least time that the models need."""
        needed = sum(phase.model_flops for phase in self.phases)
        return needed / (self.seconds * self.asked.topology.chip.flops)

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
        spent = [moment.seconds for moment in self.moments if moment.seconds is not None]
        return sum(spent) if spent else None


def by_arithmetic(asked: Asked) -> Plan:
    """A plan for which nothing is compiled.

    Raises:
        ValueError: settings that make no run, such as attention that the devices cannot compute.
    """
    footprint = asked.footprint()
    check(asked, footprint)
    moments = tuple(
        Moment(program, {**footprint.beside(program), **footprint.temporaries(program)})
        for program in footprint.programs()
    )
    sent = {program: sent_by(footprint, program) for program in footprint.programs()}
    return Plan(asked, footprint.always(), moments, cost(asked, footprint, sent))


def check(asked: Asked, footprint: Footprint) -> None:
    """See that the models can be computed on the devices.

    Raises:
        ValueError: they cannot, and why.
    """
    for config in filter(None, asked.pair[:2]):
        check_model(config, footprint.dtype, asked.attention or "auto", asked.platform)


def cost(asked: Asked, footprint: Footprint, sent: dict[str, Sent]) -> tuple[Phase, ...]:
    """The phases of an update in which each program sends so much."""
    return phases(footprint, asked.topology, sent, platform=asked.platform, attention=asked.attention or "auto")


__all__ = ["Asked", "Moment", "Plan", "by_arithmetic", "check", "cost"]
