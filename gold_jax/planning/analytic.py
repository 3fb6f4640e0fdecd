"""The analytic model: a run's memory, FLOPs and bytes by formula, for GPUs and to rank what is worth compiling.

What is resident and what programs are given is exact. A program's temporaries, in bytes, are a formula with the letters
of `models.decoder` (L layers, D width, F inner width, H heads of size K, N key-value heads, V vocabulary), W and E for
the teacher's V and D, n tokens of one device's line, C positions of a chunk, c bytes of an activation, t devices along
`tensor`, m entries of a layer's largest matrix. A student's step is fullest either in its loss or when it begins to go
back through the layers; the larger sum is its peak.

| part | what | in the loss | going back |
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
before it goes back. Against what libtpu 0.0.42.1 lays out for nine programs (`benchmarks/footprint.py`) a student's step
comes out between 16 % too small and 2 % too large. What XLA makes of it for GPUs has not been compared.

FLOPs are those of products; bytes those of parameters, of each product's input and output and of logits, as if all that
stands between two products were fused into them; what is sent follows the ring formulas of `planning.collectives`.
"""

import functools
import math

from gold_jax.bucketing import bucket, fine_bucket, power_of_two
from gold_jax.losses.fused_head import chunk_size
from gold_jax.models.attention import check_model, choose
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import layer_parameters, parameters
from gold_jax.planning.plan import Cost, Plan, ProgramMemory, Sent
from gold_jax.planning.request import STUDENT, PlanRequest
from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes

_INT32 = _FLOAT32 = 4
ERROR = 0.16  # by which the formula came out too small at most
FORMULA = ("activations", "loss", "new gradients", "temporaries")  # parts that are by it
# Products of `[T, T]` with heads in the backward pass of attention, two being the forward pass's: kernels compute the
# scores again, splash once for the queries' gradients and once for the keys' and values'.
_BACKWARD_PRODUCTS = {"plain": 4, "blockwise": 5, "cudnn": 5, "splash": 7}
_FLOAT32_PRODUCTS = 6  # products of float32 factors as such are six of bfloat16 ones on TPUs
# How often float32 logits pass between memory and compute: written, read for the maximum, the sum and the comparison;
# the student's gradient written, and read for two products.
_FORWARD_PASSES, _GRADIENT_PASSES = 4, 3


def estimate(request: PlanRequest) -> Plan:
    """A plan for which nothing is compiled.

    Raises:
        ValueError: settings that make no run, such as attention that the devices cannot compute.
    """
    check(request)
    model = Analytic(request)
    programs = tuple(
        ProgramMemory(name, {**model.transient(name), **model.temporaries(name)}) for name in request.programs()
    )
    return Plan(request, model.resident(), programs, {name: model.cost(name) for name in request.programs()})


def check(request: PlanRequest) -> None:
    """See that the models can be computed on the devices.

    Raises:
        ValueError: they cannot, and why.
    """
    for config in filter(None, request.pair[:2]):
        check_model(config, request.dtype, request.attention or "auto", request.platform)


class Analytic:
    """The formulas for one run, in bytes and FLOPs of one device."""

    def __init__(self, request: PlanRequest):
        self.request, self.args, self.itemsize = request, request.args, request.itemsize
        self.placement = request.placement
        self.student, self.teacher = request.pair.student, request.pair.teacher
        self.teacher_placement = Placement(self.placement.mesh, self.args.teacher_layout) if self.teacher else None
        self.chunk = chunk_size(self.args.loss_chunk, request.platform)
        self.student_bytes = device_bytes(self.student, self.placement, _FLOAT32)

    # what lies there

    def resident(self) -> dict[str, int]:
        """What lies there all the time, by part."""
        found = {"student": self.student_bytes, "optimizer": 2 * self.student_bytes + 2 * _INT32}
        if self.teacher:
            sizes, matched = (self.student.vocab_size, self.teacher.vocab_size), self.request.pair.matched
            orders = 0 if matched is None else sizes[0] + 4  # the student's order, and both models' stop tokens
            indices = 2 * sum(sizes) - 2 * (min(sizes) if matched is None else matched) + orders
            found["teacher"] = device_bytes(self.teacher, self.teacher_placement, self.itemsize) + _INT32 * indices
        return found

    def transient(self, program: str) -> dict[str, int]:
        """What lies there while a program runs and not always, by part; temporaries aside."""
        if program in ("prefill", "decoding"):
            return {"decoding weights": self.decoding_weights, "cache": self.cache}
        found = {"gradients": self.student_bytes} if self.request.passes > 1 else {}
        if program != "optimizer":
            found["batch"] = self.batch
            if self.request.reads:
                found["teacher's hidden states"] = power_of_two(self.line) * self.teacher.width * self.itemsize
        return found

    @property
    def line(self) -> int:
        """Tokens that lie in one device's line, its padding too."""
        return fine_bucket(self.args.per_device_train_batch_size * self.request.length)

    @property
    def batch(self) -> int:
        """A micro-batch of rows."""
        slots = self.args.per_device_train_batch_size * bucket(self.request.length)
        lines = 2 * _INT32 * self.line + (_INT32 + 1) * slots
        labels = 3 * _INT32 * slots
        return lines + labels if not self.teacher else 2 * (lines + 5 * _INT32 * slots) + labels + _FLOAT32 * slots

    @property
    def cache(self) -> int:
        """Keys and values of the rows that are written at once, and what is known of these."""
        config, placement, rows = self.student, self.placement, self.request.sampled_rows
        heads = config.kv_heads * placement.kv_repeats(config.heads, config.kv_heads)
        heads //= 1 if placement.head_axis(heads) is None else placement.tensor_size
        each = rows // self.request.shards
        keys = 2 * config.layers * each * heads * config.head_dim * self.request.slots * self.itemsize
        return keys + each * _INT32 + rows * (2 * _INT32 * self.args.max_completion_length + 2 * _INT32 + 1)

    @functools.cached_property
    def decoding_weights(self) -> int:
        """The copy of the student that decoding reads."""
        config, cut = self.student, self.placement.decode_sharding
        layers = sum(math.prod(cut(x.shape, x.spec).shard_shape(x.shape)) for x in layer_parameters(config).values())
        head = (config.vocab_size, config.width)
        return self.itemsize * (config.layers * layers + math.prod(cut(head, ("vocab", "embed")).shard_shape(head)))

    # what a program needs while it runs

    def temporaries(self, program: str) -> dict[str, int]:
        """What a program needs while it runs, by part."""
        if program in STUDENT:
            back = self._backward_peak()
            if self.request.passes > 1 and program == STUDENT[0]:
                del back["new gradients"]  # they are what it returns, and stay
            return max(self._loss_peak(), back, key=lambda parts: sum(parts.values()))
        student, c, tensor = self.student, self.itemsize, self._tensor(self.student)
        if program == "optimizer":
            return {"temporaries": max(_parts(student, self.placement, _FLOAT32).values())}
        if program == "teacher":
            matrix = _largest(self.teacher) if self._is_cut(self.teacher, self.teacher_placement) else 0
            inner = 2 * self.teacher.mlp_width // self._tensor(self.teacher) + 3 * self.teacher.width
            return {"temporaries": c * (self.line * inner + matrix // self._tensor(self.teacher))}
        if program == "prefill":
            tokens = self.request.sampled_rows // self.request.shards * bucket(self.request.prompt_length - 1)
            keys = 2 * student.layers * student.kv_heads * student.head_dim * tokens // tensor
            layer = tokens * (2 * student.mlp_width // tensor + 3 * student.width) + _largest(student) // tensor
            return {"temporaries": c * (keys + layer) + self._rounded()}
        table = self._share(student, student.vocab_size * student.width * c)
        needed = 2 * _FLOAT32 * self.request.sampled_rows * student.vocab_size + table
        smaller = self.request.smaller_cache(self.cache)
        return {"smaller cache": smaller} if smaller > needed else {"temporaries": needed}

    def _loss_peak(self) -> dict[str, int]:
        student, c = self.student, self.itemsize
        loss = _FLOAT32 * (student.vocab_size * student.width + self.line * student.width) + self._logits()
        if c < _FLOAT32 or self._is_cut(student, self.placement):
            loss += c * student.vocab_size * student.width
        if self.request.reads and self._is_cut(self.teacher, self.teacher_placement):
            loss += c * self.teacher.vocab_size * self.teacher.width
        return {"activations": self._kept() + 2 * c * self.line * student.width, "loss": loss}

    def _backward_peak(self) -> dict[str, int]:
        student, c, tensor = self.student, self.itemsize, self._tensor(self.student)
        inner = 5 * student.mlp_width + 2 * student.heads * student.head_dim
        one_layer = c * (self.line * (inner // tensor + 6 * student.width) + 3 * _largest(student) // tensor)
        head = _FLOAT32 * student.vocab_size * student.width
        return {
            "activations": self._kept() + one_layer,
            # Cross-entropy's gradient of the head is shared out at once; a distillation's waits for the end.
            "loss": head if self.request.reads else self._share(student, head),
            "new gradients": device_bytes(student, self.placement, _FLOAT32, of="layers"),
        }

    def _kept(self) -> int:
        """What the forward pass leaves for the backward pass, and the rounded layers."""
        student, c, tensor = self.student, self.itemsize, self._tensor(self.student)
        kept = c * student.width
        if not self.args.gradient_checkpointing:
            queries, keys = student.heads * student.head_dim, student.kv_heads * student.head_dim
            kept = c * (2 + 2 * student.sandwich_norms) * student.width
            kept += c * (3 * queries + 2 * keys + 2 * student.mlp_width) // tensor
            kept += 3 * _FLOAT32 * (queries + keys) // tensor if student.qk_norm else 0
        return self.line * student.layers * kept + self._rounded()

    def _logits(self) -> int:
        """Of one chunk, as many arrays of them as are there at once."""
        student = self.student.vocab_size
        if not self.request.reads:
            return 2 * _FLOAT32 * self.chunk * student
        teacher, matched = self.teacher.vocab_size, self.request.pair.matched
        matched = min(student, teacher) if matched is None else matched
        tails = max(student, teacher) - matched if self.request.spec.compare in ("hybrid", "sorted") else 0
        return _FLOAT32 * self.chunk * (2 * (student + teacher) + 3 * tails)

    def _tensor(self, config: DecoderConfig) -> int:
        """Devices that one layer's heads and inner width are shared out to."""
        return 1 if self.placement.head_axis(config.heads) is None else self.placement.tensor_size

    def _is_cut(self, config: DecoderConfig, placement: Placement) -> bool:
        head = (config.vocab_size, config.width)
        return placement.param_sharding(head, ("vocab", "embed")).shard_shape(head) != head

    def _share(self, config: DecoderConfig, size: int) -> int:
        """What a device keeps of something as large as the student's head."""
        head = (config.vocab_size, config.width)
        cut = self.placement.param_sharding(head, ("vocab", "embed")).shard_shape(head)
        return size * math.prod(cut) // math.prod(head)

    def _rounded(self) -> int:
        """A device's part of the layers in the compute dtype, where they are kept in another."""
        whole = self.itemsize == _FLOAT32
        return 0 if whole else device_bytes(self.student, self.placement, self.itemsize, of="layers")

    # what it costs

    def cost(self, program: str) -> Cost:
        """What one run of a program costs; of decoding, one token more for each row."""
        request, rows = self.request, self.args.per_device_train_batch_size
        if program in STUDENT:
            flops, needed, moved = self._student_step(program)
            sent = self._student_sent()
        elif program == "optimizer":
            return Cost(hbm_bytes=8.0 * self.student_bytes)
        elif program == "decoding":
            flops, moved, sent = self._token()
            needed = flops
        else:
            config, placement = self.student, self.placement
            length, tokens = bucket(request.length), self.line
            if program == "teacher":
                config, placement = self.teacher, self.teacher_placement
            else:
                rows, length = request.sampled_rows // request.shards, bucket(request.prompt_length - 1)
                tokens = rows * length
            flops = needed = sum(self._forward(config, tokens, rows, length))
            moved = self._layer_bytes(config) + activation_bytes(config, tokens, self.itemsize)
            layers = self._layer_bytes(config) / self.placement.tensor_size
            sent = _added(
                _ring(placement, _width_axes(config, placement)[0], layers), self._along_tensor(config, 2, tokens)
            )
        share, products = self.placement.tensor_size, _FLOAT32_PRODUCTS if self.itemsize == _FLOAT32 else 1
        return Cost(products * flops / share, needed / share, moved / share, sent)

    def _forward(self, config: DecoderConfig, tokens: int, rows: int, length: int) -> tuple[float, float]:
        """FLOPs of the layers' matrices and of attention, over whole sequences."""
        products = 2.0 * tokens * config.layers * layer_matrices(config)
        return products, 2 * attention_product(config, [length] * rows, self._attention(config, length))

    def _layer_bytes(self, config: DecoderConfig) -> float:
        return float(parameter_count(config, "layers")) * self.itemsize

    def _student_step(self, program: str) -> tuple[float, float, float]:
        """FLOPs, FLOPs that the models need, and bytes of one micro-batch, on the devices of one shard."""
        student, c, length = self.student, self.itemsize, bucket(self.request.length)
        products, attention = self._forward(student, self.line, self.args.per_device_train_batch_size, length)
        remat, positions, spec = self.args.gradient_checkpointing, self.request.positions, self.request.spec
        # A head's losses one by one: logits, the gradients of hidden states and of the head.
        losses = 1 if spec is None else bool(spec.distillation_weight) + bool(spec.crossentropy_weight)
        head = 6.0 * losses * positions * student.vocab_size * student.width
        theirs = 2.0 * positions * self.teacher.vocab_size * self.teacher.width if self.request.reads else 0.0
        backward = _BACKWARD_PRODUCTS[self._attention(student, length)] * attention / 2
        # The last product of a layer is not computed again, unless a norm after it needs its value.
        spared = () if student.sandwich_norms else ("down",)
        again = 2.0 * self.line * student.layers * layer_matrices(student, without=spared) + attention if remat else 0
        flops = 3 * products + attention + backward + again + head + theirs
        activations = activation_bytes(student, self.line, c)
        moved = (2 + remat) * self._layer_bytes(student) + (3 + remat) * activations
        chunks, entries = math.ceil(positions / self.chunk), student.vocab_size * student.width
        moved += losses * chunks * entries * (2 * c + 2 * _FLOAT32)
        moved += losses * positions * student.vocab_size * _FLOAT32 * (_FORWARD_PASSES + _GRADIENT_PASSES)
        if self.request.reads:
            moved += chunks * self.teacher.vocab_size * self.teacher.width * c
            moved += positions * self.teacher.vocab_size * _FLOAT32 * _FORWARD_PASSES
        # A device's own: layers rounded, gradients written (to be added, two read besides), and the update.
        own = (_FLOAT32 + c) / _FLOAT32 + (3 if program == STUDENT[1] else 1) + (0 if self.request.passes > 1 else 8)
        moved += own * self.student_bytes * self.placement.tensor_size
        return flops, 3 * (products + attention) + head + theirs, moved

    def _token(self) -> tuple[float, float, Sent]:
        """FLOPs, bytes and what is sent for one token more of each row, half of the slots for completions in use."""
        config, rows, c = self.student, self.request.sampled_rows // self.request.shards, self.itemsize
        slots = self.request.prompt_length + self.args.max_completion_length // 2
        head = config.width * config.vocab_size
        attended = 4.0 * config.heads * config.head_dim * slots * config.layers
        flops = rows * (2.0 * (config.layers * layer_matrices(config) + head) + attended)
        copies = self.placement.kv_repeats(config.heads, config.kv_heads)
        cache = copies * rows * 2 * config.layers * config.kv_heads * config.head_dim * slots * c
        return flops, self._layer_bytes(config) + head * c + cache, self._along_tensor(config, 2, rows)

    def _attention(self, config: DecoderConfig, length: int) -> str:
        requested = self.request.attention or "auto", self.request.platform, self.request.dtype
        return choose(*requested, config.head_dim, config.attention_softcap, length=length)

    def _student_sent(self) -> Sent:
        """Layers gathered for the forward and again for the backward pass, their gradients summed where they are kept; heads
        gathered, their float32 gradients summed."""
        config, placement, c = self.student, self.placement, self.itemsize
        layers, head = self._layer_bytes(config) / placement.tensor_size, config.vocab_size * config.width
        width, cut = _width_axes(config, placement)
        parts = [
            _ring(placement, width, 3 * layers),
            _all_reduced(placement, width, layers),
            _ring(placement, cut, head * (c + _FLOAT32)),
            _all_reduced(placement, cut, head * _FLOAT32, also=("tensor",)),
            self._along_tensor(config, 5 if self.args.gradient_checkpointing else 4, self.line),
        ]
        if not config.tied:
            parts.append(_all_reduced(placement, cut, head * _FLOAT32))
        if self.request.reads:
            axes = _width_axes(self.teacher, self.teacher_placement)[1]
            parts.append(_ring(placement, axes, self.teacher.vocab_size * self.teacher.width * c))
        return _added(*parts)

    def _along_tensor(self, config: DecoderConfig, times: int, tokens: int) -> Sent:
        """Sums over `tensor` of hidden states, so many in each layer."""
        size = times * config.layers * tokens * config.width * self.itemsize
        return _ring(self.placement, ("tensor",), 2 * size)


def parameter_count(config: DecoderConfig, of: str | None = None) -> int:
    """Parameters of a model, or of its part "embedding", "layers", "final_norm" or "head"."""
    return sum(math.prod(x.shape) for path, x in parameters(config).items() if of in (None, path[0]))


def device_bytes(config: DecoderConfig, placement: Placement, itemsize: int, *, of: str | None = None) -> int:
    """Bytes of a model's parameters, or of a part of them, on one device of a mesh."""
    return sum(size for path, size in _parts(config, placement, itemsize).items() if of in (None, path[0]))


def _parts(config: DecoderConfig, placement: Placement, itemsize: int) -> dict[tuple[str, ...], int]:
    return {
        path: itemsize * math.prod(placement.param_sharding(info.shape, info.spec).shard_shape(info.shape))
        for path, info in parameters(config).items()
    }


def _largest(config: DecoderConfig) -> int:
    return max(math.prod(info.shape) for info in layer_parameters(config).values())


def layer_matrices(config: DecoderConfig, *, without: tuple[str, ...] = ()) -> int:
    """Entries of the matrices of one layer, which a token meets one by one."""
    table = layer_parameters(config)
    return sum(math.prod(x.shape) for name, x in table.items() if x.init == "matrix" and name not in without)


def attention_product(config: DecoderConfig, rows: list[int], attention: str) -> float:
    """FLOPs of one of attention's products over all layers: of queries with keys, or of shares with values.

    Args:
        config: the model's.
        rows: length of each row.
        attention: one of `models.attention.IMPLEMENTATIONS`; "plain" computes the pairs that it masks, too.
    """

    def pairs(length: int, window: int | None) -> float:
        seen = length if window is None else min(window, length)
        return length * length if attention == "plain" else seen * length - seen * (seen - 1) / 2

    sliding = sum(config.sliding)
    full = sum(pairs(length, None) for length in rows) * (config.layers - sliding)
    near = sum(pairs(length, config.window) for length in rows) * sliding
    return 2.0 * config.heads * config.head_dim * (full + near)


def activation_bytes(config: DecoderConfig, tokens: int, itemsize: int) -> float:
    """Bytes that a forward pass moves: each product's input and output once, and what is added to the residual stream."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    each = 6 * config.width + 2 * (queries + 2 * keys) + 2 * queries + 4 * config.mlp_width
    return float(tokens) * config.layers * each * itemsize


def _width_axes(config: DecoderConfig, placement: Placement) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that the width of layers, and that of the embedding and the head, are cut over."""
    layer = sharded_axes(placement.param_sharding((config.width, config.mlp_width), ("embed", "mlp")), 0)
    return layer, sharded_axes(placement.param_sharding((config.vocab_size, config.width), ("vocab", "embed")), 1)


def _ring(placement: Placement, axes: tuple[str, ...], size: float) -> Sent:
    """So many bytes gathered, or scattered, over some axes."""
    shape = placement.mesh.shape
    axes = [axis for axis in shape if axis in axes and shape[axis] > 1]
    n = math.prod(shape[axis] for axis in axes)
    return {"+".join(axes): size * (n - 1) / n} if n > 1 else {}


def _all_reduced(placement: Placement, axes: tuple[str, ...], size: float, also: tuple[str, ...] = ()) -> Sent:
    """The share of a gradient that a device keeps along `axes`, summed over all others that have a part in it."""
    kept = size / math.prod(placement.mesh.shape[axis] for axis in axes)
    return _ring(placement, tuple(axis for axis in (*ROW_AXES, *also) if axis not in axes), 2 * kept)


def _added(*parts: Sent) -> Sent:
    return sum((Cost(sent=part) for part in parts), Cost()).sent
