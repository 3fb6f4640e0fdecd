"""The training objective: which loss over which heads, as a function of parameters and a batch.

The teacher's forward pass is a function of its own, `Objective.teacher_forward`, because no gradient goes through it
and it depends on the teacher's tokens alone: it is compiled for their shapes and no others. Weights in a batch already
hold the normalisation over the whole global batch, so losses and gradients of micro-batches add up.

Shapes: `S` packed sequences of `N` student and `O` teacher tokens; `B` rows, `G` groups; `D` and `E` widths, `V` and `W`
entries of the student's and teacher's vocabularies, `K` matched entries.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gold_jax.bucketing import power_of_two
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.distill import Head, cross_entropy, distill_loss, flatten_positions, order_rows, split_weight
from gold_jax.losses.fused_head import HeadShard
from gold_jax.models.decoder import Decoder
from gold_jax.models.functional import merge
from gold_jax.sharding.axes import AXES
from gold_jax.sharding.collectives import map_shards
from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes
from gold_jax.text.batch import Batch, Side, TokenBatch
from gold_jax.text.packing import PackedBatch
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.teacher import StepConstants, overlap_of


def _hidden(scope: str, model: Decoder, packed: PackedBatch) -> jax.Array:
    """A model's hidden states, `[S, N, D]`, under a scope that tells the models apart in a profile."""
    with jax.named_scope(scope):
        return model.forward_packed(*packed)


class Objective(NamedTuple):
    """What is minimised, in two functions: what no gradient goes through, and what one does.

    Attributes:
        teacher_forward: `(constants, packed) -> hidden states [S, O, E]` of the teacher; None where there is no
            distillation.
        loss: `(params, constants, batch) -> (loss, parts)` of a batch with the teacher's hidden states in it; scalars,
            float32.
    """

    teacher_forward: Callable[[Any, PackedBatch], jax.Array] | None
    loss: Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]

    def __call__(self, params, constants, batch):
        """Loss and parts of a batch of tokens."""
        return self.loss(params, constants, self.with_teacher(constants, batch))

    def with_teacher(self, constants: Any, batch: Any) -> Any:
        """The batch as `loss` takes it."""
        if self.teacher_forward is None:
            return batch
        return with_hidden(batch, self.teacher_forward(constants, batch.teacher.packed))


class TeacherHidden(NamedTuple):
    """The teacher's side of a batch after its forward pass: hidden states `[S, O, E]` in place of the tokens."""

    hidden: jax.Array
    side: Side


def with_hidden(batch: Batch, hidden: jax.Array) -> Batch:
    """The batch with the teacher's hidden states in place of its tokens."""
    return batch._replace(teacher=TeacherHidden(hidden, batch.teacher._replace(packed=None)))


def make_distillation_loss(
    student: nnx.GraphDef, teacher: nnx.GraphDef, spec: LossSpec, vocabulary: VocabularyMap, *, chunk: int
) -> Objective:
    """The loss of a `Batch`: `distillation_weight · distillation + crossentropy_weight · cross-entropy`."""
    compare, overlap = spec.bound(), overlap_of(vocabulary)

    def teacher_forward(constants: StepConstants, packed: PackedBatch):
        frozen = merge(teacher, constants.teacher)
        if frozen.config.tied:
            packed = packed._replace(tokens=constants.teacher_row_of_token[packed.tokens])
        hidden = _hidden("teacher", frozen, packed)
        # The student's program sees few different sizes, though the teacher's packed sequences come in more.
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
        sequences_and_length, order = hidden.shape[:2], constants.student_order
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
                _with_flat_positions(batch.student, *sequences_and_length),
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
                compare=compare,
                overlap=overlap,
                merge=spec.merge,
                chunk=chunk,
            )
            total += spec.distillation_weight * value
        if spec.crossentropy_weight:
            plain = head._replace(temperature=1.0, stop_rows=None)
            labels = batch.labels._replace(position=flatten_positions(batch.labels.position, *sequences_and_length))
            value, more = cross_entropy(hidden, plain, *labels, chunk=chunk)
            total += spec.crossentropy_weight * value
            parts = {**parts, "cross_entropy": value, "token_accuracy": more["correct"]}
        return total, parts

    return Objective(teacher_forward if spec.distillation_weight else None, loss)


def _ordered(head: jax.Array | HeadShard, order: jax.Array, inverse: jax.Array) -> jax.Array | HeadShard:
    return jax.tree.map(lambda x: order_rows(x, order, inverse), head)


def _with_flat_positions(side: Side, sequences: int, length: int) -> Side:
    """A side whose positions number the tokens of all packed sequences of this device, end to end."""
    base, inner = (flatten_positions(x, sequences, length) for x in (side.base, side.inner_position))
    return side._replace(base=base, inner_position=inner)


def _on_mesh(placements: Sequence[Placement | None], compared: Callable, by_rows: Any, heads: tuple, replicated: tuple):
    """`compared(by_rows, heads, replicated)`: sums over positions, of which every device of a mesh computes a part.

    Rows are sharded over `data` and `fsdp`, and the positions of each shard over its `tensor` devices. Heads are
    all-gathered, but only while the loss is computed: a loss has many more positions than a head has columns, so that
    sending the head to the positions is less traffic than exchanging their logits.

    Args:
        placements: of each head.
        by_rows: hidden states `[S, N, D]` and a batch.
        heads: `[V, D]` of either model.
        replicated: what every device has in full, arrays or not.
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


def make_cross_entropy_loss(student: nnx.GraphDef, *, chunk: int) -> Objective:
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

    return Objective(None, loss)
