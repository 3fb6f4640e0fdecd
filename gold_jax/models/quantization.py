"""Matrices, and the keys and values of a cache, held in fewer bits: decoding takes as long as it takes to read them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

KV_CACHE = "int8_kv_cache"  # the one of `values.QUANTIZATIONS` that rounds the cache, too
_LARGEST = 127
_SCALE_BYTES = 4


class Int8(NamedTuple):
    """Vectors as whole numbers with a scale each: `values · scale`, with a rounding error of at most scale / 2.

    Of a matrix the vectors are what a product sums over, of a cache the key or value of one head in a slot.
    """

    values: Any  # int8, of the unrounded array's shape
    scale: Any  # float32, of that shape without the vectors' axis


@functools.partial(jax.jit, static_argnums=(1, 2))
def to_int8(weight: jax.Array, axis: int, sharding: Int8 | None = None) -> Int8:
    """A matrix `[..., D, F]` whose products sum over `axis` (-2 or -1) as int8; `sharding`: where its two parts lie."""
    made = vectors_to_int8(weight, axis)
    return made if sharding is None else jax.lax.with_sharding_constraint(made, sharding)


def vectors_to_int8(x: jax.Array, axis: int) -> Int8:
    """The vectors that lie along an axis."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis, keepdims=True) / _LARGEST
    return Int8(jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), jnp.squeeze(scale, axis))


def vector_bytes(size: int, itemsize: int, quantization: str) -> int:
    """Bytes of a cache for one head's key or value in a slot, of `size` numbers."""
    return size + _SCALE_BYTES if quantization == KV_CACHE else size * itemsize


def int8_product(x: jax.Array, weight: Int8) -> jax.Array:
    """`x [B, D] @ weight [D, F]` in x's dtype: the compilers of GPUs and TPUs widen the int8 as they read it."""
    y = jnp.matmul(x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * weight.scale).astype(x.dtype)
