"""Sampling tokens from logits with temperature, top-k and top-p, without sorting the vocabulary.

Sorting `[B, V]` would dominate a decode step. Top-k finds its threshold by bisection over bit patterns; top-p is
sampled by rejection; the draw itself inverts the cumulative sum in blocks.
"""

import jax
import jax.numpy as jnp

_BLOCK = 256  # entries of the vocabulary per block in `inverse_cdf`


def sample_tokens(logits: jax.Array, keys: jax.Array, temperature=None, top_k=None, top_p=None) -> jax.Array:
    """One token per row, int32 [B], of logits float32 [B, V]; the PRNG keys [B] are the only randomness.

    `temperature`, `top_k` and `top_p` are scalars as in `rollout.engine.Engine.generate`, and come in this order, as in
    transformers; None is off, and no part of the program: without a temperature the likeliest token is taken. Entries
    that tie with the last one kept are kept.

    Top-p is drawn, not filtered: a token that turns out not to be among the likeliest that together have `top_p` is
    drawn again, among those that are likelier than it. All that may be kept are likelier than what is not, so every
    further draw is among all of them still, and what is kept comes as often as its probability says. One draw does more
    often than not, where a filter would have to find its threshold first.
    """

    if temperature is None:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)
    weights = top_k_weights(logits, temperature, top_k)

    def draw(tries, weights):
        return inverse_cdf(weights, jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, tries)))(keys))

    token = draw(0, weights)
    if top_p is None:
        return token
    nucleus_mass = top_p * weights.sum(axis=1)

    def draw_again(state):
        tries, token, kept = state
        likelier = jnp.where(weights > _weight_of(weights, token)[:, None], weights, 0.0)
        token = jnp.where(kept, token, draw(tries, likelier))
        return tries + 1, token, in_nucleus(weights, token, nucleus_mass)

    first = jnp.int32(1), token, in_nucleus(weights, token, nucleus_mass)
    return jax.lax.while_loop(lambda state: ~state[2].all(), draw_again, first)[1]


def top_k_weights(logits: jax.Array, temperature: jax.Array, top_k: jax.Array | None) -> jax.Array:
    """Unnormalised probabilities float32 [B, V], 0 for entries that are not among the `top_k` likeliest; None: none is."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    weights = jnp.exp(scaled)
    if top_k is None:
        return weights
    order = _sortable_bits(scaled)

    def halve(index, threshold):  # the largest of each row, uint32 [B], that keeps enough: 32 steps, no sort
        higher = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where((order >= higher[:, None]).sum(axis=1) >= top_k, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(len(weights), jnp.uint32))
    return jnp.where(order >= threshold[:, None], weights, 0.0)


def in_nucleus(weights: jax.Array, token: jax.Array, nucleus_mass: jax.Array) -> jax.Array:
    """Bool [B]: whether a row's token is among the fewest that together weigh `nucleus_mass [B]` or more: the likelier ones do not."""
    heavier = jnp.where(weights > _weight_of(weights, token)[:, None], weights, 0.0)
    return ~(heavier.sum(axis=1) >= nucleus_mass)  # true where nothing is a number, or drawing would never end


def _weight_of(weights: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(weights, token[:, None], axis=1)[:, 0]


def _sortable_bits(values: jax.Array) -> jax.Array:
    """uint32 whose order is that of the floats: the bit pattern, with all bits of negative numbers flipped."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Inverse-CDF sampling: the entry [B] of weights [B, V] at which their cumulative share exceeds `uniform` [B] in [0, 1).

    First over blocks of the vocabulary, then within the block: two short cumulative sums instead of one over V.
    """
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    block, rest = _inverse_cdf(blocks.sum(axis=2), uniform)
    block_weights = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inner, _ = _inverse_cdf(block_weights, rest)
    return (block * _BLOCK + inner).astype(jnp.int32)


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index [B] where the cumulative share of weights [B, C] first exceeds uniform, and how far into it, in [0, 1)."""
    sums = jnp.cumsum(weights, axis=1)
    target = uniform * sums[:, -1]
    # Rounding may put the target at the very end: then the last entry that weighs anything, never one left out.
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    index = jnp.minimum((sums <= target[:, None]).sum(axis=1), last)
    weight = jnp.take_along_axis(weights, index[:, None], axis=1)[:, 0]
    before = jnp.take_along_axis(sums, index[:, None], axis=1)[:, 0] - weight
    return index, jnp.clip((target - before) / weight, 0.0, 1.0)
