"""The training objective: which loss over which heads, as a function of parameters and a batch.

Weights in a batch hold the normalisation over the whole global batch, so losses and gradients of micro-batches add up.

Shapes: `S` packed sequences of `N` student and `O` teacher tokens; `B` rows, `G` groups; `D` and `E` widths, `V` and `W`
entries of the student's and teacher's vocabularies, `K` matched entries.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gold_jax.bucketing import power_of_two
from gold_jax.cpu import sorts_on_host
from gold_jax.loss_spec import LossSpec
from gold_jax.losses.compare import Overlap
from gold_jax.losses.distill import (
    Head,
    cross_entropy,
    distill_loss,
    flatten_positions,
    order_rows,
    split_weight,
    token_logp,
)
from gold_jax.losses.importance import ImportanceSampling, log_weights, truncated
from gold_jax.losses.projection import HeadShard
from gold_jax.models.functional import merge
from gold_jax.sharding.axes import AXES
from gold_jax.sharding.collectives import map_shards
from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes
from gold_jax.text.batch import Batch, Labels, Side, TokenBatch
from gold_jax.text.packing import PackedBatch
from gold_jax.text.vocabulary import VocabularyMap
from gold_jax.training.teacher import StepConstants, overlap_of


class Objective(NamedTuple):
    """What is minimised, in two functions: what no gradient goes through, and what one does.

    `loss(params, constants, batch, text=None) -> (loss, parts)`, float32 scalars, takes a batch with the teacher's hidden
    states in it. `text` `[B, T]` marks labels whose negative log-likelihoods are added up as `text_nll`.
    """

    # `(constants, packed) -> hidden states [S, O, E]` of the teacher, compiled for its tokens' shapes and no others;
    # None where there is no distillation.
    teacher_forward: Callable[[Any, PackedBatch], jax.Array] | None
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]

    def __call__(self, params, constants, batch):
        """Loss and parts of a batch of tokens."""
        return self.loss(params, constants, self.with_teacher(constants, batch))

    def with_teacher(self, constants: Any, batch: Any) -> Any:
        """The batch as `loss` takes it."""
        if self.teacher_forward is None:
            return batch
        return with_hidden(batch, self.teacher_forward(constants, batch.teacher.packed))


def with_hidden(batch: Batch, hidden: jax.Array) -> Batch:
    """The batch with the teacher's hidden states `[S, O, E]` in place of its packed tokens."""
    return batch._replace(teacher=batch.teacher._replace(packed=hidden))


def make_distillation_loss(
    student: nnx.GraphDef,
    teacher: nnx.GraphDef,
    spec: LossSpec,
    vocabulary: VocabularyMap,
    *,
    chunk: int,
    importance: ImportanceSampling | None = None,
) -> Objective:
    """The loss of a `Batch`: `distillation_weight · distillation + crossentropy_weight · cross-entropy`.

    `importance` says how terms are weighted where a batch tells what its rows were drawn with (`Batch.behavior`). The same
    arguments give the same functions, so that `Step` finds its programs again.
    """
    overlap, host_sorts = overlap_of(vocabulary), sorts_on_host()  # what the process says now
    return _distillation_loss(student, teacher, spec, overlap, chunk, importance, host_sorts)


@functools.lru_cache(maxsize=8)
def _distillation_loss(
    student: nnx.GraphDef,
    teacher: nnx.GraphDef,
    spec: LossSpec,
    overlap: Overlap,
    chunk: int,
    importance: ImportanceSampling | None,
    host_sorts: bool,
) -> Objective:
    options = dict(compare=spec.bound(), overlap=overlap, merge=spec.merge, chunk=chunk)

    def loss(params, constants: StepConstants, batch: Batch, text: jax.Array | None = None):
        model, frozen = merge(student, params), merge(teacher, constants.teacher)
        with jax.named_scope("student"):
            hidden = model.forward_packed(*batch.student.packed)
        batch = batch._replace(student=batch.student._replace(packed=None))
        heads = model.head_weight(), constants.teacher_head
        replicated = constants._replace(teacher=None, teacher_head=None)
        placements = model.placement, frozen.placement
        others = model.config, frozen.config, model.placement is not None and model.placement.tensor_size > 1
        return _on_mesh(placements, compared, (hidden, batch, text), heads, (replicated, *others))

    def compared(by_rows, heads, replicated):
        (hidden, batch, text), (weight, teacher_weight), (c, config, teacher_config, is_split) = (
            by_rows,
            heads,
            replicated,
        )
        order, row_of_token = c.student_order, c.student_row_of_token
        # Order the smaller: the head, or all its logits.
        if order is not None and batch.weight.size > hidden.shape[-1]:
            weight, order = jax.tree.map(lambda x: order_rows(x, c.student_order, row_of_token), weight), None
        prefixes, stops = c.student_prefix_of_unmatched, c.student_stops
        head = Head(weight, row_of_token, config.final_softcap, spec.student_temperature, prefixes, stops, order)
        total, parts, weighted = jnp.float32(0), {}, {}
        if batch.behavior is not None:
            of_groups = bool(spec.distillation_weight)
            batch, weighted = _importance_weighted(hidden, head, batch, importance, chunk, is_split, of_groups)
        if spec.distillation_weight:
            teacher_hidden = batch.teacher.packed  # `with_hidden`
            sides = _flat(batch.student, hidden), _flat(batch.teacher, teacher_hidden)
            softcap, prefixes = teacher_config.final_softcap, c.teacher_prefix_of_unmatched
            scaled = softcap, spec.teacher_temperature
            teacher_head = Head(teacher_weight, c.teacher_row_of_token, *scaled, prefixes, c.teacher_stops)
            theirs = teacher_hidden, teacher_head, sides[1]
            value, parts = distill_loss(hidden, head, sides[0], *theirs, batch.weight, **options)
            total += spec.distillation_weight * value
        plain = head._replace(temperature=1.0, stop_rows=None)
        if spec.crossentropy_weight:
            value, more = _cross_entropy(hidden, plain, batch.labels, chunk)
            total += spec.crossentropy_weight * value
            parts = {**parts, "cross_entropy": value, **more}
        return total, parts | weighted | _text_nll(hidden, plain, batch.labels, text, chunk)

    return Objective(_teacher_forward(teacher) if spec.distillation_weight else None, loss)


@functools.lru_cache(maxsize=8)
def _teacher_forward(teacher: nnx.GraphDef) -> Callable[[StepConstants, PackedBatch], jax.Array]:
    """`Objective.teacher_forward`, which is the same for all losses."""

    def teacher_forward(constants: StepConstants, packed: PackedBatch):
        frozen = merge(teacher, constants.teacher)
        if frozen.config.tied:
            packed = packed._replace(tokens=constants.teacher_row_of_token[packed.tokens])
        with jax.named_scope("teacher"):
            hidden = frozen.forward_packed(*packed)
        # The student's program sees few different sizes, though the teacher's packed sequences come in more.
        extra = power_of_two(hidden.shape[1]) - hidden.shape[1]
        return jnp.pad(hidden, [(0, 0), (0, extra), (0, 0)])

    return teacher_forward


@functools.lru_cache(maxsize=8)
def make_cross_entropy_loss(student: nnx.GraphDef, *, chunk: int) -> Objective:
    """The loss of a `TokenBatch`: the mean cross-entropy over its targets. One function for the same arguments."""

    def loss(params, _constants, batch: TokenBatch, text: jax.Array | None = None):
        model = merge(student, params)
        with jax.named_scope("student"):
            hidden = model.forward_packed(*batch.packed)
        by_rows = hidden, batch._replace(packed=None), text
        return _on_mesh((model.placement,), compared, by_rows, (model.head_weight(),), ((), model.config))

    def compared(by_rows, heads, replicated):
        (hidden, batch, text), (weight,), (_, config) = by_rows, heads, replicated
        head = Head(weight, jnp.arange(config.vocab_size), config.final_softcap)
        value, parts = _cross_entropy(hidden, head, batch.labels, chunk)
        return value, parts | _text_nll(hidden, head, batch.labels, text, chunk)

    return Objective(None, loss)


@jax.named_scope("loss")
def _importance_weighted(
    hidden: jax.Array,
    head: Head,
    batch: Batch,
    importance: ImportanceSampling,
    chunk: int,
    is_split: bool,
    of_groups: bool,
) -> tuple[Batch, dict[str, jax.Array]]:
    """The batch with its weights times importance weights, and what is logged of these: means over all that counts.

    `is_split`: each device along `tensor` has a part of the positions. `of_groups`: the means are of groups, else of labels.
    No gradient goes through the weights.
    """
    labels, (then, last) = batch.labels, batch.behavior
    constant, weight = jax.lax.stop_gradient((hidden, head.weight))
    head = head._replace(weight=weight, temperature=importance.temperature, stop_rows=None)
    position, token = flatten_positions(labels.position, *hidden.shape[:2]), jnp.maximum(labels.token, 0)
    now = token_logp(constant, head, position, token, ~jnp.isnan(then), chunk)
    log_ratio = jnp.where(jnp.isnan(then), 0.0, now - then)
    if is_split:  # products run along whole rows
        log_ratio = jax.lax.psum(log_ratio, "tensor")
    groups, own = log_weights(log_ratio, last)
    of_group, of_label = (truncated(x, importance.cap) for x in (groups, own))
    counted, weight, log_weight = (batch.weight, of_group, groups) if of_groups else (labels.weight, of_label, own)
    cap = jnp.inf if importance.cap is None else importance.cap
    parts = {
        "importance_sampling_ratio": jnp.sum(counted * weight),
        "importance_sampling_truncated": jnp.sum(jnp.where(jnp.exp(log_weight) > cap, counted, 0.0)),
        "importance_sampling_logp_difference": jnp.sum(labels.weight * jnp.abs(log_ratio)),
    }
    labels = labels._replace(weight=labels.weight * of_label)
    return batch._replace(weight=batch.weight * of_group, labels=labels), parts


def _cross_entropy(hidden: jax.Array, head: Head, labels: Labels, chunk: int):
    position = flatten_positions(labels.position, *hidden.shape[:2])
    value, more = cross_entropy(hidden, head, position, labels.token, labels.weight, chunk=chunk)
    return value, {"token_accuracy": more["correct"]}


def _text_nll(hidden: jax.Array, head: Head, labels: Labels, text: jax.Array | None, chunk: int):
    if text is None:
        return {}
    return {"text_nll": _cross_entropy(hidden, head, labels._replace(weight=text), chunk)[0]}


def _flat(side: Side, hidden: jax.Array) -> Side:
    """A side whose positions number the tokens of all packed sequences of this device, end to end."""
    base, inner = (flatten_positions(x, *hidden.shape[:2]) for x in (side.base, side.inner_position))
    return side._replace(packed=None, base=base, inner_position=inner)


def _on_mesh(placements: Sequence[Placement | None], compared: Callable, by_rows: Any, heads: tuple, replicated: tuple):
    """`compared(by_rows, heads, replicated)`: sums over positions, of which every device of a mesh computes a part.

    Positions of each shard of rows are sharded over its `tensor` devices. While the loss is computed, these either hold
    whole heads, or split the vocabulary and exchange logits (`splits_vocabulary`).

    `by_rows` are hidden states `[S, N, D]`, a batch, and which of its labels are text; `heads` `[V, D]` with their
    `placements`; `replicated` is what every device has in full, arrays or not.
    """
    if (placement := placements[0]) is None:
        return compared(by_rows, heads, replicated)
    cuts = [p.param_sharding(head.shape, ("vocab", "embed")) for p, head in zip(placements, heads)]
    columns = [sharded_axes(cut, 1) for cut in cuts]
    sequences, length, width = by_rows[0].shape
    split = splits_vocabulary(sequences * length // placement.row_shards, width, placement.tensor_size, columns)
    arrays, *others = replicated

    def shard(head: jax.Array, axes: tuple[str, ...]):
        return HeadShard(head, axes, "tensor" if split else None) if axes else head

    def local(by_rows, heads, arrays):
        heads = tuple(map(shard, heads, columns))
        if placement.tensor_size > 1:
            by_rows = _split_weights(*by_rows, placement.tensor_size, jax.lax.axis_index("tensor"))
        return jax.tree.map(lambda x: x[None], compared(by_rows, heads, (arrays, *others)))

    specs = P(ROW_AXES), tuple(cut.spec for cut in cuts), P()
    found = map_shards(placement, local, specs, P(AXES))(by_rows, heads, arrays)
    return jax.tree.map(jnp.sum, found)


def splits_vocabulary(tokens: int, width: int, tensor_size: int, columns: Sequence[tuple[str, ...]]) -> bool:
    """Whether the `tensor` devices of a shard of rows, of so many `tokens`, split the heads' vocabularies in the loss.

    Then none holds a whole head or its float32 gradient. A device sends the logits of its positions and their gradient,
    where it would receive the heads and send the student's gradient: as many bytes where it has as many positions as
    the head has columns, `width`. `columns`: the mesh axes that cut the columns of each head.
    """
    cut = all(axes[-1:] == ("tensor",) for axes in columns)
    return tensor_size > 1 and cut and tokens // tensor_size <= width


def _split_weights(hidden, batch: Batch | TokenBatch, text, parts: int, part: jax.Array):
    """What is given by rows, with the weights of one part of its positions alone."""
    batch = batch._replace(labels=batch.labels._replace(weight=split_weight(batch.labels.weight, parts, part)))
    if isinstance(batch, Batch):
        batch = batch._replace(weight=split_weight(batch.weight, parts, part))
        if batch.behavior is not None:
            then = batch.behavior.logp
            here = split_weight(jnp.where(jnp.isnan(then), 0.0, 1.0), parts, part) > 0
            batch = batch._replace(behavior=batch.behavior._replace(logp=jnp.where(here, then, jnp.nan)))
    return hidden, batch, None if text is None else split_weight(text, parts, part)
