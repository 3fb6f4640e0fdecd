"""The training step: losses composed with models, gradients summed over micro-batches, one optimizer update.

A loss here is `fn(params, constants, batch) -> (loss, parts)`; weights in the batch already hold the normalisation over
the whole global batch, so gradients of micro-batches simply add up.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from gold_jax.bucketing import power_of_two
from gold_jax.host_memory import release_freed_memory
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.distill import Head, cross_entropy, distill_loss, flatten_positions, order_rows, split_weight
from gold_jax.losses.fused_head import HeadShard
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.parallel.exchange import map_shards
from gold_jax.parallel.layout import ROW_AXES, Placement, sharded_axes
from gold_jax.sharding.axes import AXES
from gold_jax.text.batch import Batch, Side, TokenBatch
from gold_jax.text.packing import PackedBatch
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.teacher import StepConstants, compare_options


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """Where an optimizer's state lies: what it keeps for a parameter where that lies, all else everywhere.

    Args:
        optimizer: the transformation.
        params: the parameters, or their shapes.
        shardings: theirs, of one mesh.
    """
    replicated = jax.sharding.NamedSharding(jax.tree.leaves(shardings)[0].mesh, P())
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer, lambda _, where: where, state, shardings, transform_non_params=lambda _: replicated
    )


def _hidden(scope: str, model: Decoder, packed: PackedBatch) -> jax.Array:
    """A model's hidden states, `[S, N, D]`, under a scope that tells the models apart in a profile."""
    with jax.named_scope(scope):
        return model.forward_packed(*packed)


class LossFn(NamedTuple):
    """A loss in two programs: what no gradient goes through, and what one does.

    Attributes:
        read: `read(constants, lines) -> hidden states [S, O, E]` of the teacher; None where there is none. It sees the
            teacher's lines alone, so that it is compiled for their shapes and no others.
        loss: `loss(params, constants, batch) -> (loss, parts)` of a batch that the teacher has read.
    """

    read: Callable[[Any, PackedBatch], jax.Array] | None
    loss: Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]

    def __call__(self, params, constants, batch):
        """Both, one after the other."""
        return self.loss(params, constants, self.with_teacher(constants, batch))

    def with_teacher(self, constants: Any, batch: Any) -> Any:
        """The batch as `loss` takes it."""
        return batch if self.read is None else with_hidden(batch, self.read(constants, batch.teacher.packed))


class TeacherHidden(NamedTuple):
    """The teacher's side of a batch once the teacher has read it: hidden states `[S, O, E]` in place of the tokens."""

    hidden: jax.Array
    side: Side


def with_hidden(batch: Batch, hidden: jax.Array) -> Batch:
    """The batch with the teacher's hidden states in place of its tokens."""
    return batch._replace(teacher=TeacherHidden(hidden, batch.teacher._replace(packed=None)))


def make_distillation_loss(
    student: nnx.GraphDef, teacher: nnx.GraphDef, spec: LossSpec, vocabulary: VocabularyMap, *, chunk: int
) -> LossFn:
    """The loss of a `Batch`: `distillation_weight · distillation + crossentropy_weight · cross-entropy`."""
    options = compare_options(spec, vocabulary)

    def read(constants: StepConstants, packed: PackedBatch):
        frozen = merge(teacher, constants.teacher)
        if frozen.config.tied:
            packed = packed._replace(tokens=constants.teacher_row_of_token[packed.tokens])
        hidden = _hidden("teacher", frozen, packed)
        # The student's program sees few different sizes, though the teacher's lines come in more.
        extra = power_of_two(hidden.shape[1]) - hidden.shape[1]
        return jnp.pad(hidden, [(0, 0), (0, extra), (0, 0)])

    def loss(params, constants: StepConstants, batch: Batch):
        model, frozen = merge(student, params), merge(teacher, constants.teacher)
        hidden = _hidden("student", model, batch.student.packed)
        batch = batch._replace(student=batch.student._replace(packed=None))
        heads = model.head_weight(), constants.teacher_head
        replicated = constants._replace(teacher=None, teacher_head=None)
        placements = model.placement, frozen.placement
        return _on_mesh(placements, compared, (hidden, batch), heads, (replicated, model.config, frozen.config))

    def compared(by_rows, heads, replicated):
        (hidden, batch), (weight, teacher_weight), (constants, config, teacher_config) = by_rows, heads, replicated
        packed, order = hidden.shape[:2], constants.student_order
        # Order the smaller: the head, or all its logits.
        if order is not None and batch.weight.size > hidden.shape[-1]:
            weight, order = _ordered(weight, order, constants.student_row_of_token), None
        head = Head(
            weight,
            constants.student_row_of_token,
            config.final_softcap,
            spec.student_temperature,
            constants.student_prefix_of_unmatched,
            constants.student_stops,
            order,
        )
        total, parts = jnp.float32(0), {}
        if spec.distillation_weight:
            value, parts = distill_loss(
                hidden,
                head,
                _with_flat_positions(batch.student, *packed),
                batch.teacher.hidden,
                Head(
                    teacher_weight,
                    constants.teacher_row_of_token,
                    teacher_config.final_softcap,
                    spec.teacher_temperature,
                    constants.teacher_prefix_of_unmatched,
                    constants.teacher_stops,
                ),
                _with_flat_positions(batch.teacher.side, *batch.teacher.hidden.shape[:2]),
                batch.weight,
                compare=spec.compare,
                options=options,
                merge=spec.merge,
                chunk=chunk,
            )
            total += spec.distillation_weight * value
        if spec.crossentropy_weight:
            plain = head._replace(temperature=1.0, stop_rows=None)
            labels = batch.labels._replace(position=flatten_positions(batch.labels.position, *packed))
            value, more = cross_entropy(hidden, plain, *labels, chunk=chunk)
            total += spec.crossentropy_weight * value
            parts = {**parts, "cross_entropy": value, "token_accuracy": more["correct"]}
        return total, parts

    return LossFn(read if spec.distillation_weight else None, loss)


def _ordered(head: jax.Array | HeadShard, order: jax.Array, inverse: jax.Array) -> jax.Array | HeadShard:
    return jax.tree.map(lambda x: order_rows(x, order, inverse), head)


def _with_flat_positions(side: Side, packed: int, length: int) -> Side:
    """A side whose positions number the tokens of all lines that are here."""
    base, inner = (flatten_positions(x, packed, length) for x in (side.base, side.inner_position))
    return side._replace(base=base, inner_position=inner)


def _on_mesh(placements: Sequence[Placement | None], compared: Callable, by_rows: Any, heads: tuple, replicated: tuple):
    """`compared(by_rows, heads, replicated)`, sums over positions, which every device of a mesh finds for positions of its own.

    Rows are shared out to `data` and `fsdp`, and what their positions are compared on to the `tensor` devices of each.
    A device sees heads whole, but only while it compares: a loss has many more positions than a head has columns, so
    that it is less to send the head to the positions than their logits to each other.

    Args:
        placements: of each head.
        by_rows: hidden states `[S, N, D]` and a batch.
        heads: `[V, D]` of either model.
        replicated: what every device sees whole, arrays or not.
    """
    if placements[0] is None:
        return compared(by_rows, heads, replicated)
    placement = placements[0]
    cuts = [p.param_sharding(head.shape, ("vocab", "embed")) for p, head in zip(placements, heads)]
    arrays, *others = replicated

    def local(by_rows, heads, arrays):
        heads = tuple(HeadShard(x, sharded_axes(cut, 1)) if sharded_axes(cut, 1) else x for x, cut in zip(heads, cuts))
        if placement.tensor_size > 1:
            by_rows = by_rows[0], _split_weights(by_rows[1], placement.tensor_size, jax.lax.axis_index("tensor"))
        return jax.tree.map(lambda x: x[None], compared(by_rows, heads, (arrays, *others)))

    specs = P(ROW_AXES), tuple(cut.spec for cut in cuts), P()
    found = map_shards(placement, local, specs, P(AXES))(by_rows, heads, arrays)
    return jax.tree.map(jnp.sum, found)


def _split_weights(batch: Batch | TokenBatch, parts: int, part: jax.Array):
    """A batch whose weights are kept for one part of its positions."""
    labels = batch.labels._replace(weight=split_weight(batch.labels.weight, parts, part))
    if isinstance(batch, TokenBatch):
        return batch._replace(labels=labels)
    return batch._replace(labels=labels, weight=split_weight(batch.weight, parts, part))


def make_cross_entropy_loss(student: nnx.GraphDef, *, chunk: int) -> LossFn:
    """The loss of a `TokenBatch`: the mean cross-entropy over its targets."""

    def loss(params, _constants, batch: TokenBatch):
        model = merge(student, params)
        hidden, heads = _hidden("student", model, batch.packed), (model.head_weight(),)
        by_rows = hidden, batch._replace(packed=None)
        return _on_mesh((model.placement,), compared, by_rows, heads, ((), model.config))

    def compared(by_rows, heads, replicated):
        (hidden, batch), (weight,), (_, config) = by_rows, heads, replicated
        head = Head(weight, jnp.arange(config.vocab_size), config.final_softcap)
        labels = batch.labels._replace(position=flatten_positions(batch.labels.position, *hidden.shape[:2]))
        value, parts = cross_entropy(hidden, head, *labels, chunk=chunk)
        return value, {"token_accuracy": parts["correct"]}

    return LossFn(None, loss)


class TrainState(NamedTuple):
    """Parameters (float32) and the optimizer's state; both are donated to every step."""

    params: Any
    optimizer: Any


class Program:
    """A jitted function that is compiled for new shapes before it runs, not while it does.

    Compiling leaves some hundred MB behind on the host, which go back in between: a program's first run needs no more
    memory than any other.
    """

    def __init__(self, function: Callable, donate: Sequence[int] = ()):
        self._jitted = jax.jit(function, donate_argnums=donate)
        self._seen: set = set()

    def __call__(self, *args):
        """Calls the function."""
        leaves, structure = jax.tree.flatten(args)
        shapes = structure, tuple((x.shape, x.dtype) for x in leaves)
        if shapes not in self._seen:
            self._seen.add(shapes)
            self._jitted.lower(*args).compile()  # JAX finds it again when the function is called
            release_freed_memory()
        return self._jitted(*args)

    def lower(self, *args):
        """The function lowered for arguments, or for their shapes: to compile it ahead, perhaps for devices elsewhere."""
        return self._jitted.lower(*args)

    @property
    def compiled(self) -> int:
        """For how many different arguments it has been compiled."""
        return self._jitted._cache_size()


class Step:
    """The jitted functions of a run: `train` over a window of micro-batches, `evaluate` for a loss alone.

    Attributes:
        loss: what is minimised.
        programs: the jitted functions by name.
        compiled: how many different shapes have been compiled so far.
    """

    def __init__(
        self,
        loss: LossFn,
        optimizer: optax.GradientTransformation | None,
        shardings: TrainState | None = None,
        device_put: Callable[[Any], Any] | None = None,
    ):
        """Compiles nothing yet.

        Args:
            loss: what is minimised.
            optimizer: what is done with gradients.
            shardings: where parameters (and so gradients) and the optimizer's state lie on a mesh; None: one device.
            device_put: puts a batch of host arrays on the mesh; None: leaves it on the host.
        """
        self._place = device_put

        def settled(tree, where):
            return tree if shardings is None else jax.lax.with_sharding_constraint(tree, where)

        def gradient(params, constants, batch):
            metrics, grads = jax.value_and_grad(loss.loss, has_aux=True)(params, constants, batch)
            return metrics, settled(grads, shardings and shardings.params)

        @jax.named_scope("optimizer")
        def update(params, state, grads, loss):
            norm = optax.global_norm(grads)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)

            def take(params, state, grads):
                updates, state = optimizer.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            # One branch or the other, in place: to choose afterwards, old and new state would have to be held side by side.
            params, state = jax.lax.cond(finite, take, lambda params, state, _: (params, state), params, state, grads)
            if shardings is not None:
                params, state = settled((params, state), (shardings.params, shardings.optimizer))
            return params, state, {"grad_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}

        def fused(params, state, constants, batch):
            metrics, grads = gradient(params, constants, batch)
            params, state, done = update(params, state, grads, metrics[0])
            return params, state, metrics, done

        def first(params, constants, batch):
            return gradient(params, constants, batch)

        def add(params, grads, metrics, constants, batch):
            more, new = gradient(params, constants, batch)
            return jax.tree.map(jnp.add, metrics, more), jax.tree.map(jnp.add, grads, new)

        self.loss = loss
        self.programs = {
            "fused": Program(fused, donate=(0, 1)),
            "first": Program(first),
            "add": Program(add, donate=(1, 2)),
            "update": Program(update, donate=(0, 1)),
            "evaluate": Program(loss.loss),
        }
        if loss.read is not None:
            self.programs["read"] = Program(loss.read)

    @property
    def compiled(self) -> int:
        """Number of compiled programs so far."""
        return sum(program.compiled for program in self.programs.values())

    def _read(self, constants: Any, batch: Any) -> Any:
        """A batch on the mesh that the teacher, where there is one, has read."""
        batch = batch if self._place is None else self._place(batch)
        if "read" not in self.programs:
            return batch
        return with_hidden(batch, self.programs["read"](constants, batch.teacher.packed))

    def train(self, state: TrainState, constants: Any, batches: list) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update from the micro-batches of a window; returns at once, with metrics that are still being computed.

        The state given is donated. Where loss or gradients are not finite, `skipped` is 1 and the new state holds what
        it held.
        """
        run = self.programs
        head = self._read(constants, batches[0])
        if len(batches) == 1:
            *state, metrics, done = run["fused"](*state, constants, head)
        else:
            metrics, grads = run["first"](state.params, constants, head)
            del head  # with what the teacher made of it
            for batch in batches[1:]:
                metrics, grads = run["add"](state.params, grads, metrics, constants, self._read(constants, batch))
            *state, done = run["update"](*state, grads, metrics[0])
        loss, parts = metrics
        return TrainState(*state), {"loss": loss, **done, **parts}

    def evaluate(self, params: Any, constants: Any, batch: Any) -> dict[str, jax.Array]:
        """Loss and parts of one batch, no gradient."""
        loss, parts = self.programs["evaluate"](params, constants, self._read(constants, batch))
        return {"loss": loss, **parts}
