"""Attention by a running softmax over blocks of queries and keys, in plain JAX, with a gradient of its own.

Nothing of the size [T, T] is ever held: the forward pass keeps the output and each query's log-sum of exponentials, the
backward pass computes the scores again from them (FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2).
Blocks that causality or the window leave empty are not visited.

Shapes: B rows, T tokens, H = N · G heads, N key-value heads, K head_dim; blocks of P queries and P keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Far below any score, yet finite: what may not be seen. Softmax over such alone is even, not NaN.
HIDDEN = -1e30


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap · tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def block_size(length: int, most: int, *, multiple: int = 1) -> int:
    """The size of even blocks that hold `length` with the least padding: at most `most`, a multiple of `multiple`."""
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


def blockwise(query, key, value, mask, window, softcap, scale, *, block: int = 128) -> jax.Array:
    """Causal attention of tokens to those before them.

    Args:
        query: [B, T, H, K]; key, value: [B, T, N, K]; mask: bool [B, T], where there is a token.
        window: how many tokens a query sees, its own included, or None for all; softcap: cap on scores, or None.
        scale: factor on scores.
        block: most queries and keys in a step.

    Returns:
        [B, T, H, K] in the query's dtype; 0 where a query sees no token.
    """
    rows, length, _, size = query.shape
    heads = key.shape[2]
    size_of_block = block_size(length, block)
    extra = -length % size_of_block
    query, key, value = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (query, key, value))
    mask = jnp.pad(mask, ((0, 0), (0, extra)))
    grouped = jnp.moveaxis(query.reshape(rows, length + extra, heads, -1, size), 1, 3)  # [B, N, G, T, K]
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))  # [B, N, T, K]
    out = _blockwise(grouped, key, value, mask, _Static(window, softcap, scale, size_of_block))
    return jnp.moveaxis(out, 3, 1).reshape(query.shape)[:, :length]


class _Static(NamedTuple):
    window: int | None
    softcap: float | None
    scale: float
    block: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(query, key, value, mask, static: _Static):
    return _forward(query, key, value, mask, static)[0]


def _forward(query, key, value, mask, static: _Static):
    rows, heads, groups, length, size = query.shape
    block = static.block

    def row_of_blocks(_, index):
        queries = _part(query, index, block, axis=3)

        def step(other, state):
            highest, total, mixed = state
            scores, _ = _scores(
                queries, _part(key, other, block), _part(mask, other, block, axis=1), index, other, static
            )
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            shares = jnp.exp(scores - higher)
            faded = jnp.exp(highest - higher)
            total = total * faded + shares.sum(axis=-1, keepdims=True)
            added = _product("bngts,bnsk->bngtk", shares.astype(value.dtype), _part(value, other, block))
            return higher, total, mixed * faded + added

        # The first maximum lies far above what is hidden, whose exponentials are then 0, and far below every score.
        column = jnp.zeros((rows, heads, groups, block, 1))
        start = column + HIDDEN / 2, column, jnp.zeros((rows, heads, groups, block, size))
        highest, total, mixed = jax.lax.fori_loop(*_reach(index, static), step, start)
        blind = total == 0
        total = jnp.where(blind, 1, total)
        return None, ((mixed / total).astype(query.dtype), jnp.where(blind, 0, highest + jnp.log(total)))

    _, (out, log_sums) = jax.lax.scan(row_of_blocks, None, jnp.arange(length // block))
    out, log_sums = (_joined(x) for x in (out, log_sums))
    return out, (query, key, value, mask, out, log_sums)


def _backward(static: _Static, kept, gradient):
    query, key, value, mask, out, log_sums = kept
    block = static.block
    # The gradient of a softmax is shares · (gradient - their mean under the shares); that mean is this.
    means = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def row_of_blocks(state, index):
        queries, outward, log_sum, mean = (_part(x, index, block, axis=3) for x in (query, gradient, log_sums, means))

        def step(other, state):
            d_queries, d_key, d_value = state
            keys, values = _part(key, other, block), _part(value, other, block)
            scores, free = _scores(queries, keys, _part(mask, other, block, axis=1), index, other, static)
            shares = jnp.exp(scores - log_sum)
            d_scores = shares * (_product("bngtk,bnsk->bngts", outward, values) - mean)
            if static.softcap is not None:
                d_scores = d_scores * (1 - jnp.square(free / static.softcap))
            d_scores = (d_scores * static.scale).astype(query.dtype)
            d_queries = d_queries + _product("bngts,bnsk->bngtk", d_scores, keys)
            d_keys = _product("bngts,bngtk->bnsk", d_scores, queries)
            d_values = _product("bngts,bngtk->bnsk", shares.astype(value.dtype), outward)
            return d_queries, _add(d_key, other, d_keys), _add(d_value, other, d_values)

        state = jax.lax.fori_loop(*_reach(index, static), step, (jnp.zeros(queries.shape), *state))
        return state[1:], state[0].astype(query.dtype)

    state = jnp.zeros(key.shape), jnp.zeros(value.shape)
    (d_key, d_value), d_query = jax.lax.scan(row_of_blocks, state, jnp.arange(query.shape[3] // block))
    return _joined(d_query), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_blockwise.defvjp(_forward, _backward)


def _reach(index: jax.Array, static: _Static) -> tuple[jax.Array | int, jax.Array]:
    """First and one past the last block of keys that a block of queries sees anything of."""
    first = 0 if static.window is None else jnp.maximum(index * static.block - static.window + 1, 0) // static.block
    return first, index + 1


def _scores(queries, keys, mask, index, other, static: _Static) -> tuple[jax.Array, jax.Array]:
    """Scores float32 [B, N, G, P, P] of a block of queries and one of keys, and the same with nothing hidden."""
    free = capped(_product("bngtk,bnsk->bngts", queries, keys) * static.scale, static.softcap)
    slots = jnp.arange(static.block)
    back = (index - other) * static.block + slots[:, None] - slots[None, :]
    seen = back >= 0 if static.window is None else (back >= 0) & (back < static.window)
    return jnp.where(seen & mask[:, None, None, None, :], free, HIDDEN), free


def _product(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """An einsum in float32; the precision is said here because the backward pass is traced outside the caller's setting."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=jnp.float32)


def _part(x: jax.Array, index: jax.Array, block: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _add(x: jax.Array, index: jax.Array, part: jax.Array) -> jax.Array:
    block = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x, _part(x, index, block) + part, index * block, 2)


def _joined(blocks: jax.Array) -> jax.Array:
    """Stacked blocks of queries [T / P, B, N, G, P, …] as one [B, N, G, T, …]."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])


__all__ = ["HIDDEN", "block_size", "blockwise", "capped"]
