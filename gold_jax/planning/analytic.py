"""The analytic model: a run's memory, FLOPs and bytes by formula, for GPUs and to rank what is worth compiling.

What is resident and what programs are given is exact; temporaries (`benchmarks/footprint.py`) come out between 16 % too
small and 2 % too large against what libtpu 0.0.42.1 lays out for nine programs, between 18 % too small and 5 % too large
against XLA's GPU compiler of jax 0.11.2. FLOPs are those of products; bytes those of parameters, of each product's input
and output and of logits, as if all between were fused into them; what is sent follows the ring formulas of
`planning.collectives`.
"""

import math
from collections.abc import Iterable

from gold_jax.bucketing import bucket, fine_bucket, power_of_two
from gold_jax.losses.fused_head import chunk_group, chunk_size
from gold_jax.models.attention import choose
from gold_jax.models.config import DecoderConfig
from gold_jax.models.parameters import layer_parameters
from gold_jax.models.quantization import vector_bytes
from gold_jax.planning.plan import STUDENT, Cost, Plan, PlanRequest, parameter_count, parameter_counts
from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes
from gold_jax.training.objective import splits_vocabulary

ERROR = 0.18  # by which the formula came out too small at most
FORMULA = ("activations", "loss", "new gradients", "temporaries")  # parts that are by it
# Products of `[T, T]` with heads in attention's backward pass: kernels compute the scores again, splash twice.
_BACKWARD_PRODUCTS = {"plain": 4, "blockwise": 5, "cudnn": 5, "splash": 7}
# Of float32 logits: written, read for maximum, sum and comparison; the gradient written, read for two products.
_FORWARD_PASSES, _GRADIENT_PASSES = 4, 3


def estimate(request: PlanRequest) -> Plan:
    """A plan for which nothing is compiled."""
    model, names = Analytic(request), request.programs
    moments = [request.moment(name, model.transient(name), model.temporaries(name)) for name in names]
    return Plan(request, model.resident(), moments, {name: model.cost(name) for name in names})


class _Side:
    """A model of the run on its mesh: sizes in entries."""

    def __init__(self, config: DecoderConfig, placement: Placement):
        self.config, self.placement = config, placement
        self.queries, self.keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.largest = max(math.prod(info.shape) for info in layer_parameters(config).values())
        self.layers = parameter_count(config, "layers")
        head = (config.vocab_size, config.width)
        cut = placement.param_sharding(head, ("vocab", "embed"))
        layer = placement.param_sharding((config.width, config.mlp_width), ("embed", "mlp"))
        self.head, self.head_part = math.prod(head), math.prod(cut.shard_shape(head))  # whole, and on one device
        # The mesh axes that the width of the embedding and the head, and that of layers, are cut over.
        self.head_axes, self.width_axes = sharded_axes(cut, 1), sharded_axes(layer, 0)
        # Devices that one layer's heads and inner width are shared out to.
        self.tensor = 1 if placement.head_axis(config.heads) is None else placement.tensor_size

    def activation_bytes(self, tokens: int, itemsize: int) -> float:
        """Bytes that a forward pass moves: each product's input and output once, and what is added to the residual stream."""
        each = 6 * self.config.width + 4 * (self.queries + self.keys) + 4 * self.config.mlp_width
        return float(tokens) * self.config.layers * each * itemsize


class Analytic:
    """The formulas for one run, in bytes and FLOPs of one device."""

    def __init__(self, request: PlanRequest):
        self.request, self.args, self.itemsize = request, request.args, request.itemsize
        self.placement, (student, teacher, matched) = request.placement, request.pair
        self.student = _Side(student, request.placement)
        self.teacher = _Side(teacher, Placement(self.placement.mesh, self.args.teacher_layout)) if teacher else None
        self.tensor, self.rows = self.placement.tensor_size, request.device_rows
        self.chunk = chunk_size(self.args.loss_chunk, request.platform)
        self.line = fine_bucket(self.rows * request.length)  # tokens of one device's line, its padding too
        self.heads = [self.student, self.teacher][: 1 + request.reads]  # whose heads the loss multiplies with
        # Whether devices split the vocabulary in the loss, which makes this part of a head a device's to multiply with.
        split = splits_vocabulary(self.line, student.width, self.tensor, [side.head_axes for side in self.heads])
        self.split = self.tensor if split else 1
        self.each = request.sampled_rows // request.shards  # rows that a device writes at once
        self.read = request.sampled_prompts // request.shards  # prompts that it reads for them
        self.student_bytes = 4 * parameter_count(student, None, self.placement)
        # Whether the optimizer keeps masters beside its moments.
        self.masters = bool(self.args.bf16_stochastic_round and self.itemsize == 2)
        layers = parameter_count(student, "layers", self.placement)
        self.new_gradients = 4 * layers
        # In the compute dtype, where it is another: on TPUs all layers at once, on GPUs one after the other.
        self.rounded = self.itemsize * layers if self.itemsize < 4 and request.platform != "cuda" else 0
        self.matched = matched if matched or not teacher else min(student.vocab_size, teacher.vocab_size)
        slots = self.rows * bucket(request.length)
        # Chunks of positions that make their gradients in one product.
        self.group = 1 if self.split > 1 else chunk_group(self.chunk, slots)
        lines, labels = 8 * self.line + 5 * slots, 12 * slots
        self.batch = 2 * (lines + 20 * slots) + labels + 4 * slots if teacher else lines + labels
        self.batch += 8 * slots if request.weighs else 0

    def resident(self) -> dict[str, int]:
        """What lies there all the time, by part."""
        found = {"student": self.student_bytes, "optimizer": (2 + self.masters) * self.student_bytes + 8}
        if self.teacher:
            config, sizes = self.teacher.config, [config.vocab_size for config in self.request.pair[:2]]
            # Entries without a match go to prefixes; the student's order, and both models' stop tokens.
            orders = 2 * (sum(sizes) - self.matched) + (0 if self.request.pair.matched is None else sizes[0] + 4)
            found["teacher"] = self.itemsize * parameter_count(config, None, self.teacher.placement) + 4 * orders
        return found

    def transient(self, program: str) -> dict[str, int]:
        """What lies there while a program runs and not always, by part; temporaries aside."""
        if program in ("prefill", "decoding"):
            config, placement = self.student.config, self.placement
            # Keys and values of the rows that are written at once, and what is known of these.
            heads = config.kv_heads * placement.kv_repeats(config.heads, config.kv_heads)
            heads //= 1 if placement.head_axis(heads) is None else self.tensor
            keys = 2 * config.layers * self.each * heads * self.request.slots * self._cached_vector
            numbers = 3 if self.request.weighs else 2  # of each token
            rows = self.request.sampled_rows * (4 * numbers * self.args.max_completion_length + 9)
            return {"decoding weights": self._decoding_weights(placement), "cache": keys + 4 * self.each + rows}
        found = {"gradients": self.student_bytes} if self.request.micro_batches > 1 else {}
        if program != "optimizer":
            found["batch"] = self.batch
            if self.request.reads:
                found["teacher's hidden states"] = power_of_two(self.line) * self.teacher.config.width * self.itemsize
        return found

    @property
    def _cached_vector(self) -> int:
        """Bytes of one head's key or value in a slot of the student's cache."""
        return vector_bytes(self.student.config.head_dim, self.itemsize, self.args.rollout_quantization)

    def _decoding_weights(self, placement: Placement | None) -> int:
        """Bytes of what decoding reads for every token, on one device or (None) on all that share one model out."""
        config, rounded = self.student.config, self.args.rollout_quantization != "none"

        def held(shape: tuple[int, ...], spec: tuple[str | None, ...]) -> int:
            return math.prod(shape if placement is None else placement.decode_sharding(shape, spec).shard_shape(shape))

        def matrix(shape, spec, kept: int) -> int:  # `kept`: the axis that a product does not sum over
            if rounded:
                return held(shape, spec) + 4 * held((shape[kept],), (spec[kept],))
            return self.itemsize * held(shape, spec)

        of_layer = sum(
            matrix(x.shape, x.spec, 1) if x.init == "matrix" else self.itemsize * held(x.shape, x.spec)
            for x in layer_parameters(config).values()
        )
        return config.layers * of_layer + matrix((config.vocab_size, config.width), ("vocab", "embed"), 0)

    def temporaries(self, program: str) -> dict[str, int]:
        """What a program needs while it runs, by part."""
        side, c = self.teacher if program == "teacher" else self.student, self.itemsize
        config, t = side.config, side.tensor
        if program in STUDENT:
            in_loss, going_back = self._student_peaks()
            if self.request.micro_batches > 1 and program == STUDENT[0]:
                del going_back["new gradients"]  # they are what it returns, and stay
            return max(in_loss, going_back, key=lambda parts: sum(parts.values()))
        if program == "optimizer":
            return {"temporaries": 4 * max(parameter_counts(config, self.placement).values())}
        if program == "decoding":
            return {"temporaries": 8 * self.request.sampled_rows * config.vocab_size + c * side.head_part}
        layer, matrix = 2 * config.mlp_width // t + 3 * config.width, side.largest // t
        if program == "teacher":
            return {"temporaries": c * (self.line * layer + (matrix if side.head_part < side.head else 0))}
        tokens = self.read * bucket(self.request.prompt_length - 1)
        copied = 0 if self.read == self.each else self.each * bucket(self.request.prompt_length - 1)
        keys = 2 * config.layers * config.kv_heads * (tokens * c * config.head_dim + copied * self._cached_vector) // t
        return {"temporaries": keys + c * (tokens * layer + matrix) + self.rounded}

    def _student_peaks(self) -> tuple[dict[str, int], dict[str, int]]:
        """What the student's step needs in its loss, and when it begins to go back through the layers."""
        side, reads, n, c = self.student, self.request.reads, self.line, self.itemsize
        config, t = side.config, side.tensor
        kept = c * config.width  # what a layer's forward pass leaves of a token for the backward pass
        if not self.args.gradient_checkpointing:
            kept = c * (2 + 2 * config.post_norms) * config.width
            kept += c * (3 * side.queries + 2 * side.keys + 2 * config.mlp_width) // t
            kept += 12 * (side.queries + side.keys) // t if config.qk_norm or config.joint_qk_norm else 0
        activations = n * config.layers * kept + self.rounded
        sizes, tails = [model.config.vocab_size for model in self.heads], 0
        if reads and self.request.spec.compare in ("hybrid", "sorted"):
            tails = max(sizes) - self.matched
        # The float32 gradient of the head that a device multiplies with; gradients of hidden states; logits, and tails
        # to sort; where the vocabulary is split, logits as they are made beside those that are exchanged.
        logits = (2 + (self.split > 1)) * sum(sizes) + 3 * tails
        loss = 4 * (side.head // self.split + n * config.width + self.chunk * logits)
        if self.group > 1:  # gradients of logits
            loss += c * self.group * self.chunk * config.vocab_size
        if c < 4 or side.head_part < side.head:
            loss += c * side.head // self.split
        if reads and self.teacher.head_part < self.teacher.head:
            loss += c * self.teacher.head // self.split
        # A layer's own, and gathered matrices.
        layer = n * ((5 * config.mlp_width + 2 * side.queries) // t + 6 * config.width) + 3 * side.largest // t
        # On TPUs cross-entropy's gradient of the head is shared out at once; a distillation's waits for the end.
        head = 4 * (side.head // self.split if reads or self.request.platform == "cuda" else side.head_part)
        going_back = {"activations": activations + c * layer, "loss": head, "new gradients": self.new_gradients}
        return {"activations": activations + 2 * c * n * config.width, "loss": loss}, going_back

    def cost(self, program: str) -> Cost:
        """What one run of a program costs; of decoding, one token more for each row."""
        if program == "optimizer":
            return Cost(hbm_bytes=(8.0 + 2 * self.masters) * self.student_bytes)
        if program in STUDENT:
            cost = self._student_step(program)
        elif program == "decoding":
            cost = self._token()
        elif program == "teacher":
            cost = self._whole_rows(self.teacher, self.line, self.rows, bucket(self.request.length))
        else:
            length = bucket(self.request.prompt_length - 1)
            cost = self._whole_rows(self.student, self.read * length, self.read, length)
        products = 6 if self.itemsize == 4 else 1  # of float32 factors as such, one is six of bfloat16 ones on TPUs
        flops, needed, moved = (x / self.tensor for x in (products * cost.flops, cost.model_flops, cost.hbm_bytes))
        return Cost(flops, needed, moved, cost.sent)

    def _forward(self, side: _Side, tokens: int, rows: int, length: int) -> tuple[float, float, str]:
        """FLOPs of the layers' matrices and of attention, over whole sequences, and how attention is computed."""
        config, request = side.config, self.request
        kind = request.attention, request.platform, request.dtype, config.head_dim, config.attention_softcap
        attention = choose(*kind, length=length)
        products = 2.0 * tokens * config.layers * layer_matrices(config)
        return products, 2 * attention_product(config, [length] * rows, attention), attention

    def _whole_rows(self, side: _Side, tokens: int, rows: int, length: int) -> Cost:
        """A forward pass over whole rows, on the devices of one shard."""
        flops, layers = sum(self._forward(side, tokens, rows, length)[:2]), float(side.layers * self.itemsize)
        moved = layers + side.activation_bytes(tokens, self.itemsize)
        sent = self._ring(side.width_axes, layers / self.tensor) + self._along_tensor(side, 2, tokens)
        return Cost(flops, flops, moved) + sent

    def _student_step(self, program: str) -> Cost:
        """One micro-batch, on the devices of one shard."""
        side, c, reads, length = self.student, self.itemsize, self.request.reads, bucket(self.request.length)
        config, teacher, line = side.config, self.teacher, self.line
        products, attention, kind = self._forward(side, line, self.rows, length)
        remat, positions, spec = self.args.gradient_checkpointing, self.request.positions, self.request.spec
        # A head's losses one by one: logits, the gradients of hidden states and of the head.
        losses = 1 if spec is None else bool(spec.distillation_weight) + bool(spec.crossentropy_weight)
        heads = 6.0 * losses * positions * side.head + (2.0 * positions * teacher.head if reads else 0.0)
        # Importance weights: the student's probabilities of what was drawn.
        weighing = 2.0 * positions * side.head if self.request.weighs else 0.0
        backward = _BACKWARD_PRODUCTS[kind] * attention / 2
        # The last product of a layer is not computed again, unless a norm after it needs its value.
        spared = () if config.post_norms else ("down",)
        again = 2.0 * line * config.layers * layer_matrices(config, spared) + attention if remat else 0
        layers, chunks = float(side.layers * c), math.ceil(positions / self.chunk)
        moved = (2 + remat) * layers + (3 + remat) * side.activation_bytes(line, c)
        chunks /= self.split  # for a device reads its part of a head for the positions of so many
        # The head is read for logits, and again for gradients, when its own is read and written besides.
        whole, left = divmod(math.ceil(positions / self.tensor / self.chunk), self.group)
        times = chunks * (whole + left) / (whole * self.group + left)
        moved += losses * side.head * (chunks * c + times * (c + 8))
        moved += losses * positions * config.vocab_size * 4 * (_FORWARD_PASSES + _GRADIENT_PASSES)
        if self.request.weighs:
            moved += chunks * side.head * c + positions * config.vocab_size * 4 * _FORWARD_PASSES
        if reads:
            moved += chunks * teacher.head * c + positions * teacher.config.vocab_size * 4 * _FORWARD_PASSES
        # A device's own: layers rounded, gradients written (to be added, two read besides), and the update.
        own = (
            (4 + c) / 4
            + (3 if program == STUDENT[1] else 1)
            + (0 if self.request.micro_batches > 1 else 8 + 2 * self.masters)
        )
        moved += own * self.student_bytes * self.tensor
        # Layers are gathered for either pass, heads once; gradients, heads' in float32, are summed where they are kept.
        layers /= self.tensor
        sent = self._ring(side.width_axes, 3 * layers) + self._all_reduced(side.width_axes, layers)
        sent += self._along_tensor(side, 4 + remat, line)
        if not config.tied:
            sent += self._all_reduced(side.head_axes, side.head * 4)
        sent += self._of_loss(losses)
        flops = 3 * products + attention + backward + again + heads
        return Cost(flops + weighing, 3 * (products + attention) + heads + weighing, moved) + sent

    def _of_loss(self, losses: int) -> Cost:
        """What a device sends in the loss: heads and the student's gradient; or, with the vocabulary split, logits and theirs."""
        side, c, split = self.student, self.itemsize, self.split
        positions = self.request.positions / self.tensor
        sent = self._all_reduced(side.head_axes, side.head * 4, "tensor")
        for model in self.heads:
            gradient = 4 if model is side else 0
            over = [axis for axis in model.head_axes if split == 1 or axis != "tensor"]
            sent += self._ring(over, model.head / split * (c + gradient))
            if split > 1:  # parts of the head change places; hidden states and their gradients, logits and theirs
                shards = math.prod(self.placement.mesh.shape[axis] for axis in over)
                each = model.config.vocab_size * (4 + c * (gradient > 0)) + split * model.config.width * (c + gradient)
                times = losses if model is side else 1
                sent += self._ring(("tensor",), model.head / split / shards * (c + gradient) + times * positions * each)
        return sent

    def _token(self) -> Cost:
        """One token more of each row, half of the slots for completions in use."""
        side, each = self.student, self.each
        config, slots = side.config, self.request.prompt_length + self.args.max_completion_length // 2
        attended = 4.0 * side.queries * slots * config.layers
        flops = each * (2.0 * (config.layers * layer_matrices(config) + side.head) + attended)
        copies = self.placement.kv_repeats(config.heads, config.kv_heads)
        cache = copies * each * slots * 2 * config.layers * config.kv_heads * self._cached_vector
        return Cost(flops, flops, float(self._decoding_weights(None) + cache)) + self._along_tensor(side, 2, each)

    def _ring(self, axes: Iterable[str], size: float) -> Cost:
        """So many bytes gathered, or scattered, over some axes."""
        over = {axis: n for axis, n in self.placement.mesh.shape.items() if axis in axes and n > 1}
        n = math.prod(over.values())
        return Cost(sent={"+".join(over): size * (n - 1) / n} if over else {})

    def _all_reduced(self, axes: tuple[str, ...], size: float, *also: str) -> Cost:
        """The share of a gradient that a device keeps along `axes`, summed over all others that have a part in it."""
        kept = size / math.prod(self.placement.mesh.shape[axis] for axis in axes)
        return self._ring([axis for axis in (*ROW_AXES, *also) if axis not in axes], 2 * kept)

    def _along_tensor(self, side: _Side, times: int, tokens: int) -> Cost:
        """Sums over `tensor` of hidden states, so many in each layer."""
        return self._ring(("tensor",), 2 * times * side.config.layers * tokens * side.config.width * self.itemsize)


def layer_matrices(config: DecoderConfig, without: Iterable[str] = ()) -> int:
    """Entries of the matrices of one layer, which a token meets one by one."""
    table = layer_parameters(config)
    return sum(math.prod(x.shape) for name, x in table.items() if x.init == "matrix" and name not in without)


def attention_product(config: DecoderConfig, rows: list[int], attention: str) -> float:
    """FLOPs of one of attention's two products over all layers, of rows of these lengths.

    "plain" of `models.attention.IMPLEMENTATIONS` computes the pairs that it masks, too.
    """

    def pairs(window: int | None) -> float:
        seen = [(n, n if window is None else min(window, n)) for n in rows]
        return sum(n * n if attention == "plain" else near * n - near * (near - 1) / 2 for n, near in seen)

    sliding = sum(config.sliding)
    every = pairs(None) * (config.layers - sliding) + pairs(config.window) * sliding
    return 2.0 * config.heads * config.head_dim * every
