"""A run to plan: its settings, models, devices and mesh, and how much there is of everything in it."""

import dataclasses
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
    """The configs of a run's models (no teacher: fine-tuning), and the entries that their vocabularies share.

    `matched` None: the two vocabularies are one and the same.
    """

    student: DecoderConfig
    teacher: DecoderConfig | None = None
    matched: int | None = None


@dataclasses.dataclass
class PlanRequest:
    """A run to plan: its settings, models, devices, size of each mesh axis, and kind of attention (None: "auto").

    Rows are those of a micro-batch on all devices, `sampled_rows` those that are written at once; `length` and
    `prompt_length` are tokens of the longest row and prompt, `tokens` those that the student learns from in an update,
    `positions` those that one device compares in a micro-batch.
    """

    args: Any
    pair: Pair
    topology: Topology
    mesh: dict[str, int]
    attention: str | None = None

    def __post_init__(self):
        args, mesh, (student, teacher, matched) = self.args, self.mesh, self.pair
        self.attention = self.attention or "auto"
        self.platform = "tpu" if self.topology.kind == "tpu" else "cuda"
        # The student's; a mesh of no devices.
        self.placement = Placement(jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)), args.layout)
        self.teacher_layout = args.teacher_layout if teacher else "fsdp"
        # On accelerators bfloat16, unless the settings say otherwise.
        self.dtype, self.itemsize = ("float32", 4) if args.bf16 is False else ("bfloat16", 2)
        self.spec = args.loss_spec(matched is None) if teacher else None
        self.reads = teacher is not None and bool(self.spec.distillation_weight)  # whether the teacher reads
        # Whether the student writes completions on these devices.
        self.samples = teacher is not None and args.lmbda > 0 and args.server_url is None
        self.micro_batches = args.gradient_accumulation_steps
        self.shards = mesh["data"] * mesh["fsdp"]  # parts that the rows of a batch are shared out to
        self.rows = args.per_device_train_batch_size * self.shards
        self.update_rows = self.rows * self.micro_batches
        self.length = args.max_length or 1024
        self.prompt_length = args.prompt_budget if isinstance(args, GOLDConfig) else self.length // 2
        self.tokens = self.update_rows * self.length
        self.positions = args.per_device_train_batch_size * (self.length - self.prompt_length)
        # The programs of an update and how often each runs in one; of decoding, tokens of a row.
        self.programs = {"teacher": self.micro_batches} if self.reads else {}
        self.programs[STUDENT[0]] = 1
        if self.micro_batches > 1:
            self.programs |= {STUDENT[1]: self.micro_batches - 1, "optimizer": 1}
        self.sampled_rows = 0
        if self.samples:
            requested = sampling_rows(self.update_rows, self.rows, args.generation_batch_size or 32 * self.shards)
            self.sampled_rows = -(-min(requested, self.update_rows) // self.shards) * self.shards
            weights = sum(math.prod(info.shape) for info in parameters(student).values())
            longest = self.prompt_length - 1 + args.max_completion_length  # the last token is not read
            each = self.sampled_rows // self.shards
            self.slots, self._one_size = most_slots(student, weights, each, longest)  # of the cache at its largest
            rounds = args.lmbda * self.update_rows / self.sampled_rows
            self.programs |= {"prefill": rounds, "decoding": rounds * args.max_completion_length}

    def changed(self, mesh: dict[str, int] | None = None, topology: Topology | None = None, **settings: Any):
        """The same with other settings, or on another mesh."""
        mesh, topology = mesh or self.mesh, topology or self.topology
        return dataclasses.replace(self, args=self.args.replace(**settings), mesh=mesh, topology=topology)

    def held(self, program: str, given: dict[str, int], needed: dict[str, int]) -> dict[str, int]:
        """What is there while a program runs, by part; in decoding the cache that the largest grows from, where that is more."""
        half = power_of_two(self.slots) // 2 if program == "decoding" and not self._one_size else 0
        smaller = given["cache"] * half // self.slots if half > self.prompt_length else 0
        return given | ({"smaller cache": smaller} if smaller > sum(needed.values()) else needed)


def meshes(devices: int, pair: Pair) -> Iterator[dict[str, int]]:
    """Every way to cut so many devices into `data`, `fsdp` and `tensor`, where `tensor` divides heads and inner width of both."""
    tensor = 1
    while tensor <= LARGEST_TENSOR and devices % tensor == 0:
        if not any(c.heads % tensor or c.mlp_width % tensor for c in filter(None, pair[:2])):
            shards = devices // tensor
            for data in (n for n in range(1, shards + 1) if shards % n == 0):
                yield {"data": data, "fsdp": shards // data, "tensor": tensor}
        tensor *= 2


def mesh_flag(mesh: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it, such as `fsdp=4,tensor=2`."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "auto"
