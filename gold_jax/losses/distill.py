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
from gold_jax.losses.fused_head import InnerTokens, fused_linear_map, fused_linear_sum, gather_rows, inner_logp_sums
from gold_jax.losses.projection import HeadShard, head_logits, unshard_head


class MergeIndex(Protocol):
    """One side's arrays: where each group's distribution is read, and which further tokens its text has."""

    base: jax.Array  # [B, G] position whose hidden state gives the group its distribution
    token: jax.Array  # [B, G] token of the group's text that this distribution is over
    inner_position: jax.Array  # [B, M] positions that predict further tokens of the text …
    inner_token: jax.Array  # [B, M] … at this token …
    inner_group: jax.Array  # [B, M] … into this group; G where there is none


class Head(NamedTuple):
    """A side's output projection and what is done to its logits."""

    weight: jax.Array | HeadShard | None  # [V, D], or a device's part; None: the hidden states are logits [..., V]
    row_of_token: jax.Array  # [V] row of a token id in `text.vocabulary.VocabularyMap`'s order: matched entries first
    softcap: float | None = None  # a Python float, as the temperature
    temperature: float = 1.0
    prefix_of_unmatched: jax.Array | None = None  # [V - K] `VocabularyMap`'s, needed where a comparison projects
    stop_rows: jax.Array | None = None  # of the stop tokens, whose probabilities the first gets; None: each its own
    column_order: jax.Array | None = None  # [V] the map's, where rows come by token id and logits are put in order


@jax.named_scope("loss")
def order_rows(head: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`head[order]`, whose gradient is a gather too (`order` is a permutation) and not a scatter. `[V, D]` to `[V, D]`."""
    return _permute(0, head, order, inverse)


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


def _cap_and_scale(logits: jax.Array, head: Head) -> jax.Array:
    capped = logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
    return capped / head.temperature


def _scores(logits: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """`scores [C, V]` and `log_scale [C]`, whose sum are the log-probabilities."""
    scores = _cap_and_scale(logits, head)
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True))
    log_scale = -jnp.log(jnp.sum(jnp.exp(scores), -1))
    if head.stop_rows is None:
        return scores, log_scale
    columns = jax.lax.iota(jnp.int32, scores.shape[-1])  # compared, which fuses: scattering columns would not
    stops = jnp.any(columns[:, None] == head.stop_rows, -1)
    together = jax.nn.logsumexp(scores, -1, where=stops, keepdims=True)
    return jnp.where(columns == head.stop_rows[0], together, jnp.where(stops, -jnp.inf, scores)), log_scale


def _log_softmax(logits: jax.Array, head: Head) -> jax.Array:
    scores, log_scale = _scores(logits, head)
    return scores + log_scale[:, None]


def _token_fn(head: Head):
    """Log-probabilities `[C]` of the tokens at `columns [C]` of `logits [C, V]`."""

    def logp(logits, columns):
        logits = _cap_and_scale(logits, head)
        return jnp.take_along_axis(logits, columns[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)

    return logp


class _Columns(NamedTuple):
    """The arrays of a head that say what its columns are; arguments of a chunk, as a closure's would outlive their trace."""

    row_of_token: jax.Array
    stop_rows: jax.Array | None
    column_order: jax.Array | None

    @classmethod
    def of(cls, head: Head) -> "_Columns":
        return cls(head.row_of_token, head.stop_rows, head.column_order)

    def of_values(self, head: Head) -> Head:
        """The head, its numbers and these arrays, without its weight."""
        return Head(None, softcap=head.softcap, temperature=head.temperature, **self._asdict())


def _columns(head: Head, token: jax.Array) -> jax.Array:
    """The columns of the logits, as the head gives them, that belong to token ids."""
    return token if head.column_order is not None else head.row_of_token[token]


def _flat(hidden: jax.Array) -> jax.Array:
    return hidden.reshape(-1, hidden.shape[-1])


def token_logp(hidden: jax.Array, head: Head, position: jax.Array, token: jax.Array, mask: jax.Array, chunk: int):
    """Log-probability `[B, M]` in nats of `token [B, M]` that `position [B, M]` predicts; zero where `mask [B, M]` is false.

    `hidden` is `[..., D]`; `chunk` positions are gone through at once. Not differentiable.
    """
    index, live = compact(mask)
    rows, columns = position.reshape(-1)[index], _columns(head, token).reshape(-1)[index]
    weight = unshard_head(head.weight, hidden.dtype)
    packed = fused_linear_map(_token_fn(head), chunk, _flat(hidden), weight, rows, columns, live)
    return jnp.zeros(mask.size, jnp.float32).at[index].set(packed, unique_indices=True).reshape(mask.shape)


def inner_tokens(head: Head, index: MergeIndex, weight: jax.Array) -> InnerTokens:
    """The inner tokens of the groups that `weight [B, G]` counts (not zero); slots number these groups, packed."""
    groups, counted = weight.shape[1], weight > 0
    slot = (jnp.cumsum(counted.reshape(-1)) - 1).reshape(weight.shape)  # as `compact` numbers them
    there = jnp.minimum(index.inner_group, groups - 1)
    inside = (index.inner_group < groups) & jnp.take_along_axis(counted, there, 1)
    order, live = compact(inside)
    rows, columns = index.inner_position.reshape(-1)[order], _columns(head, index.inner_token).reshape(-1)[order]
    return InnerTokens(rows, columns, jnp.maximum(jnp.take_along_axis(slot, there, 1).reshape(-1)[order], 0), live)


@jax.named_scope("loss")
def distill_loss(
    student_hidden: jax.Array,  # [..., D], or logits [..., V] (see `Head`); differentiated, as its head is
    student_head: Head,
    student_index: MergeIndex,
    teacher_hidden: jax.Array,  # [..., E], or logits [..., W]; a constant, as its head is
    teacher_head: Head,
    teacher_index: MergeIndex,
    weight: jax.Array,  # [B, G] float32, zero where there is no group
    *,
    compare: BoundCompare,  # of one group, such as `losses.compare.COMPARISONS["hybrid"].bind(beta=0.0)`
    overlap: Overlap,
    merge: str = "chain",  # "boundary": inner tokens belong to the group's text alone; else they multiply its distribution
    chunk: int = 256,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Sum over groups of `weight · comparison(student's merged distribution, teacher's)`.

    A weight of one over the number of groups in the whole global batch gives the mean over groups, however the batch is
    split. Only the positions that groups need meet the heads, `chunk` at a time (see `losses.fused_head`).

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
        column = packed(head.row_of_token[merge_index.token])
        return column, packed(_without_inner_tokens(merge_index) | (merge != "boundary"))

    def merged(logits, inner, text, routes, head):
        if head.column_order is not None:
            logits = _permute(1, logits, head.column_order, head.row_of_token)
        (scores, log_scale), (column, single), none = _scores(logits, head), text, jnp.zeros_like(inner)
        if merge == "boundary":
            return GroupDistribution(scores, log_scale, none, column, inner, single, *routes)
        return GroupDistribution(scores, log_scale + inner, -jnp.expm1(inner), column, none, single, *routes)

    def chunk_loss(logits, inner, shared, positions):
        teacher_hidden, teacher_weight, student_routes, teacher_routes, *columns = shared
        own_head, their_head = (x.of_values(head) for x, head in zip(columns, (student_head, teacher_head)))
        rows, student_text, teacher_inner, teacher_text, weight = positions
        student = merged(logits, inner, student_text, student_routes, own_head)
        logits = head_logits(gather_rows(teacher_hidden, rows), teacher_weight)
        teacher = merged(logits, teacher_inner, teacher_text, teacher_routes, their_head)
        loss, parts = compare_groups(compare, student, jax.lax.stop_gradient(teacher), overlap)
        used = weight > 0  # a padding row may hold anything, infinities included
        return jax.tree.map(lambda x: jnp.sum(jnp.where(used, weight * x, 0.0)), (loss, parts))

    inner, token_fn = inner_tokens(teacher_head, teacher_index, weight), _token_fn(teacher_head)
    teacher_inner = inner_logp_sums(token_fn, chunk, teacher_hidden, teacher_weight, index, inner)
    rows, inner = packed(student_index.base), inner_tokens(student_head, student_index, weight)
    heads = student_head, teacher_head
    shared = teacher_hidden, teacher_weight, *(_prefix_routes(x, overlap) for x in heads), *map(_Columns.of, heads)
    base, student_text = packed(teacher_index.base), text(student_head, student_index)
    positions = base, student_text, teacher_inner, text(teacher_head, teacher_index), packed(weight)
    head, token_fn = student_head.weight, _token_fn(student_head)
    return fused_linear_sum(chunk_loss, token_fn, chunk, student_hidden, head, rows, inner, shared, positions, live)


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
    """Sum of `weight · −log p(label)` in nats over the positions whose `weight [B, T]` float32 is not zero.

    `position [B, T]` predicts `labels [B, T]`; `hidden [..., D]` and the head are differentiated. With it comes
    `{"correct": …}`, the weighted share of positions at which the label is the likeliest.
    """
    index, live = compact(weight > 0)

    def chunk_loss(logits, _scale, shared, positions):
        columns, weight = positions
        logp = _log_softmax(logits, shared.of_values(head))
        label_logp = jnp.take_along_axis(logp, columns[:, None], -1)[:, 0]
        used = weight > 0
        correct = jnp.where(used & (jnp.max(logp, -1) <= label_logp), weight, 0.0)
        return jnp.sum(jnp.where(used, -weight * label_logp, 0.0)), {"correct": jnp.sum(correct)}

    positions = _columns(head, jnp.maximum(labels, 0)).reshape(-1)[index], weight.reshape(-1)[index]
    rows = position.reshape(-1)[index]
    shared = _Columns.of(head)
    return fused_linear_sum(chunk_loss, None, chunk, _flat(hidden), head.weight, rows, None, shared, positions, live)
