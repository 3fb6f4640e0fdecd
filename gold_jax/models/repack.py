"""Packed sequences as rows, for attention, and back.

Shapes: S sequences of N tokens, R rows of T slots each, F features. `gather_index [S, R, T]` and `first_slot [S, N]` are
those of `text.packing.PackedBatch`.
"""

import functools

import jax
import jax.numpy as jnp


def to_rows(x: jax.Array, gather_index: jax.Array) -> jax.Array:
    """Packed sequences `[S, N, F]` as rows `[S, R·T, F]`. Gradients of a token that rows share are summed in float32."""
    return _to_rows(x.shape[1], x, gather_index.reshape(len(x), -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_rows(tokens: int, x: jax.Array, index: jax.Array) -> jax.Array:
    return _gather(x, index)


def _to_rows_backward(tokens, index, gradient):
    def summed(index, gradient):
        zeros = jnp.zeros((tokens, gradient.shape[-1]), jnp.float32)
        return zeros.at[index].add(gradient.astype(jnp.float32), mode="promise_in_bounds")

    return jax.vmap(summed)(index, gradient).astype(gradient.dtype), None


_to_rows.defvjp(lambda tokens, x, index: (_gather(x, index), index), _to_rows_backward)


@jax.custom_vjp
def to_sequences(x: jax.Array, gather_index: jax.Array, first_slot: jax.Array) -> jax.Array:
    """Rows `[S, R·T, F]` as packed sequences `[S, N, F]`, each token from the first row that holds it.

    No two tokens are read from one slot, so that the gradient is a gather too. Padding behind a sequence reads slot 0,
    for its values mean nothing, and gives no gradient.
    """
    return _gather(x, first_slot)


def _to_sequences_backward(residuals, gradient):
    gather_index, first_slot = residuals
    index = gather_index.reshape(len(gather_index), -1)
    read = jnp.take_along_axis(first_slot, index, axis=1) == jnp.arange(index.shape[1])
    return jnp.where(read[..., None], _gather(gradient, index), 0), None, None


to_sequences.defvjp(
    lambda x, gather_index, first_slot: (_gather(x, first_slot), (gather_index, first_slot)), _to_sequences_backward
)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x [S, N, F]` at `index [S, M]` of each line: `[S, M, F]`. Indices must be in range."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index)
