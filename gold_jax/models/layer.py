"""The arithmetic of one decoder layer, as functions of arrays: over whole sequences, and over one token with a cache.

Shapes: B rows, T tokens, S slots of the cache, D width, H heads, N key-value heads, K head_dim, F inner width of the MLP.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gold_jax.models.attention import shares
from gold_jax.models.config import DecoderConfig
from gold_jax.models.rope import rotate

Weights = dict[str, jax.Array]
DecodingWeights = list[Weights]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def rms_norm(config: DecoderConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x / rms(x) · (norm_offset + weight)` over the last axis, in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    return (wide * scale * (config.norm_offset + weight.astype(jnp.float32))).astype(x.dtype)


def forward(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, attend: Callable[..., jax.Array]):
    """One layer over whole sequences.

    Args:
        weights: the layer's parameters by the names of `decoder.layer_parameters`, in the compute dtype.
        x: [B, T, D]; table: cosines and sines [B, T, K / 2].
        attend: attention of queries [B, T, H, K], keys and values [B, T, N, K], to [B, T, H * K].

    Returns:
        x [B, T, D], and the rotated keys and the values [B, T, N, K].
    """
    rows, length, _ = x.shape
    normed = _norm(config, x, weights["attention_norm"])
    query, key, value = (
        linear(weights, name, normed).reshape(rows, length, -1, config.head_dim) for name in ("query", "key", "value")
    )
    query, key = _place_heads(config, weights, query, key, table)
    attended = linear(weights, "out", attend(query, key, value))
    if config.sandwich_norms:
        attended = _norm(config, attended, weights["attention_out_norm"])
    x = x + attended

    normed = _norm(config, x, weights["mlp_norm"])
    gated = _gate(config, linear(weights, "gate", normed), linear(weights, "up", normed))
    made = linear(weights, "down", gated)
    if config.sandwich_norms:
        made = _norm(config, made, weights["mlp_out_norm"])
    return x + made, key, value


# What lies between two products costs less to compute again than to keep: the backward pass reads their inputs alone.
_norm = jax.checkpoint(rms_norm, static_argnums=(0,), prevent_cse=False)


@functools.partial(jax.checkpoint, static_argnums=(0,), prevent_cse=False)
def _gate(config: DecoderConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    return _ACTIVATIONS[config.activation](gate) * up


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """`x @ weights[name]`, plus `weights[name + "_bias"]` where there is one.

    Rows and positions become one axis for the product: CPUs multiply the gradient of a matrix, which sums over both, a
    third faster when there is one axis to sum over.
    """
    y = x.reshape(-1, x.shape[-1]) @ weights[name]
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


def decode(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, allowed: jax.Array, cache: tuple):
    """One layer over one token per row, with rows as columns.

    A product of a large matrix with a few columns runs about 1.4 times as fast on CPUs as the same with a few rows.

    Args:
        weights: one of `decoding_weights`; x: [D, B]; table: cosines and sines [B, 1, K / 2].
        allowed: bool [B, S]; cache: keys and values [B, N, S, K], and the slots [B] to write to.

    Returns:
        x [D, B], and the two caches with the token in them.
    """
    keys, values, slots = cache
    groups = config.heads // config.kv_heads

    normed = _norm_columns(config, x, weights["attention_norm"])
    heads = _linear_columns(weights, "query_key_value", normed).reshape(-1, config.head_dim, x.shape[1])
    heads = jnp.moveaxis(heads, 2, 0)[:, None]  # [B, 1, H + 2N, K]
    query, key, value = jnp.split(heads, (config.heads, config.heads + config.kv_heads), axis=2)
    query, key = _place_heads(config, weights, query, key, table)
    rows = jnp.arange(x.shape[1])
    keys, values = (
        old.at[rows, :, slots].set(new[:, 0], indices_are_sorted=True, unique_indices=True)
        for old, new in ((keys, key), (values, value))
    )
    query = query.reshape(-1, config.kv_heads, groups, config.head_dim)
    scores = jnp.einsum("bngk,bnsk->bngs", query, keys, preferred_element_type=jnp.float32)
    shares = _shares(config, scores, allowed[:, None, None]).astype(values.dtype)
    attended = jnp.einsum("bngs,bnsk->bngk", shares, values).reshape(x.shape[1], -1)
    attended = _linear_columns(weights, "out", columns(attended))
    if config.sandwich_norms:
        attended = _norm_columns(config, attended, weights["attention_out_norm"])
    x = x + attended

    normed = _norm_columns(config, x, weights["mlp_norm"])
    gate, up = jnp.split(_linear_columns(weights, "gate_up", normed), 2)
    made = _linear_columns(weights, "down", _ACTIVATIONS[config.activation](gate) * up)
    if config.sandwich_norms:
        made = _norm_columns(config, made, weights["mlp_out_norm"])
    return x + made, keys, values


def decoding_weights(config: DecoderConfig, stacked: Weights, dtype) -> DecodingWeights:
    """Each layer's own arrays in `dtype`: matrices [out, in], those that read the same input joined to one."""
    joined = {
        "query_key_value": ("query", "key", "value"),
        "gate_up": ("gate", "up"),
        "query_key_value_bias": ("query_bias", "key_bias", "value_bias"),
        "gate_up_bias": ("gate_bias", "up_bias"),
    }
    layers = []
    for index in range(config.layers):
        own = {name: value[index].astype(dtype).T for name, value in stacked.items()}
        for name, parts in joined.items():
            if parts[0] in own:
                own[name] = jnp.concatenate([own.pop(part) for part in parts])
        layers.append(own)
    return layers


def columns(x: jax.Array) -> jax.Array:
    """Transpose [B, D] to [D, B] or back, and keep XLA from folding that into the product beside it."""
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).T)


def _norm_columns(config: DecoderConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=0, keepdims=True) + config.norm_eps)
    return (wide * scale * (config.norm_offset + weight.astype(jnp.float32))[:, None]).astype(x.dtype)


def _linear_columns(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    y = weights[name] @ x
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias[:, None]


def _place_heads(config: DecoderConfig, weights: Weights, query: jax.Array, key: jax.Array, table: tuple):
    """Norm, where there is one, and rotate queries [B, T, H, K] and keys [B, T, N, K]."""
    if config.qk_norm:
        query = rms_norm(config, query, weights["query_norm"])
        key = rms_norm(config, key, weights["key_norm"])
    return rotate(query, *table), rotate(key, *table)


def _shares(config: DecoderConfig, scores: jax.Array, allowed: jax.Array) -> jax.Array:
    return shares(scores, allowed, softcap=config.attention_softcap, scale=config.query_scale)
