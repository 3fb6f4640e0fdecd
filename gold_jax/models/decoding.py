"""What decoding reads for every token: the KV cache, and each layer's weights as views or copies."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from gold_jax.models import layer


class Cache(NamedTuple):
    """Keys and values of what has been read, one pair of arrays per layer so that XLA updates each in place.

    A row's tokens are in its first slots, whatever the other rows hold: a token's slot is its rotary position.

    Attributes:
        keys: tuple of L arrays [B, kv_heads, head_dim, S], S slots: a query's product with them then reads them
            without a transpose.
        values: tuple of L arrays [B, kv_heads, S, head_dim]. On a mesh a head may be there several times, once for each
            of the devices that share its queries (`Placement.kv_repeats`).
        length: int32 [B], tokens that each row holds; its next one goes to this slot.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array


class DecodingWeights(NamedTuple):
    """What `Decoder.decode_step` reads for every token: each layer's own parameters by name, and the head [V, D]."""

    layers: list[layer.Weights]
    head: jax.Array


def can_view_layers(x: jax.Array, dtype) -> bool:
    """Whether layers of a stacked array can be viewed without a copy: one CPU device, the wanted dtype, not traced."""
    if isinstance(x, jax.core.Tracer) or x.dtype != dtype or not x.is_fully_addressable:
        return False
    return {device.platform for device in x.devices()} == {"cpu"} and len(x.devices()) == 1


def layer_views(x: jax.Array, dtype) -> list[jax.Array]:
    """`x [L, …]` as L arrays that share its memory and keep it; as long as they live, `x` is not overwritten if donated."""
    host = np.asarray(x)
    return [jax.device_put(part, x.sharding, may_alias=True) for part in host]


@functools.partial(jax.jit, static_argnums=(1, 2))
def layer_copies(x: jax.Array, dtype, sharding=None) -> list[jax.Array]:
    """`x [L, …]` as L arrays of another dtype, on a mesh as `sharding` says."""
    return [cast_and_shard(part, dtype, sharding) for part in x]


@functools.partial(jax.jit, static_argnums=(1, 2))
def cast_and_shard(x: jax.Array, dtype, sharding=None) -> jax.Array:
    """An array in another dtype, on a mesh as `sharding` says."""
    x = x.astype(dtype)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
