"""The arithmetic of one decoder layer, as functions of arrays: over whole sequences, and over one token with a cache.

Shapes: B rows, T tokens, S slots of the cache, D width, H heads, N key-value heads, K head_dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gold_jax.models.attention import masked_softmax
from gold_jax.models.config import ACTIVATIONS, DecoderConfig
from gold_jax.models.quantization import Int8, int8_product, vectors_to_int8
from gold_jax.models.rope import rotate
from gold_jax.sharding.collectives import ShardedParam, cached_attention_per_head, unshard
from gold_jax.sharding.placement import Placement

Weights = dict[str, jax.Array | ShardedParam | Int8]


def rms_norm(config: DecoderConfig, weight: jax.Array | ShardedParam, x: jax.Array) -> jax.Array:
    """`x / rms(x) · (norm_offset + weight)` over the last axis, in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    return (wide * scale * (config.norm_offset + unshard(weight, jnp.float32))).astype(x.dtype)


def final_norm(config: DecoderConfig, weight: jax.Array, x: jax.Array) -> jax.Array:
    """The norm after the last layer, with the factor on logits, which a head is linear in."""
    return scaled(rms_norm(config, weight, x), config.hidden_scale)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`factor · x`, rounded once to x's dtype."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """`x @ weights[name]`, plus `weights[name + "_bias"]` where there is one, in x's dtype.

    Rows and positions become one axis for the product: CPUs multiply the gradient of a matrix, which sums over both, a
    third faster when there is one axis to sum over.
    """
    weight, flat = weights[name], x.reshape(-1, x.shape[-1])
    y = int8_product(flat, weight) if isinstance(weight, Int8) else flat @ unshard(weight, x.dtype)
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + unshard(bias, x.dtype)).reshape(*x.shape[:-1], -1)


# Activations between two products, and matrices in the compute dtype, cost less to recompute than to keep: of these
# functions only the inputs are saved for the backward pass.
_keep_inputs = functools.partial(jax.checkpoint, prevent_cse=False)
_norm = _keep_inputs(rms_norm, static_argnums=0)
_linear = _keep_inputs(linear, static_argnums=1)


@functools.partial(_keep_inputs, static_argnums=(0, 3, 4))
def _normed_products(config: DecoderConfig, weights: Weights, x: jax.Array, norm: str, names: tuple[str, ...]):
    normed = x if config.post_norms_only else rms_norm(config, weights[norm], x)
    return tuple(linear(weights, name, normed) for name in names)


@functools.partial(_keep_inputs, static_argnums=0)
def _gated_product(config: DecoderConfig, weights: Weights, gate: jax.Array, up: jax.Array) -> jax.Array:
    return linear(weights, "down", ACTIVATIONS[config.activation](gate) * up)


def forward(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, attend: Callable[..., jax.Array]):
    """One layer over whole sequences: x [B, T, D], and the rotated keys and the values [B, T, N, K].

    Args:
        weights: the layer's parameters by the names of `parameters.layer_parameters`, in any dtype.
        x: [B, T, D]; table: cosines and sines [B, T, up to K / 2].
        attend: attention of queries [B, T, H, K], keys and values [B, T, N, K], to [B, T, H * K].
    """
    query, key, value = _rotated_heads(config, weights, x, table)
    return _after_attention(config, weights, x, attend(query, key, value)), key, value


def decode(
    config: DecoderConfig, weights: Weights, x, table, allowed, cache, platform: str, placement: Placement | None
):
    """One layer over one token per row: x [B, D], and the two caches with the token in them.

    Args:
        weights: as in `forward`; x: [B, D]; table: cosines and sines [B, 1, up to K / 2].
        allowed: bool [B, S]; cache: keys [B, N, K, S], values [B, N, S, K], both perhaps `Int8`, and the slots [B] to write to.
        platform, placement: the model's.
    """
    query, key, value = _rotated_heads(config, weights, x, table)
    attend = functools.partial(_attend_to_cache, config, platform)
    if placement is not None:
        attend = cached_attention_per_head(placement, attend, config.heads, config.kv_heads)
    attended, keys, values = attend(query, key, value, allowed, *cache)
    return _after_attention(config, weights, x, attended), keys, values


def _attend_to_cache(config: DecoderConfig, platform: str, query, key, value, allowed, keys, values, slots):
    """Attention of one token per row, [B, 1, heads, K], to the cache with it in its slot: [B, H * K], and the caches."""
    keys = _write_token(keys, key[:, 0], slots, 3, platform)
    values = _write_token(values, value[:, 0], slots, 2, platform)
    query = query.reshape(len(query), key.shape[2], -1, config.head_dim)
    # The scales of int8, one a slot, multiply scores and weights: the compilers of GPUs and TPUs widen it as they read it.
    (read_keys, key_scale), (read_values, value_scale) = (
        (held.values.astype(query.dtype), held.scale[:, :, None]) if isinstance(held, Int8) else (held, None)
        for held in (keys, values)
    )
    scores = jnp.einsum("bngk,bnks->bngs", query, read_keys, preferred_element_type=jnp.float32)
    scores = scores if key_scale is None else scores * key_scale
    weighed = masked_softmax(scores, allowed[:, None, None], softcap=config.attention_softcap, scale=config.query_scale)
    weighed = weighed if value_scale is None else weighed * value_scale
    attended = jnp.einsum("bngs,bnsk->bngk", weighed.astype(read_values.dtype), read_values)
    return attended.reshape(len(query), -1), keys, values


def _write_token(cache: jax.Array | Int8, new: jax.Array, slots: jax.Array, axis: int, platform: str):
    """A cache with `new` [B, N, K] in each row's slot, slots being one of its axes.

    On TPUs a scatter, or a loop in the program, copies the whole cache into another layout and back for every token;
    written out, every row is put where it belongs.
    """
    if isinstance(cache, Int8):
        rounded = vectors_to_int8(new, -1)
        values = _write_token(cache.values, rounded.values, slots, axis, platform)
        return Int8(values, _write_token(cache.scale, rounded.scale, slots, 2, platform))
    if platform != "tpu":
        rows = jnp.arange(len(new))
        at = cache.at[rows, :, :, slots] if axis == 3 else cache.at[rows, :, slots]
        return at.set(new, indices_are_sorted=True, unique_indices=True)
    for row in range(len(new)):
        start = [row] + [0] * (cache.ndim - 1)
        start[axis] = slots[row]
        cache = jax.lax.dynamic_update_slice(cache, jnp.expand_dims(new[row : row + 1], axis), start)
    return cache


def _rotated_heads(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple) -> tuple[jax.Array, ...]:
    """Queries [B, T, H, K] and keys [B, T, N, K], normed where they are and rotated, and values; x [B, D] is one token."""
    shape = x.shape[0], 1 if x.ndim == 2 else x.shape[1], -1, config.head_dim
    made = _normed_products(config, weights, x, "attention_norm", ("query", "key", "value"))
    if config.joint_qk_norm:
        made = [rms_norm(config, weights[f"{name}_norm"], y) for name, y in zip(("query", "key"), made)] + [made[2]]
    query, key, value = (y.reshape(shape) for y in made)
    if config.qk_norm:
        query = rms_norm(config, weights["query_norm"], query)
        key = rms_norm(config, weights["key_norm"], key)
    return rotate(query, *table), rotate(key, *table), value


def _after_attention(config: DecoderConfig, weights: Weights, x: jax.Array, attended: jax.Array) -> jax.Array:
    """What follows attention in a layer: its output projection and the MLP, each added to x [..., D]."""
    attended = _linear(weights, "out", attended)
    if config.post_norms:
        attended = _norm(config, weights["attention_out_norm"], attended)
    x = x + scaled(attended, config.residual_scale)
    made = _gated_product(config, weights, *_normed_products(config, weights, x, "mlp_norm", ("gate", "up")))
    if config.post_norms:
        made = _norm(config, weights["mlp_out_norm"], made)
    return x + scaled(made, config.residual_scale)
