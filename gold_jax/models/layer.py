"""The arithmetic of one decoder layer, as functions of arrays: over whole sequences, and over one token with a cache.

Shapes: B rows, T tokens, S slots of the cache, D width, H heads, N key-value heads, K head_dim, F inner width of the
MLP.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gold_jax.models.attention import masked_softmax
from gold_jax.models.config import DecoderConfig
from gold_jax.models.rope import rotate
from gold_jax.sharding.collectives import ShardedParam, cached_attention_per_head, unshard
from gold_jax.sharding.placement import Placement

Weights = dict[str, jax.Array | ShardedParam]


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def rms_norm(config: DecoderConfig, x: jax.Array, weight: jax.Array | ShardedParam) -> jax.Array:
    """`x / rms(x) · (norm_offset + weight)` over the last axis, in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    return (wide * scale * (config.norm_offset + unshard(weight, jnp.float32))).astype(x.dtype)


def forward(config: DecoderConfig, weights: Weights, x: jax.Array, table: tuple, attend: Callable[..., jax.Array]):
    """One layer over whole sequences.

    Args:
        weights: the layer's parameters by the names of `decoder.layer_parameters`, in any dtype.
        x: [B, T, D]; table: cosines and sines [B, T, K / 2].
        attend: attention of queries [B, T, H, K], keys and values [B, T, N, K], to [B, T, H * K].

    Returns:
        x [B, T, D], and the rotated keys and the values [B, T, N, K].
    """
    rows, length, _ = x.shape
    query, key, value = (
        y.reshape(rows, length, -1, config.head_dim) for y in _normed_products(_ATTENTION, config, weights, x)
    )
    query, key = _norm_and_rotate(config, weights, query, key, table)
    return _after_attention(config, weights, x, attend(query, key, value)), key, value


# Activations between two products, and matrices in the compute dtype, cost less to recompute than to keep: of these
# functions only the inputs are saved for the backward pass.
_keep_inputs = functools.partial(jax.checkpoint, static_argnums=(0, 1), prevent_cse=False)
_ATTENTION = "attention_norm", ("query", "key", "value")
_MLP = "mlp_norm", ("gate", "up")


@_keep_inputs
def _normed_products(names: tuple, config: DecoderConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, ...]:
    norm, products = names
    normed = rms_norm(config, x, weights[norm])
    return tuple(linear(weights, name, normed) for name in products)


@_keep_inputs
def _norm(name: str, config: DecoderConfig, weights: Weights, x: jax.Array) -> jax.Array:
    return rms_norm(config, x, weights[name])


@_keep_inputs
def _product(name: str, config: DecoderConfig, weights: Weights, x: jax.Array) -> jax.Array:
    return linear(weights, name, x)


@_keep_inputs
def _gated_product(name: str, config: DecoderConfig, weights: Weights, gate: jax.Array, up: jax.Array) -> jax.Array:
    return linear(weights, name, _ACTIVATIONS[config.activation](gate) * up)


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """`x @ weights[name]`, plus `weights[name + "_bias"]` where there is one, in x's dtype.

    Rows and positions become one axis for the product: CPUs multiply the gradient of a matrix, which sums over both, a
    third faster when there is one axis to sum over.
    """
    y = x.reshape(-1, x.shape[-1]) @ unshard(weights[name], x.dtype)
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + unshard(bias, x.dtype)).reshape(*x.shape[:-1], -1)


def decode(
    config: DecoderConfig,
    weights: Weights,
    x: jax.Array,
    table: tuple,
    allowed: jax.Array,
    cache: tuple,
    platform: str,
    placement: Placement | None = None,
):
    """One layer over one token per row.

    Args:
        weights: as in `forward`; x: [B, D]; table: cosines and sines [B, 1, K / 2].
        allowed: bool [B, S]; cache: keys [B, N, K, S], values [B, N, S, K], and the slots [B] to write to.
        platform, placement: the model's.

    Returns:
        x [B, D], and the two caches with the token in them.
    """
    rows = x.shape[0]
    query, key, value = (
        y.reshape(rows, 1, -1, config.head_dim) for y in _normed_products(_ATTENTION, config, weights, x)
    )
    query, key = _norm_and_rotate(config, weights, query, key, table)
    attend = functools.partial(_attend_to_cache, config, platform)
    if placement is not None:
        attend = cached_attention_per_head(placement, attend, config.heads, config.kv_heads)
    attended, keys, values = attend(query, key, value, allowed, *cache)
    return _after_attention(config, weights, x, attended), keys, values


def _attend_to_cache(config: DecoderConfig, platform: str, query, key, value, allowed, keys, values, slots):
    """Attention of one token per row, [B, 1, heads, K], to the cache with it in its slot: [B, H * K], and the caches."""
    put = _row_by_row if platform == "tpu" else _all_rows
    keys, values = put(keys, key[:, 0], slots, 3), put(values, value[:, 0], slots, 2)
    query = query.reshape(len(query), key.shape[2], -1, config.head_dim)
    scores = jnp.einsum("bngk,bnks->bngs", query, keys, preferred_element_type=jnp.float32)
    weighed = masked_softmax(scores, allowed[:, None, None], softcap=config.attention_softcap, scale=config.query_scale)
    attended = jnp.einsum("bngs,bnsk->bngk", weighed.astype(values.dtype), values)
    return attended.reshape(len(query), -1), keys, values


def _all_rows(cache: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """A cache with `new` [B, N, K] in each row's slot, slots being one of its axes."""
    rows = jnp.arange(len(new))
    at = cache.at[rows, :, :, slots] if axis == 3 else cache.at[rows, :, slots]
    return at.set(new, indices_are_sorted=True, unique_indices=True)


def _row_by_row(cache: jax.Array, new: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """As `_all_rows`, for TPUs: there a scatter copies the whole cache into another layout and back for every token.

    A loop in the program would have the cache copied as well; written out, every row is put where it belongs.
    """
    for row in range(len(new)):
        start = [row, 0, 0, 0]
        start[axis] = slots[row]
        cache = jax.lax.dynamic_update_slice(cache, jnp.expand_dims(new[row : row + 1], axis), start)
    return cache


def _after_attention(config: DecoderConfig, weights: Weights, x: jax.Array, attended: jax.Array) -> jax.Array:
    """What follows attention in a layer: its output projection and the MLP, each added to x [..., D]."""
    attended = _product("out", config, weights, attended)
    if config.sandwich_norms:
        attended = _norm("attention_out_norm", config, weights, attended)
    x = x + attended
    made = _gated_product("down", config, weights, *_normed_products(_MLP, config, weights, x))
    if config.sandwich_norms:
        made = _norm("mlp_out_norm", config, weights, made)
    return x + made


def _norm_and_rotate(config: DecoderConfig, weights: Weights, query: jax.Array, key: jax.Array, table: tuple):
    """Norm, where there is one, and rotate queries [B, T, H, K] and keys [B, T, N, K]."""
    if config.qk_norm:
        query = rms_norm(config, query, weights["query_norm"])
        key = rms_norm(config, key, weights["key_norm"])
    return rotate(query, *table), rotate(key, *table)
