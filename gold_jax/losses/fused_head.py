"""Output projections applied a chunk of positions at a time, so that no array of all positions × vocabulary exists.

Positions are rows of `hidden`, named by number and fetched a chunk at a time. Loops run over the chunks that hold live
positions alone: packed to the front, padding costs nothing, and shapes stay static. Letters: `N` rows of hidden states,
`P` positions, `C` positions of a chunk, `M` tokens, `D` width, `V` rows of the head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gold_jax.losses.projection import (
    HeadShard,
    VocabularyShard,
    Weight,
    add_gradients,
    head_logits,
    shard_gradient,
    unshard_head,
    vocabulary_first,
    zero_gradient,
)

MOST_CHUNKS, MOST_POSITIONS = 4, 1024  # whose gradients are made in one product
# The scopes of the loop over groups of chunks, and in it of a group's one product, or else of one for each chunk.
CHUNK_GROUPS, GROUP_PRODUCT, CHUNK_PRODUCTS = "chunk_groups", "group_product", "chunk_products"
INNER_TOKENS = "inner_tokens"  # the scope of what only tokens inside of merged groups need


def chunk_size(requested: int | None, platform: str | None = None) -> int:
    """Positions whose logits are in memory at once: `--loss_chunk`, or what runs best on a platform (None: where JAX runs).

    Where a maximum follows the product, as in a softmax, XLA on CPUs copies the head in another order for 128 rows but
    not for 64, and takes three to six times as long. Accelerators read both heads once a chunk, and compute the last
    one whole: with thousands of positions an H200 took up to a tenth less with 512 than with 256
    (`benchmarks/results/h200_chunks.json`, before there were groups of chunks), with hundreds more; it holds twice as
    much. A v5e, which reads a quarter as fast for its products, by its compiler takes a quarter less.
    """
    return requested or {"cpu": 64, "tpu": 512}.get(platform or jax.default_backend(), 256)


def chunk_group(chunk: int, positions: int) -> int:
    """How many chunks, of `chunk` positions of at most `positions`, make their gradients in one product."""
    return max(1, min(MOST_CHUNKS, MOST_POSITIONS // chunk, positions // chunk))


class InnerTokens(NamedTuple):
    """Tokens whose log-probabilities, added up, scale positions; the live ones come first."""

    rows: jax.Array  # [M] the row whose state predicts the token
    columns: jax.Array  # [M] the token's column of the logits
    slots: jax.Array  # [M] which of the positions it belongs to
    live: jax.Array  # [] how many there are


def _pad_to_chunks(positions: Any, live: int | jax.Array, chunk: int, weight: Weight) -> tuple[Any, int | jax.Array]:
    """Pads every `[P, ...]` leaf to whole chunks; returns it with the number of chunks to go through.

    These are the chunks that hold a live position; where devices multiply them with the head together, those of the
    device that has the most.
    """
    size = jax.tree.leaves(positions)[0].shape[0]
    extra = -size % chunk
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), positions)
    count = (live + chunk - 1) // chunk
    if isinstance(weight, VocabularyShard):
        count = jax.lax.pmax(count, jax.sharding.get_abstract_mesh().axis_names)
    return padded, count


def _slice(tree, i, chunk):
    """Chunk `i` of every leaf."""
    start = i * chunk
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), tree)


def gather_rows(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of `hidden [N, D]` by number, `[C, D]`. The numbers must be in range."""
    return hidden.at[rows].get(mode="promise_in_bounds")


def fused_linear_map(
    fn: Callable, chunk: int, hidden: jax.Array, head: Weight, rows: jax.Array, positions: Any, live
) -> jax.Array:
    """`fn(hidden[rows] @ headᵀ [C, V], positions) -> [C]` over chunks of `C` positions. Not differentiable.

    Arguments as `fused_linear_sum`'s, the head as `unshard_head` gives it. The result, float32 `[P]`, is zero beyond the
    live positions.
    """
    size, head = rows.shape[0], unshard_head(head, hidden.dtype)
    padded, count = _pad_to_chunks((rows, positions), live, chunk, head)

    def step(i, out):
        r, p = _slice(padded, i, chunk)
        return jax.lax.dynamic_update_slice_in_dim(out, fn(head_logits(gather_rows(hidden, r), head), p), i * chunk, 0)

    out = jax.lax.fori_loop(0, count, step, jnp.zeros(padded[0].shape[0], jnp.float32))[:size]
    return jnp.where(jnp.arange(size) < live, out, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_linear_sum(
    fn: Callable,  # fn(hidden[rows] @ headᵀ [C, V], scale [C], shared, positions) -> (scalar, {name: scalar})
    token_fn: Callable | None,  # token_fn(logits [C, V], columns [C]) -> log-probabilities [C] of the inner tokens
    chunk: int,  # C
    hidden: jax.Array,  # [N, D], differentiated
    head: jax.Array | HeadShard | None,  # [V, D], differentiated, or a device's part; None: `hidden` are logits
    rows: jax.Array,  # [P] the row of each position, live positions first
    inner: InnerTokens | None,
    shared: Any,  # arrays that every chunk sees whole (not differentiated)
    positions: Any,  # arrays [P, ...] cut along with `rows` (not differentiated)
    live,  # number of live positions, an integer scalar
):
    """Sums `fn` over chunks of positions, and takes the gradient in the same pass.

    The gradient of a scalar is known up to a factor during the forward pass. So each chunk goes forward and backward at
    once, nothing is recomputed, and memory holds the logits of one chunk and the gradients of a few chunks' logits; the
    gradients of hidden states and head are accumulated in place, in float32. `fn` is given the sum of each position's
    inner tokens' log-probabilities as its `scale`: these tokens are gone through before the sum for their values and
    after it for their gradients. Without differentiation only the forward half runs. `fn` must ignore padding positions
    by itself (a weight of zero).

    Returns:
        The sum, and the sums of the parts (not differentiated).
    """
    weight, padded, count = _prepare(token_fn, chunk, hidden, head, rows, inner, positions, live)

    def step(i, total):
        r, x, p = _slice(padded, i, chunk)
        return jax.tree.map(jnp.add, total, fn(head_logits(gather_rows(hidden, r), weight), x, shared, p))

    return jax.lax.fori_loop(0, count, step, _zero_sums(fn, chunk, hidden, weight, shared, padded))


def _prepare(token_fn, chunk, hidden, head, rows, inner, positions, live):
    """The head as it is multiplied with, `(rows, scale, positions)` padded to whole chunks, and how many to go through."""
    weight = unshard_head(head, hidden.dtype)
    scale = inner_logp_sums(token_fn, chunk, hidden, weight, rows, inner)
    return weight, *_pad_to_chunks((rows, scale, positions), live, chunk, weight)


@jax.named_scope(INNER_TOKENS)
def inner_logp_sums(token_fn, chunk, hidden, head, rows, inner: InnerTokens | None) -> jax.Array:
    """The sum of the log-probabilities of each position's inner tokens, `[P]`; arguments as `fused_linear_sum`'s."""
    if inner is None:
        return jnp.zeros(rows.shape[0], jnp.float32)
    logp = fused_linear_map(token_fn, chunk, hidden, head, inner.rows, inner.columns, inner.live)
    return jnp.zeros(rows.shape[0], jnp.float32).at[inner.slots].add(logp)


def _zero_sums(fn, chunk, hidden, head, shared, padded):
    """What `fn` returns, as zeros: the sum before the first chunk."""
    r, x, p = _slice(padded, 0, chunk)
    shapes = jax.eval_shape(lambda: fn(head_logits(gather_rows(hidden, r), head), x, shared, p))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _sum_forward(fn, token_fn, chunk, hidden, head, rows, inner, shared, positions, live):
    weight, padded, count = _prepare(token_fn, chunk, hidden, head, rows, inner, positions, live)

    def step(i, carry):
        total, d_scale = carry
        r, x, p = _slice(padded, i, chunk)
        h = gather_rows(hidden, r)
        value, pullback, parts = jax.vjp(lambda z, x: fn(z, x, shared, p), head_logits(h, weight), x, has_aux=True)
        d_logits, d_x = pullback(jnp.ones_like(value))
        d_scale = jax.lax.dynamic_update_slice_in_dim(d_scale, d_x, i * chunk, 0)
        return (jax.tree.map(jnp.add, total, (value, parts)), d_scale), (d_logits, r, h)

    start = _zero_sums(fn, chunk, hidden, weight, shared, padded), jnp.zeros_like(padded[1])
    gradients = jnp.zeros(hidden.shape, jnp.float32), zero_gradient(weight)
    (total, d_scale), gradients = _add_chunks(step, count, padded[0].shape[0], chunk, start, gradients, weight)
    if inner is not None:
        gradients = _add_inner_gradients(token_fn, chunk, hidden, weight, inner, d_scale, gradients)
    d_hidden, d_head = gradients
    return total, (d_hidden.astype(hidden.dtype), shard_gradient(d_head, head))


def _add_chunks(step: Callable, count, positions: int, chunk: int, carry: Any, gradients: Any, weight: Weight):
    """`step(i, carry) -> (carry, (d_logits, rows, hidden))` for `count` chunks of at most `positions`, and their `gradients`.

    The products for these read the head, and read and write a gradient of its size. So several chunks are multiplied at
    once, where they are there: their `d_logits`, in the head's dtype, take far less memory than their logits and
    distributions would. Where devices split the vocabulary, a chunk already has the positions of all of them.
    """
    group = chunk_group(chunk, positions)
    if not isinstance(weight, jax.Array) or group == 1:

        def one(i, state):
            carry, factors = step(i, state[0])
            return carry, add_gradients(state[1], *factors, weight)

        return jax.lax.fori_loop(0, count, one, (carry, gradients))

    def add(i, gradients, factors):
        # The barrier keeps products in the loop that they are for; with the gradients in it, GPUs would copy the head's.
        _, (d_logits, rows, states) = jax.lax.optimization_barrier((i, factors))
        return add_gradients(gradients, vocabulary_first(d_logits), rows, states, weight)

    def add_group(number, state):
        carry, gradients, factors = state

        def put(i, state):
            carry, factors = state
            carry, new = step(number * group + i, carry)
            place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
            return carry, tuple(place(x, part.astype(x.dtype)) for x, part in zip(factors, new))

        there = jnp.minimum(group, count - number * group)
        carry, factors = jax.lax.fori_loop(0, there, put, (carry, factors))
        whole = (there == group).astype(jnp.int32)
        # Loops of one turn or none, as a conditional would copy the head's gradient on GPUs.
        with jax.named_scope(GROUP_PRODUCT):
            gradients = jax.lax.fori_loop(0, whole, lambda i, old: add(i, old, factors), gradients)
        with jax.named_scope(CHUNK_PRODUCTS):
            one_by_one = lambda i, old: add(i, old, _slice(factors, i, chunk))  # noqa: E731
            gradients = jax.lax.fori_loop(0, there * (1 - whole), one_by_one, gradients)
        return carry, gradients, factors

    (vocabulary, width), size = weight.shape, group * chunk
    factors = (
        jnp.zeros((size, vocabulary), weight.dtype),
        jnp.zeros(size, jnp.int32),
        jnp.zeros((size, width), weight.dtype),
    )
    with jax.named_scope(CHUNK_GROUPS):
        return jax.lax.fori_loop(0, (count + group - 1) // group, add_group, (carry, gradients, factors))[:2]


@jax.named_scope(INNER_TOKENS)
def _add_inner_gradients(token_fn, chunk, hidden, weight, inner: InnerTokens, d_scale, gradients):
    """The gradients with those of the inner tokens' log-probabilities added, each times its position's `d_scale`."""
    live = jnp.arange(inner.rows.shape[0]) < inner.live
    factor = jnp.where(live, d_scale[inner.slots], 0.0)
    padded, count = _pad_to_chunks((inner.rows, inner.columns, factor), inner.live, chunk, weight)

    def step(i, _):
        r, columns, f = _slice(padded, i, chunk)
        h = gather_rows(hidden, r)
        _, pullback = jax.vjp(lambda z: token_fn(z, columns), head_logits(h, weight))
        return None, (pullback(f)[0], r, h)

    return _add_chunks(step, count, padded[0].shape[0], chunk, None, gradients, weight)[1]


def _sum_backward(fn, token_fn, chunk, gradients, cotangent):
    factor = cotangent[0]
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
    return (*scaled, None, None, None, None, None)


fused_linear_sum.defvjp(_sum_forward, _sum_backward)
