"""A run to plan, with how much there is of everything in it, and what it comes to: memory, least seconds, whether it fits."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from gold_jax.bucketing import power_of_two
from gold_jax.config import GOLDConfig
from gold_jax.models.attention import check_model
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import parameters
from gold_jax.planning.hardware import GPU_SHARE, Topology
from gold_jax.rollout.sampler import bytes_per_row, default_rows, most_slots, rows_per_prefill
from gold_jax.sharding.placement import Placement
from gold_jax.training.batches import sampling_rows

STUDENT = ("student", "student, further micro-batches")  # programs that go forward and backward
RESOURCES = ("compute", "memory", "interconnect")
Progress = Callable[[str], None]  # is told what is being done
_ORDER = ("prefill", "decoding", "teacher", "student", "optimizer")


class Pair(NamedTuple):
    """The configs of a run's models, and what their vocabularies share."""

    student: DecoderConfig
    teacher: DecoderConfig | None = None  # None: fine-tuning
    matched: int | None = None  # entries that both vocabularies have; None: they are one and the same


@dataclasses.dataclass
class PlanRequest:
    """A run to plan; models that the devices cannot compute are a ValueError."""

    args: Any
    pair: Pair
    topology: Topology
    mesh: dict[str, int]  # the size of each axis
    attention: str | None = None  # None: "auto"

    def __post_init__(self):
        args, mesh, (student, teacher, matched) = self.args, self.mesh, self.pair
        self.attention = self.attention or "auto"
        self.platform = "tpu" if self.topology.kind == "tpu" else "cuda"
        # On accelerators bfloat16, unless the settings say otherwise.
        self.dtype, self.itemsize = ("float32", 4) if args.bf16 is False else ("bfloat16", 2)
        for config in filter(None, (student, teacher)):
            check_model(config, self.dtype, self.attention, self.platform)
        # The student's; a mesh of no devices.
        self.placement = Placement(jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)), args.layout)
        self.teacher_layout = args.teacher_layout if teacher else "fsdp"
        self.spec = args.loss_spec(matched is None) if teacher else None
        self.reads = teacher is not None and bool(self.spec.distillation_weight)  # whether the teacher reads
        # Whether the student writes completions on these devices.
        self.samples = teacher is not None and args.lmbda > 0 and args.server_url is None
        self.micro_batches = args.gradient_accumulation_steps
        self.shards = mesh["data"] * mesh["fsdp"]  # parts that the rows of a batch are shared out to
        self.device_rows = args.per_device_train_batch_size
        self.rows = self.device_rows * self.shards  # of a micro-batch
        self.update_rows = self.rows * self.micro_batches
        self.length = args.max_length or 1024  # tokens of the longest row, and of the longest prompt
        self.prompt_length = args.prompt_budget if isinstance(args, GOLDConfig) else self.length // 2
        self.tokens = self.update_rows * self.length  # that the student learns from in an update
        # Positions that a device compares in a micro-batch.
        self.positions = self.device_rows * (self.length - self.prompt_length)
        # The programs of an update and how often each runs in one; of decoding, tokens of a row.
        self.programs = {"teacher": self.micro_batches} if self.reads else {}
        self.programs[STUDENT[0]] = 1
        if self.micro_batches > 1:
            self.programs |= {STUDENT[1]: self.micro_batches - 1, "optimizer": 1}
        # Updates whose completions are drawn together, and whether the later ones weigh theirs.
        self.rollout_batches = 1 if teacher is None or args.lmbda == 0 else args.rollout_batches
        self.weighs = teacher is not None and args.weighs_rollouts
        self.sampled_rows = self.sampled_prompts = 0  # that are written at once, and that are read for them
        if self.samples:
            drawn = self.update_rows * self.rollout_batches
            requested = sampling_rows(drawn, self.rows, args.generation_batch_size or self._default_rows())
            self.sampled_rows = -(-min(requested, drawn) // self.shards) * self.shards
            weights = parameter_count(student)
            longest = self.prompt_length - 1 + args.max_completion_length  # the last token is not read
            each = self.sampled_rows // self.shards
            self.sampled_prompts = self.shards * (each // rows_per_prefill(args.num_generations, 1, each, weights))
            self.slots, self._one_size = most_slots(student, weights, each, longest)  # of the cache at its largest
            rounds = args.lmbda * self.update_rows / self.sampled_rows
            self.programs |= {"prefill": rounds, "decoding": rounds * args.max_completion_length}

    @property
    def limit_bytes(self) -> int:
        """What a run may fill of a device: on GPUs what JAX takes when it starts."""
        size = self.topology.chip.hbm_bytes
        return size if self.topology.kind == "tpu" else int(GPU_SHARE * size)

    def _default_rows(self) -> int:
        """Rows that are written at once where no flag says how many, as a run finds them (`training.build`)."""
        student, teacher, _ = self.pair
        masters = 4 * (self.args.bf16_stochastic_round and self.itemsize == 2)
        kept = (12 + masters) * parameter_count(student, None, self.placement)  # parameters and AdamW's moments
        teacher_placement = Placement(self.placement.mesh, self.teacher_layout)
        kept += self.itemsize * parameter_count(teacher, None, teacher_placement)
        kept += self.itemsize * parameter_count(student) // self.mesh["tensor"]
        given = self.itemsize, self.placement, self.prompt_length, self.args.max_completion_length
        each = bytes_per_row(student, *given, self.args.rollout_quantization)
        if self.args.seq_kd and self.args.lmbda < 1:  # the teacher writes, too
            each = max(each, bytes_per_row(teacher, *given))
        return default_rows(self.shards, self.limit_bytes - kept, each)

    def changed(self, mesh: dict[str, int] | None = None, topology: Topology | None = None, **settings: Any):
        """The same with other settings, or on another mesh."""
        mesh, topology = mesh or self.mesh, topology or self.topology
        return dataclasses.replace(self, args=self.args.replace(**settings), mesh=mesh, topology=topology)

    def moment(self, program: str, given: dict[str, int], needed: dict[str, int], **compiling: Any) -> dict[str, Any]:
        """What a device holds while a program runs: bytes by part of what it is given, beside what is resident, and needs.

        `compiling` are the `seconds` that it took and the `error` that the compiler refused it with.
        """
        # In decoding the cache that the largest grows from, where that is more.
        half = power_of_two(self.slots) // 2 if program == "decoding" and not self._one_size else 0
        smaller = given["cache"] * half // self.slots if half > self.prompt_length else 0
        parts = given | ({"smaller cache": smaller} if smaller > sum(needed.values()) else needed)
        found = {"program": program, "parts": parts, "seconds": None, "error": None} | compiling
        return found | {"total": sum(parts.values())}


def parameter_count(config: DecoderConfig, of: str | None = None, placement: Placement | None = None) -> int:
    """Parameters of a model, or of its part "embedding", "layers", "final_norm" or "head"; those of one device of a mesh."""
    return sum(count for path, count in parameter_counts(config, placement).items() if of in (None, path[0]))


def parameter_counts(config: DecoderConfig, placement: Placement | None) -> dict[tuple[str, ...], int]:
    """`parameter_count` by the parameters' paths."""

    def here(shape, spec):
        return shape if placement is None else placement.param_sharding(shape, spec).shard_shape(shape)

    return {path: math.prod(here(info.shape, info.spec)) for path, info in parameters(config).items()}


def meshes(devices: int, pair: Pair) -> Iterator[dict[str, int]]:
    """Every way to cut so many devices into `data`, `fsdp` and `tensor`, where `tensor` divides heads and inner width of both."""
    for tensor in (1, 2, 4, 8):  # beyond a host's devices, hidden states would be summed over slow links
        shards, rest = divmod(devices, tensor)
        if not rest and not any(c.heads % tensor or c.mlp_width % tensor for c in filter(None, pair[:2])):
            for data in (n for n in range(1, shards + 1) if shards % n == 0):
                yield {"data": data, "fsdp": shards // data, "tensor": tensor}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one run of a program, or in a phase of an update."""

    flops: float = 0.0  # operations, those done again too
    model_flops: float = 0.0  # those that the models need, however they are computed
    hbm_bytes: float = 0.0  # between memory and compute
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)  # bytes by mesh axes, such as "data+fsdp"

    def __add__(self, other: "Cost") -> "Cost":
        sent = {axes: self.sent.get(axes, 0.0) + other.sent.get(axes, 0.0) for axes in {**self.sent, **other.sent}}
        flops, model_flops = self.flops + other.flops, self.model_flops + other.model_flops
        return Cost(flops, model_flops, self.hbm_bytes + other.hbm_bytes, sent)

    def __mul__(self, times: float) -> "Cost":
        sent = {axes: times * size for axes, size in self.sent.items()}
        return Cost(times * self.flops, times * self.model_flops, times * self.hbm_bytes, sent)


@dataclasses.dataclass
class Plan:
    """What a run takes of each device."""

    request: PlanRequest
    resident: dict[str, int]  # bytes by part
    moments: list[dict[str, Any]]  # `PlanRequest.moment`s
    costs: dict[str, Cost]  # of one run of each program
    compiled: bool = False  # whether moments and costs are the compiler's; else all is by the analytic model

    def __post_init__(self):
        topology, chip = self.request.topology, self.request.topology.chip
        self.limit_bytes = self.request.limit_bytes
        self.fullest = max(self.moments, key=lambda moment: moment["total"])
        self.peak_bytes = sum(self.resident.values()) + self.fullest["total"]
        self.free_bytes = self.limit_bytes - self.peak_bytes
        self.refused = [moment for moment in self.moments if moment["error"]]
        self.fits = self.free_bytes >= 0 and not self.refused
        costs: dict[str, Cost] = {}  # each program as often as it runs
        for program, times in self.request.programs.items():
            name = STUDENT[0] if program in STUDENT else program
            costs[name] = costs.get(name, Cost()) + self.costs[program] * times
        self.phases, spent = [], Counter()
        for name, cost in sorted(costs.items(), key=lambda item: _ORDER.index(item[0])):
            sending = link_seconds(cost.sent, self.request.mesh, topology)
            alone = cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, sending
            seconds = dict(zip(RESOURCES, alone))
            slowest, least = max(seconds.items(), key=lambda item: item[1])
            spent[slowest] += least
            self.phases.append({"name": name, **vars(cost), "seconds": seconds, "least": least, "slowest": slowest})
        self.together = sum((costs[phase["name"]] for phase in self.phases), Cost())
        self.seconds = sum(phase["least"] for phase in self.phases)  # the least time of an update
        self.slowest = max(spent, key=spent.get)  # the resource that most of that is for
        self.tokens_per_second = self.request.tokens / self.seconds  # at most
        self.tokens_per_second_per_chip = self.tokens_per_second / topology.chips
        self.model_flops_share = self.together.model_flops / (self.seconds * chip.flops)
        # What a run may take, where phases like its own were measured beside a compiled plan of theirs.
        shares = topology.efficiency if self.compiled and self.request.itemsize == 2 else {}
        known = shares.keys() >= costs.keys()
        self.expected_seconds = sum(phase["least"] / shares[phase["name"]] for phase in self.phases) if known else None
        self.compiling = [moment["seconds"] for moment in self.moments if moment["seconds"] is not None]
        self.compile_seconds = sum(self.compiling) if self.compiling else None


def link_seconds(sent: Mapping[str, float], mesh: Mapping[str, int], topology: Topology) -> float:
    """The least time that sending takes: on TPUs all links of the slice share all traffic, as do those of one host's GPUs;
    what GPUs of several hosts have to bring from host to host goes over the hosts' networks at the same time."""
    within, between = sum(sent.values()), 0.0
    if not within:
        return 0.0
    for axes, size in sent.items() if topology.kind == "gpu" else ():
        inside, here, hosts = 1, 1, 1  # of a group, devices on one host, and hosts
        for axis in reversed(list(mesh)):  # devices lie in it rows first: the last axis changes fastest
            fits = max(1, min(mesh[axis], topology.chip.host // inside))
            if axis in axes.split("+"):
                here, hosts = here * fits, hosts * (mesh[axis] // fits)
            inside *= mesh[axis]
        if hosts > 1:  # of what is gathered, `size·n/(n-1)`, a host brings in the others' share, through all its cards
            n = here * hosts
            between += size * n / (n - 1) * (hosts - 1) / hosts / here
    speed, network = topology.interconnect, topology.chip.network
    return max(within / speed if speed else math.inf, between / network if between and network else 0.0)
