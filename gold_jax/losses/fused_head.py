"""Output projections applied a chunk of positions at a time, so that no array of all positions × vocabulary exists.

Positions are rows of `hidden`, named by number and fetched a chunk at a time. Loops run over the chunks that hold live
positions alone: packed to the front, padding costs nothing, and shapes stay static. Letters: `N` rows of hidden states,
`P` positions, `C` positions of a chunk, `M` tokens, `D` width, `V` rows of the head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

GRADIENT_BLOCK_ROWS = 8192  # of a head's gradient, on CPUs
INNER_TOKENS = "inner_tokens"  # the scope of what only tokens inside of merged groups need


def chunk_size(requested: int | None, platform: str | None = None) -> int:
    """Positions whose logits are in memory at once: `--loss_chunk`, or what runs best on a platform (None: where JAX runs).

    Where a maximum follows the product, as in a softmax, XLA on CPUs copies the head in another order for 128 rows but
    not for 64, and takes three to six times as long. Accelerators read the head and its gradient once a chunk, and
    compute the last one whole: with thousands of positions an H200 takes up to a tenth less with 512 than with 256
    (`benchmarks/results/h200_chunks.json`), with hundreds more; it holds twice as much. A v5e, which reads a quarter as
    fast for its products, by its compiler takes a quarter less.
    """
    return requested or {"cpu": 64, "tpu": 512}.get(platform or jax.default_backend(), 256)


class InnerTokens(NamedTuple):
    """Tokens whose log-probabilities, added up, scale positions; the live ones come first."""

    rows: jax.Array  # [M] the row whose state predicts the token
    columns: jax.Array  # [M] the token's column of the logits
    slots: jax.Array  # [M] which of the positions it belongs to
    live: jax.Array  # [] how many there are


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shard"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class HeadShard:
    """The columns of a head that a device holds, where every device of a mesh sums over positions of its own."""

    shard: jax.Array  # [V, D / devices]
    axes: tuple[str, ...]  # the mesh axes over which the columns are cut, the outermost first


def unshard_head(head: jax.Array | HeadShard | None, dtype) -> jax.Array | None:
    """A head `[V, D]` in the dtype that it is multiplied in; None where there is none."""
    if isinstance(head, HeadShard):
        return jax.lax.all_gather(head.shard.astype(dtype), head.axes, axis=1, tiled=True)
    return None if head is None else head.astype(dtype)


def head_logits(hidden: jax.Array, head: jax.Array | None) -> jax.Array:
    """`hidden [..., D] · head [V, D]ᵀ`, accumulated in float32: float32 `[..., V]`. Without a head, `hidden` are logits."""
    if head is None:
        return hidden.astype(jnp.float32)
    logits = _multiply("...d,vd->...v", hidden, head.astype(hidden.dtype))
    return jax.lax.platform_dependent(logits, tpu=_vocabulary_first, default=lambda logits: logits)


def _vocabulary_first(logits: jax.Array) -> jax.Array:
    """`[..., V]` as it is, laid out with the vocabulary outermost: a column is a row in memory then.

    TPUs scatter, gather and sort rows, and XLA would otherwise transpose for each such operation and back.
    """
    last = logits.ndim - 1
    return with_layout_constraint(logits, Layout(major_to_minor=(last, *range(last))))


def _multiply(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32. Float32 factors are multiplied as such: GPUs and TPUs would round them first."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, subscripts, precision=precision, preferred_element_type=jnp.float32)
    if a.dtype == jnp.float32:
        return product(a, b)
    # XLA's CPU compiler has no such product of two bfloat16 matrices in every layout; widened, the result is the same.
    widened = functools.partial(jnp.einsum, subscripts, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: widened(a.astype(jnp.float32), b.astype(jnp.float32)), default=product
    )


def _pad_to_chunks(positions: Any, live: int | jax.Array, chunk: int) -> tuple[Any, int | jax.Array]:
    """Pads every `[P, ...]` leaf to whole chunks; returns it with the number of chunks that hold a live position."""
    size = jax.tree.leaves(positions)[0].shape[0]
    extra = -size % chunk
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), positions)
    return padded, (live + chunk - 1) // chunk


def _slice(tree, i, chunk):
    """Chunk `i` of every leaf."""
    start = i * chunk
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), tree)


def gather_rows(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of `hidden [N, D]` by number, `[C, D]`. The numbers must be in range."""
    return hidden.at[rows].get(mode="promise_in_bounds")


def fused_linear_map(
    fn: Callable, chunk: int, hidden: jax.Array, head: jax.Array | None, rows: jax.Array, positions: Any, live
) -> jax.Array:
    """`fn(hidden[rows] @ headᵀ [C, V], positions) -> [C]` over chunks of `C` positions. Not differentiable.

    Arguments as `fused_linear_sum`'s, the head whole. The result, float32 `[P]`, is zero beyond the live positions.
    """
    size, head = rows.shape[0], None if head is None else head.astype(hidden.dtype)
    padded, count = _pad_to_chunks((rows, positions), live, chunk)

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
    head: jax.Array | None,  # [V, D], differentiated, a device's part of it, or None where `hidden` are logits
    rows: jax.Array,  # [P] the row of each position, live positions first
    inner: InnerTokens | None,
    shared: Any,  # arrays that every chunk sees whole (not differentiated)
    positions: Any,  # arrays [P, ...] cut along with `rows` (not differentiated)
    live,  # number of live positions, an integer scalar
):
    """Sums `fn` over chunks of positions, and takes the gradient in the same pass.

    The gradient of a scalar is known up to a factor during the forward pass. So each chunk goes forward and backward at
    once, nothing is recomputed, and memory holds the logits of one chunk; the gradients of hidden states and head are
    accumulated in place, in float32. `fn` is given the sum of each position's inner tokens' log-probabilities as its
    `scale`: these tokens are gone through before the sum for their values and after it for their gradients. Without
    differentiation only the forward half runs. `fn` must ignore padding positions by itself (a weight of zero).

    Returns:
        The sum, and the sums of the parts (not differentiated).
    """
    weight, padded, count = _prepare(token_fn, chunk, hidden, head, rows, inner, positions, live)

    def step(i, total):
        r, x, p = _slice(padded, i, chunk)
        return jax.tree.map(jnp.add, total, fn(head_logits(gather_rows(hidden, r), weight), x, shared, p))

    return jax.lax.fori_loop(0, count, step, _zero_sums(fn, chunk, hidden, weight, shared, padded))


def _prepare(token_fn, chunk, hidden, head, rows, inner, positions, live):
    """The head whole, `(rows, scale, positions)` padded to whole chunks, and how many of these hold a live position."""
    weight = unshard_head(head, hidden.dtype)
    scale = inner_logp_sums(token_fn, chunk, hidden, weight, rows, inner)
    return weight, *_pad_to_chunks((rows, scale, positions), live, chunk)


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
        total, gradients, d_scale = carry
        r, x, p = _slice(padded, i, chunk)
        h = gather_rows(hidden, r)
        value, pullback, parts = jax.vjp(lambda z, x: fn(z, x, shared, p), head_logits(h, weight), x, has_aux=True)
        d_logits, d_x = pullback(jnp.ones_like(value))
        d_scale = jax.lax.dynamic_update_slice_in_dim(d_scale, d_x, i * chunk, 0)
        total = jax.tree.map(jnp.add, total, (value, parts))
        return total, _accumulate_gradients(gradients, d_logits, r, h, weight), d_scale

    zeros = jnp.zeros(hidden.shape, jnp.float32), None if weight is None else jnp.zeros(weight.shape, jnp.float32)
    start = _zero_sums(fn, chunk, hidden, weight, shared, padded), zeros, jnp.zeros_like(padded[1])
    total, gradients, d_scale = jax.lax.fori_loop(0, count, step, start)
    if inner is not None:
        gradients = _add_inner_gradients(token_fn, chunk, hidden, weight, inner, d_scale, gradients)
    d_hidden, d_head = gradients
    if isinstance(head, HeadShard):
        shard = jax.lax.psum_scatter(d_head, head.axes, scatter_dimension=1, tiled=True)
        d_head = HeadShard(shard, head.axes)
    d_head = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, head)  # nothing where there is no head
    return total, (d_hidden.astype(hidden.dtype), d_head)


def _accumulate_gradients(gradients, d_logits: jax.Array, rows: jax.Array, hidden: jax.Array, weight: jax.Array | None):
    """Gradients of hidden states and head with those of one chunk added; without a head the logits' own is the first."""
    d_hidden, d_head = gradients
    if weight is not None:
        d_logits = d_logits.astype(hidden.dtype)
        d_head = _add_product(d_head, d_logits, hidden)
        d_logits = _multiply("cv,vd->cd", d_logits, weight)
    return d_hidden.at[rows].add(d_logits, mode="promise_in_bounds"), d_head


def _add_product(total: jax.Array, d_logits: jax.Array, hidden: jax.Array) -> jax.Array:
    """`total [V, D] + d_logits [C, V]ᵀ · hidden [C, D]`, in place: the full product is never in memory.

    Accelerators multiply and add in one kernel; CPUs would write the product first, so that they go by blocks of rows.
    """
    return jax.lax.platform_dependent(total, d_logits, hidden, cpu=_add_product_by_blocks, default=_add_whole_product)


def _add_whole_product(total, d_logits, hidden):
    return total + _multiply("cv,cd->vd", d_logits, hidden)


def _add_product_by_blocks(total, d_logits, hidden):
    def add(total, start, size):
        product = _multiply("cv,cd->vd", jax.lax.dynamic_slice_in_dim(d_logits, start, size, 1), hidden)
        block = jax.lax.dynamic_slice_in_dim(total, start, size, 0) + product
        return jax.lax.dynamic_update_slice_in_dim(total, block, start, 0)

    rows = GRADIENT_BLOCK_ROWS
    blocks, rest = divmod(total.shape[0], rows)
    if blocks:
        total = jax.lax.fori_loop(0, blocks, lambda i, total: add(total, i * rows, rows), total)
    return add(total, blocks * rows, rest) if rest else total


@jax.named_scope(INNER_TOKENS)
def _add_inner_gradients(token_fn, chunk, hidden, weight, inner: InnerTokens, d_scale, gradients):
    """The gradients with those of the inner tokens' log-probabilities added, each times its position's `d_scale`."""
    live = jnp.arange(inner.rows.shape[0]) < inner.live
    factor = jnp.where(live, d_scale[inner.slots], 0.0)
    padded, count = _pad_to_chunks((inner.rows, inner.columns, factor), inner.live, chunk)

    def step(i, gradients):
        r, columns, f = _slice(padded, i, chunk)
        h = gather_rows(hidden, r)
        _, pullback = jax.vjp(lambda z: token_fn(z, columns), head_logits(h, weight))
        return _accumulate_gradients(gradients, pullback(f)[0], r, h, weight)

    return jax.lax.fori_loop(0, count, step, gradients)


def _sum_backward(fn, token_fn, chunk, gradients, cotangent):
    factor = cotangent[0]
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)
    return (*scaled, None, None, None, None, None)


fused_linear_sum.defvjp(_sum_forward, _sum_backward)
