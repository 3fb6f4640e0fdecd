"""What a step costs by arithmetic: parameters, FLOPs, bytes of memory traffic, and the time that a chip needs for them.

The compiler's own cost analysis counts the body of a loop once, whatever its trips, so that a model of scanned layers
seems to cost one layer. These counts take the shapes of a `DecoderConfig` instead. A multiplication with an addition is
two FLOPs; what is not a matrix product is left out of FLOPs (about a hundredth). Bytes are those between memory and
compute if all that stands between two products were fused into them: a floor, which programs exceed. All counts are for
all devices together.

Letters as in `models.decoder`: D width, L layers, H heads, K head_dim, V vocabulary, T tokens of a row.
"""

import dataclasses
import math
from collections.abc import Sequence

from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import layer_parameters, parameters
from gold_jax.planning.hardware import Chip

# Products of `[T, T]` with heads in the backward pass of attention, two being the forward pass's: the kernels compute the
# scores again, splash once for the queries' gradients and once for the keys' and values'.
_BACKWARD_PRODUCTS = {"plain": 4, "blockwise": 5, "cudnn": 5, "splash": 7}
_FLOAT32 = 4
# How often logits pass between memory and compute, in float32, for a softmax and its comparison: written, read for the
# maximum, the sum and the comparison; the student's gradient written, and read for two products.
_FORWARD_PASSES, _GRADIENT_PASSES = 4, 3


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, by part; `head` is 0 where it is the embedding."""

    embedding: int
    layers: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.layers + self.final_norm + self.head


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes by part."""

    flops: dict[str, float]
    hbm_bytes: dict[str, float]

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        """Of all parts."""
        return sum(self.hbm_bytes.values())


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one model reads in a step; padding costs what tokens do and counts.

    Attributes:
        tokens: that go through its layers; of rows with a common beginning, that once.
        rows: length of each row as attention sees it.
        positions: whose logits are compared (or, with cross-entropy alone, predicted).
        inner: further tokens whose log-probabilities are looked up, those inside merged groups.
    """

    tokens: int
    rows: Sequence[int]
    positions: int = 0
    inner: int = 0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource alone would take; together they take at least as long as the slowest."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Of the slowest."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def slowest(self) -> str:
        """Its name: "compute", "memory" or "interconnect"."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def parameter_count(config: DecoderConfig) -> Parameters:
    """Parameters of a model, by part."""
    count = {"embedding": 0, "layers": 0, "final_norm": 0, "head": 0}
    for path, info in parameters(config).items():
        count[path[0]] += math.prod(info.shape)
    return Parameters(**count)


def layer_matrices(config: DecoderConfig, *, without: Sequence[str] = ()) -> int:
    """Entries of the matrices of one layer, which a token meets one by one."""
    table = layer_parameters(config)
    return sum(math.prod(x.shape) for name, x in table.items() if x.init == "matrix" and name not in without)


def attention_pairs(config: DecoderConfig, rows: Sequence[int], attention: str) -> float:
    """Pairs of query and key that meet, over all rows and layers; `plain` attention computes those it masks, too.

    Args:
        config: the model's.
        rows: length of each row.
        attention: one of `models.attention.IMPLEMENTATIONS`.
    """

    def pairs(length: int, window: int | None) -> float:
        if attention == "plain":
            return length * length
        seen = length if window is None else min(window, length)
        return seen * length - seen * (seen - 1) / 2

    sliding = sum(config.sliding)
    full = sum(pairs(length, None) for length in rows) * (config.layers - sliding)
    return full + sum(pairs(length, config.window) for length in rows) * sliding


def forward(config: DecoderConfig, reading: Reading, *, attention: str = "blockwise", itemsize: int = 2) -> Work:
    """The layers over whole sequences, no head and no gradient.

    Args:
        config: the model's.
        reading: what it reads.
        attention: one of `models.attention.IMPLEMENTATIONS`.
        itemsize: bytes of an entry of the activations.
    """
    products = 2.0 * reading.tokens * config.layers * layer_matrices(config)
    return Work(
        {"products": products, "attention": 2 * _attention_product(config, reading, attention)},
        {"activations": _activations(config, reading.tokens, itemsize)},
    )


def _attention_product(config: DecoderConfig, reading: Reading, attention: str) -> float:
    """FLOPs of one of attention's products over all layers: of queries with keys, or of shares with values."""
    return 2.0 * config.heads * config.head_dim * attention_pairs(config, reading.rows, attention)


def _activations(config: DecoderConfig, tokens: int, itemsize: int) -> float:
    """Bytes that a forward pass moves: each product's input and output once, and what is added to the residual stream."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    each = 6 * config.width + 2 * (queries + 2 * keys) + 2 * queries + 4 * config.mlp_width
    return float(tokens) * config.layers * each * itemsize


def head_flops(config: DecoderConfig, positions: int, products: int = 1) -> float:
    """FLOPs of so many products of the head with so many positions."""
    return 2.0 * products * positions * config.width * config.vocab_size


def training_step(
    student: DecoderConfig,
    reading: Reading,
    teacher: DecoderConfig | None = None,
    teacher_reading: Reading | None = None,
    *,
    remat: bool,
    chunk: int = 256,
    micro_batches: int = 1,
    attention: str = "blockwise",
    param_bytes: int = 4,
    teacher_param_bytes: int = 2,
    itemsize: int = 2,
) -> Work:
    """One update: the student forward and backward, the teacher forward, both heads, the optimizer.

    The loss goes forward and backward at once, so that the student's head is multiplied with three times at each
    position (logits, the gradients of hidden states and of itself) and the teacher's once. At inner tokens, whose
    log-probabilities are wanted before the loss and whose gradients after it, they are four and one.

    Args:
        student: the student's config.
        reading: what the student reads in the whole update, all micro-batches together.
        teacher: the teacher's config; None for cross-entropy alone.
        teacher_reading: what the teacher reads.
        remat: whether layers are computed again in the backward pass.
        chunk: positions whose logits are held at once: heads are read from memory once a chunk and product.
        micro_batches: how many gradients are added up before the update.
        attention: one of `models.attention.IMPLEMENTATIONS`, for both.
        param_bytes: bytes of an entry of the student's parameters, which gradients and optimizer state share.
        teacher_param_bytes: of the teacher's.
        itemsize: of activations.
    """
    count = parameter_count(student)
    ahead = forward(student, reading, attention=attention, itemsize=itemsize)
    one_product = _attention_product(student, reading, attention)
    flops = {
        "student forward": ahead.total_flops,
        "student backward": 2 * ahead.flops["products"] + _BACKWARD_PRODUCTS[attention] * one_product,
    }
    passes = 2.0  # that read the layers' parameters
    activations = 3 * ahead.total_bytes
    if remat:
        # The last product of a layer is not computed again, unless a norm after it needs its value.
        spared = () if student.sandwich_norms else ("down",)
        again = 2.0 * reading.tokens * student.layers * layer_matrices(student, without=spared)
        flops["recomputation"] = again + 2 * one_product
        passes += 1
        activations += ahead.total_bytes
    flops["student head"] = head_flops(student, reading.positions, 3) + head_flops(student, reading.inner, 4)
    moved = {
        "student parameters": micro_batches * passes * count.layers * param_bytes,
        "student activations": activations,
        "student head": _head_bytes(student, reading, chunk, itemsize, gradient=True),
    }
    if teacher is not None:
        theirs = forward(teacher, teacher_reading, attention=attention, itemsize=itemsize)
        flops["teacher forward"] = theirs.total_flops
        flops["teacher head"] = head_flops(teacher, teacher_reading.positions + teacher_reading.inner)
        moved["teacher parameters"] = micro_batches * parameter_count(teacher).layers * teacher_param_bytes
        moved["teacher activations"] = theirs.total_bytes
        moved["teacher head"] = _head_bytes(teacher, teacher_reading, chunk, itemsize, gradient=False)
    # Gradients are written once for each micro-batch; from the second on, two are read for each that is written.
    moved["gradients"] = count.total * param_bytes * (micro_batches + 3.0 * (micro_batches - 1))
    moved["optimizer"] = optimizer_bytes(count.total, param_bytes)
    return Work(flops, moved)


def optimizer_bytes(parameters: int, param_bytes: int = 4) -> float:
    """Memory traffic of an AdamW update: gradients read for their norm; then they, parameters and both moments are read,
    and all but the gradients written."""
    return 8.0 * parameters * param_bytes


def _head_bytes(config: DecoderConfig, reading: Reading, chunk: int, itemsize: int, *, gradient: bool) -> float:
    """Traffic of a head over chunks of positions: itself, its gradient in float32, and logits."""
    entries = config.vocab_size * config.width
    chunks, inner = math.ceil(reading.positions / chunk), math.ceil(reading.inner / chunk)
    logits = float(reading.positions + reading.inner) * config.vocab_size * _FLOAT32
    if not gradient:
        return float(chunks + inner) * entries * itemsize + logits * _FORWARD_PASSES
    # An inner token's logits are computed twice, before the loss and for the gradient.
    head = (2.0 * chunks + 3 * inner) * entries * itemsize + 2.0 * (chunks + inner) * entries * _FLOAT32
    return head + logits * (_FORWARD_PASSES + _GRADIENT_PASSES)


def decode_step(config: DecoderConfig, rows: int, slots: int, *, itemsize: int = 2) -> Work:
    """One token more for each of so many rows.

    Args:
        config: the model's.
        rows: that are sampled together.
        slots: of the cache, all of which are read, sliding layers' too.
        itemsize: bytes of an entry of weights and cache.
    """
    attended = 4.0 * config.heads * config.head_dim * slots * config.layers
    return Work(
        {
            "products": 2.0 * rows * config.layers * layer_matrices(config),
            "attention": rows * attended,
            "head": head_flops(config, rows),
        },
        {
            "layers": float(parameter_count(config).layers) * itemsize,
            "head": float(config.vocab_size) * config.width * itemsize,
            "cache": float(rows) * cache_bytes(config, slots, itemsize=itemsize),
        },
    )


def cache_bytes(config: DecoderConfig, slots: int, *, itemsize: int = 2) -> int:
    """Bytes of one row's keys and values."""
    return 2 * config.layers * config.kv_heads * config.head_dim * slots * itemsize


def roofline(
    flops: float, hbm_bytes: float, collective_bytes: float, chip: Chip, *, interconnect: float | None = None
) -> Roofline:
    """The least time for one device's share of a step.

    Args:
        flops: of one device, in bfloat16.
        hbm_bytes: between memory and compute of one device.
        collective_bytes: that one device sends.
        chip: the device.
        interconnect: bytes/s that it can send; None for `chip.interconnect`, all of its links.
    """
    sends = chip.interconnect if interconnect is None else interconnect
    sending = 0.0 if not collective_bytes else collective_bytes / sends if sends else math.inf
    return Roofline(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, sending)
