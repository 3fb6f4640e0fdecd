"""An output projection on one device or on a mesh: logits of positions, and gradients of hidden states and head.

On a mesh a head is stored sharded along its width, and every device computes the logits of positions of its own. Either it
all-gathers the head; or the devices of one mesh axis split the vocabulary (`HeadShard.split_over`): each multiplies the
positions of all of them with its rows of the head, and an all-to-all gives each the logits of its own positions.

Letters: `N` rows of hidden states, `C` positions, `D` width, `V` rows of the head, `T` devices that split it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

GRADIENT_BLOCK_ROWS = 8192  # of a head's gradient, on CPUs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shard"], meta_fields=["axes", "split_over"])
@dataclasses.dataclass(frozen=True)
class HeadShard:
    """The columns of a head that a device holds, where every device of a mesh sums over positions of its own."""

    shard: jax.Array  # [V, D / devices]
    axes: tuple[str, ...]  # the mesh axes over which the columns are cut, the outermost first
    split_over: str | None = None  # the last of them, where its devices split the vocabulary; None: heads are gathered


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["axis", "vocabulary"])
@dataclasses.dataclass(frozen=True)
class VocabularyShard:
    """A device's part of a head whose vocabulary is split over a mesh axis: all columns of its rows."""

    rows: jax.Array  # [ceil(V / T), D]; the last of them are zeros where `T` does not divide `V`
    axis: str
    vocabulary: int  # V


Weight = jax.Array | VocabularyShard | None  # what logits are made with; None: they are given in place of hidden states


def unshard_head(head: HeadShard | Weight, dtype) -> Weight:
    """The head that `head_logits` takes, in the dtype given: whole `[V, D]`, or a device's rows; None where there is none."""
    if not isinstance(head, HeadShard):
        return jax.tree.map(lambda x: x.astype(dtype), head)
    shard, axes = head.shard.astype(dtype), head.axes
    if head.split_over is None:
        return jax.lax.all_gather(shard, axes, axis=1, tiled=True)
    *outer, axis = axes
    devices = jax.lax.axis_size(axis)
    padded = jnp.pad(shard, [(0, -len(shard) % devices), (0, 0)])
    rows = jax.lax.all_to_all(padded, axis, split_axis=0, concat_axis=1, tiled=True)
    rows = jax.lax.all_gather(rows, tuple(outer), axis=1, tiled=True) if outer else rows
    return VocabularyShard(rows, axis, len(shard))


def zero_gradient(weight: Weight) -> jax.Array | None:
    """Zeros that a head's gradient is added to, float32 and of the shape of what a device multiplies with."""
    rows = weight.rows if isinstance(weight, VocabularyShard) else weight
    return None if rows is None else jnp.zeros(rows.shape, jnp.float32)


def shard_gradient(gradient: jax.Array | None, head: jax.Array | HeadShard | None):
    """The gradient of `add_gradients`, float32 `[V, D]` or a device's rows: summed over devices, like the head `head`."""
    if isinstance(head, HeadShard):
        *outer, axis = head.axes
        if head.split_over is None:
            shard = jax.lax.psum_scatter(gradient, head.axes, scatter_dimension=1, tiled=True)
        else:
            shard = jax.lax.psum_scatter(gradient, tuple(outer), scatter_dimension=1, tiled=True) if outer else gradient
            shard = jax.lax.all_to_all(shard, axis, split_axis=1, concat_axis=0, tiled=True)[: len(head.shard)]
        return dataclasses.replace(head, shard=shard.astype(head.shard.dtype))
    return None if head is None or gradient is None else gradient.astype(head.dtype)


def head_logits(hidden: jax.Array, head: Weight) -> jax.Array:
    """`hidden [C, D] · head [V, D]ᵀ`, accumulated in float32: float32 `[C, V]`. Without a head, `hidden` are logits.

    All devices that split a head's vocabulary have to call it together, each with `C` positions of its own.
    """
    if head is None:
        return hidden.astype(jnp.float32)
    if isinstance(head, VocabularyShard):
        logits = _multiply("cd,vd->cv", _of_all(hidden, head.axis), head.rows.astype(hidden.dtype))
        logits = jax.lax.all_to_all(logits, head.axis, split_axis=0, concat_axis=1, tiled=True)[:, : head.vocabulary]
    else:
        logits = _multiply("...d,vd->...v", hidden, head.astype(hidden.dtype))
    return vocabulary_first(logits)


def add_gradients(gradients, d_logits: jax.Array, rows: jax.Array, hidden: jax.Array, weight: Weight):
    """`gradients`, of all hidden states `[N, D]` and of the head, with those of `C` positions added.

    Args:
        gradients: float32 arrays, the second as `zero_gradient`.
        d_logits: `[C, V]`, the gradient of the positions' logits; without a head that of `hidden`, which are logits.
        rows: `[C]`, the positions' rows of the `N`.
        hidden: `[C, D]`, their states.
        weight: what the logits were made with.
    """
    d_hidden, d_head = gradients
    if weight is None:
        return _add_rows(d_hidden, rows, d_logits), d_head
    d_logits = d_logits.astype(hidden.dtype)
    if not isinstance(weight, VocabularyShard):
        d_head = _add_product(d_head, d_logits, hidden)
        return _add_rows(d_hidden, rows, _multiply("cv,vd->cd", d_logits, weight)), d_head
    extra = weight.rows.shape[0] * jax.lax.axis_size(weight.axis) - weight.vocabulary
    d_logits = jnp.pad(d_logits, [(0, 0), (0, extra)])
    d_logits = jax.lax.all_to_all(d_logits, weight.axis, split_axis=1, concat_axis=0, tiled=True)
    d_head = _add_product(d_head, d_logits, _of_all(hidden, weight.axis))
    ours = jax.lax.psum_scatter(
        _multiply("cv,vd->cd", d_logits, weight.rows), weight.axis, scatter_dimension=0, tiled=True
    )
    return _add_rows(d_hidden, rows, ours), d_head


def _of_all(hidden: jax.Array, axis: str) -> jax.Array:
    """All-gathers `[C, D]` along a mesh axis: `[T · C, D]`."""
    return jax.lax.all_gather(hidden, axis, axis=0, tiled=True)


def _add_rows(total: jax.Array, rows: jax.Array, x: jax.Array) -> jax.Array:
    return total.at[rows].add(x, mode="promise_in_bounds")


def _add_product(total: jax.Array, d_logits: jax.Array, hidden: jax.Array) -> jax.Array:
    """`total [V, D] + d_logits [C, V]ᵀ · hidden [C, D]`, in place: the full product is never in memory.

    Accelerators multiply and add in one kernel; CPUs would write the product first, so there it goes by blocks of rows.
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


def vocabulary_first(logits: jax.Array) -> jax.Array:
    """The same logits `[..., V]`, on TPUs laid out with the vocabulary outermost, so that a column is contiguous in memory.

    TPUs scatter, gather and sort rows; XLA would otherwise transpose before and after each such operation.
    """
    layout = Layout(major_to_minor=(logits.ndim - 1, *range(logits.ndim - 1)))
    on_tpus = lambda logits: with_layout_constraint(logits, layout)  # noqa: E731
    return jax.lax.platform_dependent(logits, tpu=on_tpus, default=lambda logits: logits)


def _multiply(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32. Float32 factors take the highest precision: GPUs and TPUs would round them first."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, subscripts, precision=precision, preferred_element_type=jnp.float32)
    if a.dtype == jnp.float32:
        return product(a, b)
    # XLA's CPU compiler has no such product of two bfloat16 matrices in every layout; widened, the result is the same.
    widened = functools.partial(jnp.einsum, subscripts, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: widened(a.astype(jnp.float32), b.astype(jnp.float32)), default=product
    )
