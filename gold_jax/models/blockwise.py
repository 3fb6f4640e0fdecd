"""Attention by a running softmax over blocks of queries and keys, in plain JAX, with a gradient of its own.

Nothing of the size [T, T] is ever held: the forward pass keeps the output and each query's log-sum of exponentials, the
backward pass computes the scores again from them (FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and
2). Blocks that causality or the window leave empty are not visited.

Shapes: B rows, T tokens, H = N · G heads, N key-value heads, K head_dim; blocks of P queries and P keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Score of masked positions: far below any score, yet finite, so that a fully masked softmax is uniform and not NaN.
MASK_VALUE = -1e30


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap · tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def block_size(length: int, most: int, *, multiple: int = 1) -> int:
    """The size of even blocks that hold `length` with the least padding: at most `most`, a multiple of `multiple`."""
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


def blockwise(query, key, value, mask, window, softcap, scale, *, block: int = 128) -> jax.Array:
    """Causal attention as `attention.attention`, 0 where a query sees nothing; `block`: most queries and keys in a step."""
    (rows, length, _, size), heads = query.shape, key.shape[2]
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
        queries = _block(query, index, block, axis=3)

        def step(key_index, state):
            highest, total, weighted = state
            keys, seen = _block(key, key_index, block), _block(mask, key_index, block, axis=1)
            scores, _ = _scores(queries, keys, seen, index, key_index, static)
            higher = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            probs = jnp.exp(scores - higher)
            rescale = jnp.exp(highest - higher)
            total = total * rescale + probs.sum(axis=-1, keepdims=True)
            added = _product("bngts,bnsk->bngtk", probs.astype(value.dtype), _block(value, key_index, block))
            return higher, total, weighted * rescale + added

        # The first maximum lies far above what is hidden, whose exponentials are then 0, and far below every score.
        column = jnp.zeros((rows, heads, groups, block, 1))
        start = column + MASK_VALUE / 2, column, jnp.zeros((rows, heads, groups, block, size))
        highest, total, weighted = jax.lax.fori_loop(*_key_block_range(index, static), step, start)
        fully_masked = total == 0
        total = jnp.where(fully_masked, 1, total)
        return None, ((weighted / total).astype(query.dtype), jnp.where(fully_masked, 0, highest + jnp.log(total)))

    _, (out, log_sums) = jax.lax.scan(row_of_blocks, None, jnp.arange(length // block))
    out, log_sums = (_join_blocks(x) for x in (out, log_sums))
    return out, (query, key, value, mask, out, log_sums)


def _backward(static: _Static, residuals, gradient):
    query, key, value, mask, out, log_sums = residuals
    block = static.block
    # The gradient of a softmax is shares · (gradient - their mean under the shares); that mean is this.
    means = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(axis=-1, keepdims=True)

    def row_of_blocks(state, index):
        queries, outward, log_sum, mean = (_block(x, index, block, axis=3) for x in (query, gradient, log_sums, means))

        def step(key_index, state):
            d_queries, d_key, d_value = state
            keys, values = _block(key, key_index, block), _block(value, key_index, block)
            seen = _block(mask, key_index, block, axis=1)
            scores, unmasked = _scores(queries, keys, seen, index, key_index, static)
            probs = jnp.exp(scores - log_sum)
            d_scores = probs * (_product("bngtk,bnsk->bngts", outward, values) - mean)
            if static.softcap is not None:
                d_scores = d_scores * (1 - jnp.square(unmasked / static.softcap))
            d_scores = (d_scores * static.scale).astype(query.dtype)
            d_queries = d_queries + _product("bngts,bnsk->bngtk", d_scores, keys)
            d_keys = _product("bngts,bngtk->bnsk", d_scores, queries)
            d_values = _product("bngts,bngtk->bnsk", probs.astype(value.dtype), outward)
            return d_queries, _add(d_key, key_index, d_keys), _add(d_value, key_index, d_values)

        state = jax.lax.fori_loop(*_key_block_range(index, static), step, (jnp.zeros(queries.shape), *state))
        return state[1:], state[0].astype(query.dtype)

    state = jnp.zeros(key.shape), jnp.zeros(value.shape)
    (d_key, d_value), d_query = jax.lax.scan(row_of_blocks, state, jnp.arange(query.shape[3] // block))
    return _join_blocks(d_query), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_blockwise.defvjp(_forward, _backward)


def _key_block_range(index: jax.Array, static: _Static) -> tuple[jax.Array | int, jax.Array]:
    """First and one past the last block of keys that a block of queries sees anything of."""
    first = 0 if static.window is None else jnp.maximum(index * static.block - static.window + 1, 0) // static.block
    return first, index + 1


def _scores(queries, keys, mask, index, key_index, static: _Static) -> tuple[jax.Array, jax.Array]:
    """Scores float32 [B, N, G, P, P] of a block of queries and one of keys, and the same with nothing hidden."""
    unmasked = capped(_product("bngtk,bnsk->bngts", queries, keys) * static.scale, static.softcap)
    slots = jnp.arange(static.block)
    distance = (index - key_index) * static.block + slots[:, None] - slots[None, :]
    visible = distance >= 0 if static.window is None else (distance >= 0) & (distance < static.window)
    return jnp.where(visible & mask[:, None, None, None, :], unmasked, MASK_VALUE), unmasked


def _product(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """An einsum in float32; the precision is said here because the backward pass is traced outside the caller's setting."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=jnp.float32)


def _block(x: jax.Array, index: jax.Array, block: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _add(x: jax.Array, index: jax.Array, part: jax.Array) -> jax.Array:
    block = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(x, _block(x, index, block) + part, index * block, 2)


def _join_blocks(blocks: jax.Array) -> jax.Array:
    """Stacked blocks of queries [T / P, B, N, G, P, …] as one [B, N, G, T, …]."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
