"""The distillation loss: two models' hidden states and the merge-index arrays of `text.batch`, to one number.

Letters: `B` rows, `N` and `O` student and teacher tokens of a whole batch, `G` groups, `M` tokens inside merged groups,
`D` and `E` widths, `V` and `W` rows of the heads, `K` matched entries. Positions number hidden states in the order in
which they come, whatever axes they have before the last.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gold_jax.losses.compare import BoundCompare, GroupDistribution, Overlap, compare_groups, event_siblings
from gold_jax.losses.fused_head import (
    HeadShard,
    InnerTokens,
    fused_linear_map,
    fused_linear_sum,
    gather_rows,
    head_logits,
    unshard_head,
)


class MergeIndex(Protocol):
    """One side's arrays: where each group's distribution is read, and which further tokens its text has."""

    base: jax.Array  # [B, G] position whose hidden state gives the group its distribution
    token: jax.Array  # [B, G] token of the group's text that this distribution is over
    inner_position: jax.Array  # [B, M] positions that predict further tokens of the text …
    inner_token: jax.Array  # [B, M] … at this token …
    inner_group: jax.Array  # [B, M] … into this group; G where there is none


class Head(NamedTuple):
    """A side's output projection and what is done to its logits.

    `weight` is `[V, D]`, or a device's part of that; `row_of_token [V]` gives the row of a token id in the order that
    `text.vocabulary.VocabularyMap` says (matched entries first). Rows are in that order, or in the order of token ids
    where `column_order [V]`, the map's, is given: then logits are put in order a chunk at a time. Without `weight` the
    hidden states are logits `[..., V]`. `softcap` and `temperature` are Python floats. `prefix_of_unmatched [V - K]` is
    `VocabularyMap`'s, needed where a comparison projects. `stop_rows` are the rows of the model's stop tokens, the one
    that it writes first: their probabilities are added up there; None leaves every one by itself.
    """

    weight: jax.Array | HeadShard | None
    row_of_token: jax.Array
    softcap: float | None = None
    temperature: float = 1.0
    prefix_of_unmatched: jax.Array | None = None
    stop_rows: jax.Array | None = None
    column_order: jax.Array | None = None


@jax.named_scope("loss")
def order_rows(head: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`head[order]`, whose gradient is a gather too (`order` is a permutation) and not a scatter. `[V, D]` to `[V, D]`."""
    return _permute(0, head, order, inverse)


def _in_column_order(logits: jax.Array, head: Head) -> jax.Array:
    """Logits with their columns in the head's order, where its rows are not in it already."""
    return logits if head.column_order is None else _permute(1, logits, head.column_order, head.row_of_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(axis, x, order, inverse):
    return jnp.take(x, order, axis=axis, mode="clip")


_permute.defvjp(
    lambda axis, x, order, inverse: (_permute(axis, x, order, inverse), inverse),
    lambda axis, inverse, cotangent: (jnp.take(cotangent, inverse, axis=axis, mode="clip"), None, None),
)


def flatten_positions(position: jax.Array, sequences: int, length: int) -> jax.Array:
    """Positions `[B, M]` in the packed sequence (of `length` tokens) of each row, as positions in all sequences end to end."""
    first = jnp.arange(len(position)) // (len(position) // sequences) * length
    return position + first[:, None].astype(position.dtype)


def split_weight(weight: jax.Array, parts: int, part: jax.Array) -> jax.Array:
    """Weights `[B, G]` of which every `parts`-th that counts is kept, from number `part` on; the others are zero."""
    number = (jnp.cumsum(weight.reshape(-1) > 0) - 1).reshape(weight.shape)
    return jnp.where(number % parts == part, weight, 0.0)


def compact(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices `[N]` into the flattened mask, true entries first and in order, and how many they are."""
    flat = mask.reshape(-1)
    return jnp.argsort(~flat, stable=True), jnp.sum(flat)


def _cap_and_scale(logits: jax.Array, softcap: float | None, temperature: float) -> jax.Array:
    capped = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return capped / temperature


def _log_softmax(logits: jax.Array, head: Head) -> jax.Array:
    logp = jax.nn.log_softmax(_cap_and_scale(logits, head.softcap, head.temperature), -1)
    if head.stop_rows is None:
        return logp
    together = jax.nn.logsumexp(logp[:, head.stop_rows], -1)
    return logp.at[:, head.stop_rows].set(-jnp.inf).at[:, head.stop_rows[0]].set(together)


def _token_logp(logits, columns, softcap, temperature):
    logits = _cap_and_scale(logits, softcap, temperature)
    return jnp.take_along_axis(logits, columns[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)


def _token_fn(head: Head):
    return functools.partial(_token_logp, softcap=head.softcap, temperature=head.temperature)


def _columns(head: Head, token: jax.Array) -> jax.Array:
    """The columns of the logits, as the head gives them, that belong to token ids."""
    return token if head.column_order is not None else head.row_of_token[token]


def _flat(hidden: jax.Array) -> jax.Array:
    return hidden.reshape(-1, hidden.shape[-1])


def token_logp(hidden: jax.Array, head: Head, position: jax.Array, token: jax.Array, mask: jax.Array, chunk: int):
    """Log-probability of given tokens at given positions. Not differentiable.

    Args:
        hidden: `[..., D]`.
        head: the side's head.
        position: `[B, M]` the position whose state predicts the token.
        token: `[B, M]` token ids.
        mask: `[B, M]` which of them count.
        chunk: positions per chunk.

    Returns:
        `[B, M]` in nats, zero where the mask is false.
    """
    index, live = compact(mask)
    rows, columns = position.reshape(-1)[index], _columns(head, token).reshape(-1)[index]
    weight = unshard_head(head.weight, hidden.dtype)
    packed = fused_linear_map(_token_fn(head), chunk, _flat(hidden), weight, rows, columns, live)
    return jnp.zeros(mask.size, jnp.float32).at[index].set(packed, unique_indices=True).reshape(mask.shape)


def inner_tokens(head: Head, index: MergeIndex, weight: jax.Array) -> InnerTokens:
    """The inner tokens of the groups that `weight [B, G]` counts, for `losses.fused_head`; slots number its groups packed.

    Args:
        head: the side's head.
        index: the side's merge-index arrays.
        weight: `[B, G]`, zero where a group does not count.
    """
    groups, counted = weight.shape[1], weight > 0
    slot = (jnp.cumsum(counted.reshape(-1)) - 1).reshape(weight.shape)  # as `compact` numbers them
    there = jnp.minimum(index.inner_group, groups - 1)
    inside = (index.inner_group < groups) & jnp.take_along_axis(counted, there, 1)
    order, live = compact(inside)
    return InnerTokens(
        index.inner_position.reshape(-1)[order],
        _columns(head, index.inner_token).reshape(-1)[order],
        jnp.maximum(jnp.take_along_axis(slot, there, 1).reshape(-1)[order], 0),
        live,
    )


@jax.named_scope("loss")
def distill_loss(
    student_hidden: jax.Array,
    student_head: Head,
    student_index: MergeIndex,
    teacher_hidden: jax.Array,
    teacher_head: Head,
    teacher_index: MergeIndex,
    weight: jax.Array,
    *,
    compare: BoundCompare,
    overlap: Overlap,
    merge: str = "chain",
    chunk: int = 256,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Sum over groups of `weight · comparison(student's merged distribution, teacher's)`.

    Only the positions that groups need meet the heads, `chunk` at a time (see `losses.fused_head`).

    Args:
        student_hidden: `[..., D]`, `N` of them, or logits `[..., V]` (see `Head`); differentiated.
        student_head: `[V, D]` ordered, differentiated.
        student_index: the student's merge-index arrays.
        teacher_hidden: `[..., E]`, `O` of them, a constant.
        teacher_head: `[W, E]` ordered, a constant.
        teacher_index: the teacher's merge-index arrays.
        weight: `[B, G]` float32, zero where there is no group. One over the number of groups in the whole global batch
            gives the mean over groups, however the batch is split.
        compare: `fn(student, teacher, overlap) -> (loss, parts)` of one group, such as
            `losses.compare.COMPARISONS["hybrid"].bind(beta=0.0)`.
        overlap: what the two vocabularies have in common.
        merge: what becomes of the inner tokens' probabilities: under "boundary" they belong to the group's text alone,
            otherwise they multiply its distribution.
        chunk: positions per chunk.

    Returns:
        The loss `[]` in nats (for `sorted`, probability), and its parts `[]` weighted alike.
    """
    student_hidden, teacher_hidden = _flat(student_hidden), _flat(teacher_hidden)
    teacher_hidden, teacher_weight = jax.lax.stop_gradient((teacher_hidden, teacher_head.weight))
    teacher_weight = unshard_head(teacher_weight, teacher_hidden.dtype)
    index, live = compact(weight > 0)

    def packed(x):
        return x.reshape(-1)[index]

    def text(head, merge_index):
        return packed(head.row_of_token[merge_index.token]), packed(
            _without_inner_tokens(merge_index) | (merge != "boundary")
        )

    def merged(logits, inner, text, routes, head):
        logp, (token_column, is_single_token) = _log_softmax(_in_column_order(logits, head), head), text
        if merge == "boundary":
            return GroupDistribution(logp, jnp.zeros_like(inner), token_column, inner, is_single_token, *routes)
        return GroupDistribution(
            logp + inner[:, None], -jnp.expm1(inner), token_column, jnp.zeros_like(inner), is_single_token, *routes
        )

    def chunk_loss(logits, inner, shared, positions):
        teacher_hidden, teacher_weight, student_routes, teacher_routes = shared
        rows, student_text, teacher_inner, teacher_text, weight = positions
        student = merged(logits, inner, student_text, student_routes, student_head)
        logits = head_logits(gather_rows(teacher_hidden, rows), teacher_weight)
        teacher = merged(logits, teacher_inner, teacher_text, teacher_routes, teacher_head)
        loss, parts = compare_groups(compare, student, jax.lax.stop_gradient(teacher), overlap)
        used = weight > 0  # a padding row may hold anything, infinities included
        return jax.tree.map(lambda x: jnp.sum(jnp.where(used, weight * x, 0.0)), (loss, parts))

    teacher_tokens = inner_tokens(teacher_head, teacher_index, weight)
    teacher_logp = fused_linear_map(
        _token_fn(teacher_head),
        chunk,
        teacher_hidden,
        teacher_weight,
        teacher_tokens.rows,
        teacher_tokens.columns,
        teacher_tokens.live,
    )
    teacher_inner = jnp.zeros(index.shape[0], jnp.float32).at[teacher_tokens.slots].add(teacher_logp)
    return fused_linear_sum(
        chunk_loss,
        _token_fn(student_head),
        chunk,
        student_hidden,
        student_head.weight,
        packed(student_index.base),
        inner_tokens(student_head, student_index, weight),
        (teacher_hidden, teacher_weight, _prefix_routes(student_head, overlap), _prefix_routes(teacher_head, overlap)),
        (
            packed(teacher_index.base),
            text(student_head, student_index),
            teacher_inner,
            text(teacher_head, teacher_index),
            packed(weight),
        ),
        live,
    )


def _without_inner_tokens(index: MergeIndex) -> jax.Array:
    """Bool `[B, G]`: the groups that have no inner token."""
    groups = index.base.shape[1]
    counts = jax.vmap(lambda group: jnp.zeros(groups + 1, jnp.int32).at[group].add(1))(index.inner_group)
    return counts[:, :groups] == 0


def _prefix_routes(head: Head, overlap: Overlap) -> tuple[jax.Array, jax.Array]:
    """`prefix_column [V - K]` (nowhere, if the head does not say) and `event_siblings [V]` of `GroupDistribution`."""
    size, prefix = head.row_of_token.shape[0], head.prefix_of_unmatched
    if prefix is None:
        prefix = jnp.full(size - overlap.matched, overlap.matched, jnp.int32)
    return prefix, event_siblings(prefix, size)


@jax.named_scope("loss")
def cross_entropy(
    hidden: jax.Array, head: Head, position: jax.Array, labels: jax.Array, weight: jax.Array, *, chunk: int = 256
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Sum of `weight · −log p(label)` over the positions whose weight is not zero.

    Args:
        hidden: `[..., D]`, differentiated.
        head: `[V, D]`, differentiated.
        position: `[B, T]` the positions that predict.
        labels: `[B, T]` the token after each.
        weight: `[B, T]` float32, zero where nothing is predicted.
        chunk: positions per chunk.

    Returns:
        The loss in nats, and `{"correct": …}`: the weighted share of positions at which the label is the likeliest.
    """
    index, live = compact(weight > 0)

    def chunk_loss(logits, _scale, _shared, positions):
        columns, weight = positions
        logp = _log_softmax(logits, head)
        label_logp = jnp.take_along_axis(logp, columns[:, None], -1)[:, 0]
        used = weight > 0
        correct = jnp.where(used & (jnp.max(logp, -1) <= label_logp), weight, 0.0)
        return jnp.sum(jnp.where(used, -weight * label_logp, 0.0)), {"correct": jnp.sum(correct)}

    positions = _columns(head, jnp.maximum(labels, 0)).reshape(-1)[index], weight.reshape(-1)[index]
    rows = position.reshape(-1)[index]
    return fused_linear_sum(chunk_loss, None, chunk, _flat(hidden), head.weight, rows, None, (), positions, live)
