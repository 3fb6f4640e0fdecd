"""What devices of a mesh send each other so that a model can be computed: parts of weights, tokens, nothing else.

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

from gold_jax.parallel.layout import ROWS, Placement, axes_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["stored", "used"])
@dataclasses.dataclass(frozen=True)
class Spread:
    """A layer's parameter as it lies on a mesh. `astype` brings it into the compute dtype and, so small, to where it is used.

    It is gathered anew wherever it is read: what a backward pass keeps is the device's own part.

    Attributes:
      value: the parameter, or those of all layers stacked.
      stored, used: the shardings of one layer's.
    """

    value: jax.Array
    stored: NamedSharding
    used: NamedSharding

    def astype(self, dtype) -> jax.Array:
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


def over_rows(placement: Placement, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that every device calls with its own parts."""
    return jax.shard_map(function, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def lookup(placement: Placement, table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """`table [V, D]` at `tokens [S, ...]`, `[S, ..., D]` in another dtype, without the table going anywhere.

    A device holds some columns of the table: it looks up what all devices that hold the others want of them, and they
    exchange what they found.
    """
    sharding = placement.stored(table.shape, ("vocab", "embed"))
    axes = axes_of(sharding, 1)
    rows = placement.rows(tokens.shape[0])
    if rows is None:
        whole = jax.lax.with_sharding_constraint(table.astype(dtype), placement.everywhere)
        return whole[tokens]
    shared, same = tuple(a for a in axes if a in ROWS), tuple(a for a in axes if a not in ROWS)

    def local(table, tokens):
        if shared:
            tokens = jax.lax.all_gather(tokens, shared, axis=0, tiled=True)
        found = table[tokens].astype(dtype)
        if same:
            found = jax.lax.all_gather(found, same, axis=found.ndim - 1, tiled=True)
        if shared:
            found = jax.lax.all_to_all(found, shared, split_axis=0, concat_axis=found.ndim - 1, tiled=True)
        return found

    return over_rows(placement, local, (sharding.spec, P(rows)), P(rows))(table, tokens)


def over_heads(placement: Placement, attend: Callable[..., jax.Array], heads: int, kv_heads: int) -> Callable:
    """Attention in which every device sees its own rows and heads, so that kernels need know nothing of a mesh.

    Args:
      placement: the mesh.
      attend: `attend(by_rows, sliding, query [S, N, H, K], key, value) -> [S, N, H·K]`; the arrays of `by_rows` have an axis
        of rows or lines first.
      heads, kv_heads: how many there are.

    Returns:
      The same function of whole arrays.
    """
    copies, axis = placement.kv_copies(heads, kv_heads), placement.heads(heads)

    def spread(by_rows, sliding, query, key, value):
        if copies > 1:
            key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
        rows = placement.rows(query.shape[0])
        by_head = P(rows, None, axis)
        specs = (jax.tree.map(lambda _: P(rows), by_rows), P(), by_head, by_head, by_head)
        return over_rows(placement, attend, specs, by_head)(by_rows, sliding, query, key, value)

    return spread


def over_cache(placement: Placement, attend: Callable[..., Any], heads: int, kv_heads: int) -> Callable:
    """As `over_heads`, for `attend(query [B, 1, H, K], key, value, allowed, keys, values, slots)`, which writes to a cache."""
    copies, axis = placement.kv_copies(heads, kv_heads), placement.heads(heads)

    def spread(query, key, value, allowed, keys, values, slots):
        if copies > 1:
            key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
        rows = placement.rows(query.shape[0])
        new, old = P(rows, None, axis), P(rows, axis)
        return over_rows(placement, attend, (new, new, new, P(rows), old, old, P(rows)), (old, old, old))(
            query, key, value, allowed, keys, values, slots
        )

    return spread
