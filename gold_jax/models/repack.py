"""Packed sequences as rows, for attention, and back.

Shapes: S sequences of N tokens, R rows of T slots each, F features. `gather_index [S, R, T]` and `first_slot [S, N]` are
those of `text.packing.PackedBatch`.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def to_rows(x: jax.Array, gather_index: jax.Array) -> jax.Array:
    """Packed sequences `[S, N, F]` as rows `[S, R·T, F]`. Gradients of a token that rows share are summed in float32."""
    return _gather(x, gather_index.reshape(len(x), -1))


def _to_rows_forward(x, gather_index):
    return to_rows(x, gather_index), (gather_index, jnp.zeros((0, x.shape[1]), bool))


def _to_rows_backward(residuals, gradient):
    gather_index, tokens = residuals
    index = gather_index.reshape(len(gather_index), -1)
    zeros = jnp.zeros((tokens.shape[1], gradient.shape[-1]), jnp.float32)
    summed = jax.vmap(lambda index, g: zeros.at[index].add(g, mode="promise_in_bounds"))(
        index, gradient.astype(jnp.float32)
    )
    return summed.astype(gradient.dtype), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def to_sequences(x: jax.Array, gather_index: jax.Array, first_slot: jax.Array) -> jax.Array:
    """Rows `[S, R·T, F]` as packed sequences `[S, N, F]`, each token from the first row that holds it.

    No two tokens are read from one slot, so that the gradient is a gather too.
    """
    return _gather(x, first_slot)


def _to_sequences_forward(x, gather_index, first_slot):
    return to_sequences(x, gather_index, first_slot), (gather_index, first_slot)


def _to_sequences_backward(residuals, gradient):
    gather_index, first_slot = residuals
    index = gather_index.reshape(len(gather_index), -1)
    read = jnp.take_along_axis(first_slot, index, axis=1) == jnp.arange(index.shape[1])
    return jnp.where(read[..., None], _gather(gradient, index), 0), None, None


to_sequences.defvjp(_to_sequences_forward, _to_sequences_backward)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x [S, N, F]` at `index [S, M]` of each line: `[S, M, F]`. Indices must be in range."""
    return jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))(x, index)
