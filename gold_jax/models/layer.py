"""The arithmetic of one decoder layer, as functions of arrays: over whole sequences, and over one token with a cache.

Shapes: B rows, T queries, S keys, D width, H heads, N key-value heads, K head_dim, F inner width of the MLP.
"""

import jax
import jax.numpy as jnp

from gold_jax.models.config import DecoderConfig
from gold_jax.models.rope import rotate

Weights = dict[str, jax.Array]
DecodingWeights = list[Weights]

# Far below any score, yet finite: a query that may see nothing gets an even softmax instead of NaN.
_HIDDEN = -1e30

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


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap · tanh(x / cap)`, or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(config: DecoderConfig, query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    """Grouped-query attention.

    Args:
        query: [B, T, H, K]; key, value: [B, S, N, K]; allowed: bool [B, T, S].

    Returns:
        [B, T, H * K] in the query's dtype.
    """
    rows, length, heads, size = query.shape
    query = query.reshape(rows, length, config.kv_heads, heads // config.kv_heads, size)
    scores = jnp.einsum("btngk,bsnk->bngts", query, key, preferred_element_type=jnp.float32)
    scores = softcap(scores * config.query_scale, config.attention_softcap)
    weights = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, _HIDDEN), axis=-1).astype(value.dtype)
    return jnp.einsum("bngts,bsnk->btngk", weights, value).reshape(rows, length, heads * size)


def forward(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, allowed: jax.Array):
    """One layer over whole sequences.

    Args:
        weights: the layer's parameters by the names of `decoder.layer_parameters`, in the compute dtype.
        x: [B, T, D]; table: cosines and sines [B, T, K / 2]; allowed: bool [B, T, S = T].

    Returns:
        x [B, T, D], and the rotated keys and the values [B, T, N, K].
    """
    kept = []

    def attention(query, key, value):
        kept.extend((key, value))
        return attend(config, query, key, value, allowed)

    x = _block(config, weights, x, table, attention)
    return x, *kept


def decode(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, allowed: jax.Array, cache: tuple):
    """One layer over one token per row.

    Args:
        weights: one of `decoding_weights`; x: [B, 1, D]; table: cosines and sines [B, 1, K / 2].
        allowed: bool [B, S]; cache: keys and values [B, N, S, K], and the slot to write to.

    Returns:
        x [B, 1, D], and the two caches with the token in them.
    """
    keys, values, slot = cache
    kept = []

    def attention(query, key, value):
        rows, _, heads, size = query.shape
        at = (0, 0, slot, 0)
        kept.append(jax.lax.dynamic_update_slice(keys, jnp.swapaxes(key, 1, 2), at))
        kept.append(jax.lax.dynamic_update_slice(values, jnp.swapaxes(value, 1, 2), at))
        query = query.reshape(rows, config.kv_heads, heads // config.kv_heads, size)
        scores = jnp.einsum("bngk,bnsk->bngs", query, kept[0], preferred_element_type=jnp.float32)
        scores = softcap(scores * config.query_scale, config.attention_softcap)
        shares = jax.nn.softmax(jnp.where(allowed[:, None, None], scores, _HIDDEN), axis=-1).astype(x.dtype)
        return jnp.einsum("bngs,bnsk->bngk", shares, kept[1]).reshape(rows, 1, heads * size)

    x = _block(config, weights, x, table, attention)
    return x, *kept


def decoding_weights(config: DecoderConfig, stacked: Weights, dtype) -> DecodingWeights:
    """Each layer's own arrays, cast to `dtype`; products that share an input are joined (`qkv`, `gate_up`)."""
    layers = []
    for index in range(config.layers):
        own = {name: value[index].astype(dtype) for name, value in stacked.items()}
        layers.append(own)
    return layers


def _block(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, attention):
    rows, length, _ = x.shape
    normed = rms_norm(config, x, weights["attention_norm"])
    query, key, value = (
        linear(weights, name, normed).reshape(rows, length, -1, config.head_dim) for name in ("query", "key", "value")
    )
    if config.qk_norm:
        query = rms_norm(config, query, weights["query_norm"])
        key = rms_norm(config, key, weights["key_norm"])
    attended = linear(weights, "out", attention(rotate(query, *table), rotate(key, *table), value))
    if config.sandwich_norms:
        attended = rms_norm(config, attended, weights["attention_out_norm"])
    x = x + attended
    normed = rms_norm(config, x, weights["mlp_norm"])
    gated = _ACTIVATIONS[config.activation](linear(weights, "gate", normed)) * linear(weights, "up", normed)
    made = linear(weights, "down", gated)
    if config.sandwich_norms:
        made = rms_norm(config, made, weights["mlp_out_norm"])
    return x + made


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """`x @ weights[name]`, plus `weights[name + "_bias"]` where there is one."""
    y = x @ weights[name]
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias
