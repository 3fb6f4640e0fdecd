"""What the devices of a mesh exchange while a model is computed: FSDP all-gathers, embedding lookups, attention per head.

Letters: B rows, T tokens, V vocabulary, D width, H heads, K head_dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gold_jax.sharding.placement import ROW_AXES, Placement, sharded_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedParam:
    """A layer's parameter as it is stored on a mesh, or those of all layers stacked, with the shardings of one layer's.

    It is all-gathered where it is multiplied with, and again in the backward pass, which keeps only the device's shard.
    """

    value: jax.Array
    param_sharding: NamedSharding = dataclasses.field(metadata={"static": True})  # as it is stored
    compute_sharding: NamedSharding = dataclasses.field(metadata={"static": True})  # while it is multiplied with


def unshard(param: jax.Array | ShardedParam, dtype) -> jax.Array:
    """A parameter in a compute dtype, all-gathered over the width where it is sharded."""
    if isinstance(param, ShardedParam):
        return _all_gather(jnp.dtype(dtype), param.param_sharding, param.compute_sharding, param.value)
    return param.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_gather(dtype, param_sharding, compute_sharding, x):
    # Two constraints, or XLA may gather first and round afterwards, which sends twice as much.
    rounded = jax.lax.with_sharding_constraint(x.astype(dtype), param_sharding)
    return jax.lax.with_sharding_constraint(rounded, compute_sharding)


def _all_gather_forward(dtype, param_sharding, compute_sharding, x):
    return _all_gather(dtype, param_sharding, compute_sharding, x), jnp.zeros((), x.dtype)


def _all_gather_backward(dtype, param_sharding, compute_sharding, like, gradient):
    # A reduce-scatter: every device's rows contribute, and each device needs the sum of its own shard alone.
    return (jax.lax.with_sharding_constraint(gradient, param_sharding).astype(like.dtype),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def map_shards(placement: Placement, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` on the placement's mesh: every device calls the function with its own shards."""
    return jax.shard_map(function, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def embedding_lookup(placement: Placement, table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """`table [V, D]` at `tokens [B, ...]`, `[B, ..., D]` in another dtype, without gathering the table.

    A device looks its columns up for the tokens of all that hold the others, and they exchange these by an all-to-all.
    """
    sharding, row_axes = placement.param_sharding(table.shape, ("vocab", "embed")), placement.row_axes(tokens.shape[0])
    if row_axes is None:
        return jax.lax.with_sharding_constraint(table.astype(dtype), placement.replicated)[tokens]
    axes = sharded_axes(sharding, 1)
    shared, same = (tuple(a for a in axes if (a in ROW_AXES) == rows) for rows in (True, False))

    def local(table, tokens):
        if shared:
            tokens = jax.lax.all_gather(tokens, shared, axis=0, tiled=True)
        found = table[tokens].astype(dtype)
        if same:
            found = jax.lax.all_gather(found, same, axis=found.ndim - 1, tiled=True)
        if shared:
            found = jax.lax.all_to_all(found, shared, split_axis=0, concat_axis=found.ndim - 1, tiled=True)
        return found

    return map_shards(placement, local, (sharding.spec, P(row_axes)), P(row_axes))(table, tokens)


def attention_per_head(placement: Placement, attend: Callable[..., jax.Array], heads: int, kv_heads: int) -> Callable:
    """Attention in which every device computes its own rows and heads, so that kernels need know nothing of a mesh.

    `attend(by_rows, sliding, query [B, T, H, K], key, value) -> [B, T, H·K]`, where `by_rows` are arrays whose first
    axis is that of rows, becomes the same function of sharded arrays.
    """

    def sharded(by_rows, sliding, query, key, value):
        key, value = _repeat_kv(placement, heads, kv_heads, key, value)
        row_axes = placement.row_axes(query.shape[0])
        by_head = P(row_axes, None, placement.head_axis(heads))
        specs = (jax.tree.map(lambda _: P(row_axes), by_rows), P(), by_head, by_head, by_head)
        return map_shards(placement, attend, specs, by_head)(by_rows, sliding, query, key, value)

    return sharded


def cached_attention_per_head(placement: Placement, attend: Callable[..., Any], heads: int, kv_heads: int) -> Callable:
    """As `attention_per_head`, for `attend(query [B, 1, H, K], key, value, allowed, keys, values, slots)`, which writes to a cache."""

    def sharded(query, key, value, allowed, keys, values, slots):
        key, value = _repeat_kv(placement, heads, kv_heads, key, value)
        row_axes, axis = placement.row_axes(query.shape[0]), placement.head_axis(heads)
        new, old, by_row = P(row_axes, None, axis), P(row_axes, axis), P(row_axes)
        specs = (new, new, new, by_row, old, old, by_row)
        return map_shards(placement, attend, specs, (old, old, old))(query, key, value, allowed, keys, values, slots)

    return sharded


def _repeat_kv(placement: Placement, heads: int, kv_heads: int, *kv: jax.Array) -> Sequence[jax.Array]:
    repeats = placement.kv_repeats(heads, kv_heads)
    return kv if repeats == 1 else [jnp.repeat(x, repeats, axis=2) for x in kv]
