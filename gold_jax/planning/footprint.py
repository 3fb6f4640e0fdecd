"""What a run holds on one device, by arithmetic: exactly what lies there for long, by a formula what a program needs meanwhile.

The formula, in bytes, has the letters of `models.decoder` (L layers, D width, F inner width, H heads of size K, N
key-value heads, V vocabulary), W and E for the teacher's V and D, n tokens of one device's line, C positions of a
chunk, c bytes of an activation, t devices along `tensor`, m entries of a layer's largest matrix. A student's step is
fullest either when it compares or when it begins to go back through the layers; the larger sum is its peak.

| part | what | when it compares | when it goes back |
| --- | --- | --- | --- |
| activations | inputs of all layers | c·n·L·D | the same |
| | without checkpointing, instead | n·L·(c·(2·D + (3·H·K + 2·N·K + 2·F)/t) + norms) | the same |
| | the device's part of the layers, rounded all at once | c·layers | the same |
| | hidden states | 2·c·n·D | |
| | a layer's own, and gathered matrices | | c·(n·(6·D + (5·F + 2·H·K)/t) + 3·m/t) |
| loss | the head's float32 gradient, whole | 4·V·D | the same |
| | heads, gathered or rounded | c·(V·D + W·E) | |
| | logits, tails to sort, gradient of hidden states | 8·C·(V + W) + 12·C·tails + 4·n·D | |
| new gradients | of the device's part of the layers | | 4·layers |

`norms`, of queries and keys where there are any, is 12·(H + N)·K/t. Cross-entropy alone shares the head's gradient out
before it goes back. Against what libtpu 0.0.42.1 lays out for nine programs (students of 0.13 to 8 B with teachers of
0.36 to 32 B or none, 1 to 16 chips, with and without `data`, `tensor`, checkpointing and micro-batches;
`Program.temporaries`), a student's step comes out between 16 % too small and 2 % too large, in six of the nine within 5
%. (What XLA makes of it for GPUs has not been compared.) The other programs' temporaries, all small beside it, come out
within a third, but for a teacher that libtpu cuts into pieces (0.12 for 0.04 GiB).
"""

import functools
import math
from typing import Any

from gold_jax.bucketing import bucket, fine_bucket, power_of_two
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import layer_parameters, parameters
from gold_jax.planning.sizes import CHUNK, Pair, Sizes
from gold_jax.sharding.placement import Placement

_INT32 = _FLOAT32 = 4
ERROR = 0.16  # by which the formula came out too small at most
FORMULA = ("activations", "loss", "new gradients", "temporaries")  # parts that are by it
STUDENT = ("student", "student, further micro-batches")  # programs that go forward and backward


class Footprint(Sizes):
    """Bytes of one device in a run.

    Args:
        args: the settings.
        pair: the models.
        placement: of the student; its mesh may be abstract.
    """

    def __init__(self, args: Any, pair: Pair, placement: Placement):
        super().__init__(args, pair, placement.row_shards)
        self.placement = placement
        self.teacher_placement = Placement(placement.mesh, args.teacher_layout) if self.taught else placement
        self.chunk = args.loss_chunk or CHUNK
        self.spec = args.loss_spec(pair.matched is None) if self.taught else None

    # what lies there for long

    def resident(self) -> dict[str, int]:
        """What lies there all the time, by part."""
        found = {"student": self.student, "optimizer": 2 * self.student + 2 * _INT32}
        if self.taught:
            found["teacher"] = device_bytes(self.pair.teacher, self.teacher_placement, self.itemsize) + self._places()
        return found

    @functools.cached_property
    def student(self) -> int:
        """The student's parameters; its gradients take as much."""
        return device_bytes(self.pair.student, self.placement, _FLOAT32)

    def _places(self) -> int:
        """Which entry is which, in full on every device."""
        sizes = self.pair.student.vocab_size, self.pair.teacher.vocab_size
        identity = self.pair.matched is None
        matched = min(sizes) if identity else self.pair.matched
        orders = 0 if identity else sizes[0] + 4  # the student's order, and both models' stop tokens
        return _INT32 * (2 * sum(sizes) - 2 * matched + orders)

    def transient(self, program: str) -> dict[str, int]:
        """What lies there while a program of `programs()` runs and not always, by part; temporaries aside."""
        if program in ("prefill", "decoding"):
            return {"decoding weights": self.decoding_weights, "cache": self.cache}
        found = {"gradients": self.student} if self.accumulates else {}
        if program == "optimizer":
            return found
        found["batch"] = self.batch
        if self.reads:
            found["teacher's hidden states"] = self.hidden
        return found

    def arguments(self, program: str) -> int:
        """Arguments of a program: what of all that lies there it is given."""
        student, transient = self.pair.student, sum(self.transient(program).values())
        table = self._share(student, student.vocab_size * student.width * _FLOAT32)
        if program == "teacher":
            return self.resident()["teacher"] + self.batch
        if program == "prefill":
            return self.student + self.cache
        if program == "decoding":
            return transient + table
        if program == "optimizer":
            return transient + self.student + self.resident()["optimizer"]
        teacher = 0
        if self.reads:
            size = self.pair.teacher.vocab_size * self.pair.teacher.width * self.itemsize
            teacher = self._places() + self._share(self.pair.teacher, size, self.teacher_placement)
        if not self.accumulates:
            return transient + self.student + self.resident()["optimizer"] + teacher
        # Gradients are the first micro-batch's result, and an argument of the others.
        return transient + self.student + teacher

    @property
    def reads(self) -> bool:
        """Whether the teacher reads."""
        return self.taught and bool(self.spec.distillation_weight)

    def programs(self) -> list[str]:
        """Names of the programs of an update, as `PlannedRun.programs` has them."""
        found = ["teacher"] if self.reads else []
        found += [*STUDENT, "optimizer"] if self.accumulates else ["student"]
        return found + (["prefill", "decoding"] if self.samples else [])

    @property
    def accumulates(self) -> bool:
        """Whether several micro-batches make an update."""
        return self.args.gradient_accumulation_steps > 1

    @property
    def each(self) -> int:
        """Rows of a micro-batch on one device."""
        return self.args.per_device_train_batch_size

    @property
    def line(self) -> int:
        """Tokens that lie in one device's line, its padding too."""
        return fine_bucket(self.each * self.length)

    @property
    def batch(self) -> int:
        """A micro-batch of rows."""
        slots = self.each * bucket(self.length)
        lines = 2 * _INT32 * self.line + (_INT32 + 1) * slots
        labels = 3 * _INT32 * slots
        if not self.taught:
            return lines + labels
        return 2 * (lines + 5 * _INT32 * slots) + labels + _FLOAT32 * slots

    @property
    def hidden(self) -> int:
        """What the teacher made of a micro-batch."""
        return power_of_two(self.line) * self.pair.teacher.width * self.itemsize

    @property
    def cache(self) -> int:
        """Keys and values of the rows that are written at once, and what is known of these."""
        config, placement = self.pair.student, self.placement
        heads = config.kv_heads * placement.kv_repeats(config.heads, config.kv_heads)
        heads //= 1 if placement.head_axis(heads) is None else placement.tensor_size
        rows = self.sampled_rows // self.shards
        keys = 2 * config.layers * rows * heads * config.head_dim * self.slots * self.itemsize
        new = self.args.max_completion_length
        return keys + rows * _INT32 + self.sampled_rows * (2 * _INT32 * new + 2 * _INT32 + 1)

    @property
    def growing(self) -> int:
        """What the smaller cache takes from which rows move to the largest, while both are there; 0 where there is one size."""
        smaller = power_of_two(self.slots) // 2
        return 0 if self.cheap or smaller <= self.prompt_length else self.cache * smaller // self.slots

    @functools.cached_property
    def decoding_weights(self) -> int:
        """The copy of the student that decoding reads."""
        config, placement = self.pair.student, self.placement
        layers = sum(
            math.prod(placement.decode_sharding(x.shape, x.spec).shard_shape(x.shape))
            for x in layer_parameters(config).values()
        )
        head = (config.vocab_size, config.width)
        cut = placement.decode_sharding(head, ("vocab", "embed")).shard_shape(head)
        return self.itemsize * (config.layers * layers + math.prod(cut))

    # what a program needs while it runs

    def temporaries(self, program: str) -> dict[str, int]:
        """What a program needs while it runs, by the formula, by part."""
        if program in STUDENT:
            back = dict(self._backward_peak)
            if self.accumulates and program == STUDENT[0]:
                del back["new gradients"]  # they are what it returns, and stay
            return max(self._loss_peak, back, key=lambda program: sum(program.values()))
        if program == "optimizer":
            return {"temporaries": max(_device_bytes_of_parts(self.pair.student, self.placement, _FLOAT32).values())}
        needed = {"teacher": self._reading, "prefill": self._prefill, "decoding": self._decoding}[program]()
        return self.split(program, needed)

    def split(self, program: str, total: int) -> dict[str, int]:
        """What a compiler says that a program needs, by part: of a student's step the loss and the gradients by the formula, the
        rest being activations. Where rows move to a larger cache and that takes more than writing does, the smaller one
        stands
        in its place."""
        if program == "decoding" and self.growing > total:
            return {"smaller cache": self.growing}
        if program not in STUDENT:
            return {"temporaries": total}
        found = self.temporaries(program)
        others = {name: size for name, size in found.items() if name != "activations"}
        share = min(1.0, total / max(1, sum(others.values())))
        others = {name: round(share * size) for name, size in others.items()}
        return {"activations": total - sum(others.values()), **others}

    @functools.cached_property
    def _loss_peak(self) -> dict[str, int]:
        student, c = self.pair.student, self.itemsize
        loss = _FLOAT32 * (student.vocab_size * student.width + self.line * student.width) + self._logits
        loss += self._gathered(student, self.placement, rounded=c < _FLOAT32)
        if self.reads:
            loss += self._gathered(self.pair.teacher, self.teacher_placement)
        return {"activations": self._kept + 2 * c * self.line * student.width, "loss": loss}

    @functools.cached_property
    def _backward_peak(self) -> dict[str, int]:
        student, c, tensor = self.pair.student, self.itemsize, self._tensor(self.pair.student)
        inner = 5 * student.mlp_width + 2 * student.heads * student.head_dim
        one_layer = c * (self.line * (inner // tensor + 6 * student.width) + 3 * _largest(student) // tensor)
        head = _FLOAT32 * student.vocab_size * student.width
        return {
            "activations": self._kept + one_layer,
            # Cross-entropy's gradient of the head is shared out at once; a distillation's waits for the end.
            "loss": head if self.reads else self._share(student, head),
            "new gradients": device_bytes(student, self.placement, _FLOAT32, of="layers"),
        }

    @functools.cached_property
    def _kept(self) -> int:
        """What the forward pass leaves for the backward pass, and the rounded layers."""
        student, c, tensor = self.pair.student, self.itemsize, self._tensor(self.pair.student)
        kept = c * student.width
        if not self.args.gradient_checkpointing:
            queries, keys = student.heads * student.head_dim, student.kv_heads * student.head_dim
            kept = c * (2 + 2 * student.sandwich_norms) * student.width
            kept += c * (3 * queries + 2 * keys + 2 * student.mlp_width) // tensor
            kept += 3 * _FLOAT32 * (queries + keys) // tensor if student.qk_norm else 0
        return self.line * student.layers * kept + self._rounded(student, self.placement)

    @property
    def _logits(self) -> int:
        """Of one chunk, as many arrays of them as are there at once."""
        student = self.pair.student.vocab_size
        if not self.reads:
            return 2 * _FLOAT32 * self.chunk * student
        teacher = self.pair.teacher.vocab_size
        matched = min(student, teacher) if self.pair.matched is None else self.pair.matched
        tails = max(student, teacher) - matched if self.spec.compare in ("hybrid", "sorted") else 0
        return _FLOAT32 * self.chunk * (2 * (student + teacher) + 3 * tails)

    def _reading(self) -> int:
        teacher, c, tensor = self.pair.teacher, self.itemsize, self._tensor(self.pair.teacher)
        matrix = _largest(teacher) // tensor if self._is_cut(teacher, self.teacher_placement) else 0
        return c * (self.line * (2 * teacher.mlp_width // tensor + 3 * teacher.width) + matrix)

    def _prefill(self) -> int:
        student, c, tensor = self.pair.student, self.itemsize, self._tensor(self.pair.student)
        tokens = self.sampled_rows // self.shards * bucket(self.prompt_length - 1)
        keys = 2 * student.layers * student.kv_heads * student.head_dim * tokens // tensor
        layer = tokens * (2 * student.mlp_width // tensor + 3 * student.width) + _largest(student) // tensor
        return c * (keys + layer) + self._rounded(student, self.placement)

    def _decoding(self) -> int:
        student = self.pair.student
        table = self._share(student, student.vocab_size * student.width * self.itemsize)
        return 2 * _FLOAT32 * self.sampled_rows * student.vocab_size + table

    # of models on the mesh

    def _tensor(self, config: DecoderConfig) -> int:
        """Devices that one layer's heads and inner width are shared out to."""
        return 1 if self.placement.head_axis(config.heads) is None else self.placement.tensor_size

    def _is_cut(self, config: DecoderConfig, placement: Placement) -> bool:
        head = (config.vocab_size, config.width)
        return placement.param_sharding(head, ("vocab", "embed")).shard_shape(head) != head

    def _share(self, config: DecoderConfig, size: int, placement: Placement | None = None) -> int:
        """What a device keeps of something as large as the head."""
        head = (config.vocab_size, config.width)
        cut = (placement or self.placement).param_sharding(head, ("vocab", "embed")).shard_shape(head)
        return size * math.prod(cut) // math.prod(head)

    def _gathered(self, config: DecoderConfig, placement: Placement, *, rounded: bool = False) -> int:
        """A head that is gathered, or rounded, to be multiplied with; 0 where it is used as it lies."""
        return config.vocab_size * config.width * self.itemsize if rounded or self._is_cut(config, placement) else 0

    def _rounded(self, config: DecoderConfig, placement: Placement) -> int:
        """A device's part of the layers in the compute dtype, where they are kept in another."""
        return 0 if self.itemsize == _FLOAT32 else device_bytes(config, placement, self.itemsize, of="layers")


def device_bytes(config: DecoderConfig, placement: Placement, itemsize: int, *, of: str | None = None) -> int:
    """Bytes of a model's parameters on one device of a mesh.

    Args:
        config: the model's.
        placement: how it lies.
        itemsize: bytes of an entry.
        of: the part that counts, such as "layers"; None: all.
    """
    parts = _device_bytes_of_parts(config, placement, itemsize)
    return sum(size for path, size in parts.items() if of in (None, path[0]))


def _device_bytes_of_parts(config: DecoderConfig, placement: Placement, itemsize: int) -> dict[tuple[str, ...], int]:
    """Bytes of each parameter on one device."""
    return {
        path: itemsize * math.prod(placement.param_sharding(info.shape, info.spec).shard_shape(info.shape))
        for path, info in parameters(config).items()
    }


def _largest(config: DecoderConfig) -> int:
    """Entries of a layer's largest matrix."""
    return max(math.prod(info.shape) for info in layer_parameters(config).values())


__all__ = ["ERROR", "FORMULA", "STUDENT", "Footprint", "device_bytes"]
