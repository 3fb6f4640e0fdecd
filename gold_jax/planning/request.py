"""A run to plan: its settings, models, devices and mesh, and how much there is of everything in it."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from gold_jax.bucketing import power_of_two
from gold_jax.config import GOLDConfig
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import parameters
from gold_jax.planning.hardware import Topology
from gold_jax.rollout.sampler import most_slots
from gold_jax.sharding.placement import Placement
from gold_jax.training.batches import sampling_rows

STUDENT = ("student", "student, further micro-batches")  # programs that go forward and backward
LARGEST_TENSOR = 8  # beyond a host's devices, hidden states would be summed over slow links


class Pair(NamedTuple):
    """The models of a run.

    Attributes:
        student, teacher: their configs; no teacher is fine-tuning.
        matched: entries that the two vocabularies share; None: they are one and the same.
    """

    student: DecoderConfig
    teacher: DecoderConfig | None = None
    matched: int | None = None


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

    def changed(
        self, *, mesh: dict[str, int] | None = None, topology: Topology | None = None, **settings: Any
    ) -> "PlanRequest":
        """The same with other settings, or on another mesh."""
        return dataclasses.replace(
            self, args=self.args.replace(**settings), mesh=mesh or self.mesh, topology=topology or self.topology
        )

    @property
    def platform(self) -> str:
        """What the devices are, of `models.attention.PLATFORMS`."""
        return "tpu" if self.topology.kind == "tpu" else "cuda"

    @functools.cached_property
    def placement(self) -> Placement:
        """The student's, on a mesh of no devices."""
        return Placement(jax.sharding.AbstractMesh(tuple(self.mesh.values()), tuple(self.mesh)), self.args.layout)

    @property
    def spec(self) -> Any:
        """The loss of a distillation; None without a teacher."""
        return self.args.loss_spec(self.pair.matched is None) if self.pair.teacher else None

    @property
    def reads(self) -> bool:
        """Whether the teacher reads."""
        return self.pair.teacher is not None and bool(self.spec.distillation_weight)

    @property
    def samples(self) -> bool:
        """Whether the student writes completions on these devices."""
        args = self.args
        return self.pair.teacher is not None and args.lmbda > 0 and args.server_url is None

    @property
    def passes(self) -> int:
        """Micro-batches of an update."""
        return self.args.gradient_accumulation_steps

    def programs(self) -> dict[str, float]:
        """The programs of an update and how often each runs in one; of decoding, tokens of a row."""
        args, passes, found = self.args, self.passes, {}
        if self.reads:
            found["teacher"] = passes
        found[STUDENT[0]] = 1
        if passes > 1:
            found |= {STUDENT[1]: passes - 1, "optimizer": 1}
        if self.samples:
            rounds = args.lmbda * args.per_device_train_batch_size * passes * self.shards / self.sampled_rows
            found |= {"prefill": rounds, "decoding": rounds * args.max_completion_length}
        return found

    @property
    def dtype(self) -> str:
        """What is computed in: on accelerators bfloat16, unless the settings say otherwise."""
        return "float32" if self.args.bf16 is False else "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of one number of that dtype."""
        return 4 if self.dtype == "float32" else 2

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are shared out to."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, on all devices."""
        return self.args.per_device_train_batch_size * self.shards

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.args.max_length or 1024

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.args.prompt_budget if isinstance(self.args, GOLDConfig) else self.length // 2

    @property
    def positions(self) -> int:
        """Positions of a micro-batch that one device compares."""
        return self.args.per_device_train_batch_size * (self.length - self.prompt_length)

    @property
    def sampled_rows(self) -> int:
        """Rows that are written at once, on all devices."""
        prompts = self.rows * self.passes
        requested = sampling_rows(prompts, self.rows, self.args.generation_batch_size or 32 * self.shards)
        return -(-min(requested, prompts) // self.shards) * self.shards

    @property
    def slots(self) -> int:
        """Slots of the cache at its largest, as the sampler has them."""
        return self._most_slots[0]

    @functools.cached_property
    def _most_slots(self) -> tuple[int, bool]:
        longest = self.prompt_length - 1 + self.args.max_completion_length  # the last token is not read
        weights = sum(math.prod(info.shape) for info in parameters(self.pair.student).values())
        return most_slots(self.pair.student, weights, self.sampled_rows // self.shards, longest)

    def smaller_cache(self, cache: int) -> int:
        """Bytes of the cache from which rows move to the largest, which has `cache`; 0 where there is one size."""
        slots, cheap = self._most_slots
        smaller = power_of_two(slots) // 2
        return 0 if cheap or smaller <= self.prompt_length else cache * smaller // slots


def meshes(devices: int, pair: Pair) -> Iterator[dict[str, int]]:
    """Every way to cut so many devices into `data`, `fsdp` and `tensor`, where `tensor` divides heads and inner width of both."""
    tensor = 1
    while tensor <= LARGEST_TENSOR and devices % tensor == 0:
        if all(c.heads % tensor == 0 and c.mlp_width % tensor == 0 for c in filter(None, pair[:2])):
            shards = devices // tensor
            for data in range(1, shards + 1):
                if shards % data == 0:
                    yield {"data": data, "fsdp": shards // data, "tensor": tensor}
        tensor *= 2


def mesh_flag(mesh: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it, such as `fsdp=4,tensor=2`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "auto"
