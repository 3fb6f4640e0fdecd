"""`shard_map` helpers: FSDP all-gather, sharded embedding lookup, per-head attention.

Letters: S lines or rows, N tokens of each, V vocabulary, D width, H heads, K head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gold_jax.parallel.layout import ROW_AXES, Placement, sharded_axes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["stored", "used"])
@dataclasses.dataclass(frozen=True)
class ShardedParam:
    """A layer's parameter as it lies on a mesh. `unshard` casts it to the compute dtype first and all-gathers the smaller copy.

    It is gathered anew wherever it is read: what a backward pass keeps is the device's own part.

    Attributes:
        value: the parameter, or those of all layers stacked.
        stored, used: the shardings of one layer's.
    """

    value: jax.Array
    stored: NamedSharding
    used: NamedSharding

    def unshard(self, dtype) -> jax.Array:
        """The layer's parameter in another dtype, to be multiplied with."""
        return _gathered(jnp.dtype(dtype), self.stored, self.used, self.value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(dtype, stored, used, x):
    # Said twice, or XLA may gather first and round afterwards, which sends twice as much.
    small = jax.lax.with_sharding_constraint(x.astype(dtype), stored)
    return jax.lax.with_sharding_constraint(small, used)


def _gathered_forward(dtype, stored, used, x):
    return _gathered(dtype, stored, used, x), jnp.zeros((), x.dtype)


def _gathered_backward(dtype, stored, used, like, gradient):
    # Every device's rows have a part in it; each device needs the sum of its own part alone.
    return (jax.lax.with_sharding_constraint(gradient, stored).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def map_shards(placement: Placement, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that every device calls with its own parts."""
    return jax.shard_map(function, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def lookup(placement: Placement, table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """`table [V, D]` at `tokens [S, ...]`, `[S, ..., D]` in another dtype, without the table going anywhere.

    A device holds some columns of the table: it looks up what all devices that hold the others want of them, and they
    exchange what they found.
    """
    sharding = placement.param_sharding(table.shape, ("vocab", "embed"))
    axes = sharded_axes(sharding, 1)
    rows = placement.row_axes(tokens.shape[0])
    if rows is None:
        unsharded = jax.lax.with_sharding_constraint(table.astype(dtype), placement.replicated)
        return unsharded[tokens]
    row_axes, other_axes = tuple(a for a in axes if a in ROW_AXES), tuple(a for a in axes if a not in ROW_AXES)

    def local(table, tokens):
        if row_axes:
            tokens = jax.lax.all_gather(tokens, row_axes, axis=0, tiled=True)
        found = table[tokens].astype(dtype)
        if other_axes:
            found = jax.lax.all_gather(found, other_axes, axis=found.ndim - 1, tiled=True)
        if row_axes:
            found = jax.lax.all_to_all(found, row_axes, split_axis=0, concat_axis=found.ndim - 1, tiled=True)
        return found

    return map_shards(placement, local, (sharding.spec, P(rows)), P(rows))(table, tokens)


def attention_per_head(placement: Placement, attend: Callable[..., jax.Array], heads: int, kv_heads: int) -> Callable:
    """Attention in which every device sees its own rows and heads, so that kernels need know nothing of a mesh.

    Args:
        placement: the mesh.
        attend: `attend(by_rows, sliding, query [S, N, H, K], key, value) -> [S, N, H·K]`; the arrays of `by_rows` have
            an axis of rows or lines first.
        heads, kv_heads: how many there are.

    Returns:
        The same function of whole arrays.
    """
    repeats, axis = placement.kv_repeats(heads, kv_heads), placement.head_axis(heads)

    def sharded(by_rows, sliding, query, key, value):
        if repeats > 1:
            key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        rows = placement.row_axes(query.shape[0])
        by_head = P(rows, None, axis)
        specs = (jax.tree.map(lambda _: P(rows), by_rows), P(), by_head, by_head, by_head)
        return map_shards(placement, attend, specs, by_head)(by_rows, sliding, query, key, value)

    return sharded


def cached_attention_per_head(placement: Placement, attend: Callable[..., Any], heads: int, kv_heads: int) -> Callable:
    """As `attention_per_head`, for `attend(query [B, 1, H, K], key, value, allowed, keys, values, slots)`, which writes to a cache."""
    repeats, axis = placement.kv_repeats(heads, kv_heads), placement.head_axis(heads)

    def sharded(query, key, value, allowed, keys, values, slots):
        if repeats > 1:
            key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        rows = placement.row_axes(query.shape[0])
        new, old = P(rows, None, axis), P(rows, axis)
        return map_shards(placement, attend, (new, new, new, P(rows), old, old, P(rows)), (old, old, old))(
            query, key, value, allowed, keys, values, slots
        )

    return sharded
