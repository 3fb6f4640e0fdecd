"""Matrices held in fewer bits, for decoding, which takes as long as its weights take to be read."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LARGEST = 127


class Int8(NamedTuple):
    """A matrix as whole numbers with a scale for each of its outputs: `values · scale`, with a rounding error of at most scale / 2."""

    values: Any  # int8, of the matrix' shape
    scale: Any  # float32, of the axis that a product does not sum over


@functools.partial(jax.jit, static_argnums=(1, 2))
def to_int8(weight: jax.Array, axis: int, sharding: Int8 | None = None) -> Int8:
    """A matrix `[..., D, F]` whose products sum over `axis` (-2 or -1) as int8; `sharding`: where its two parts lie."""
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis, keepdims=True) / _LARGEST
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1)).astype(jnp.int8)
    made = Int8(values, jnp.squeeze(scale, axis))
    return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding)


def int8_product(x: jax.Array, weight: Int8) -> jax.Array:
    """`x [B, D] @ weight [D, F]` in x's dtype: the compilers of GPUs and TPUs widen the int8 as they read it."""
    y = jnp.matmul(x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * weight.scale).astype(x.dtype)
