"""Drawing tokens from logits: temperature, top-k and top-p without sorting, and one uniform number for each token."""

import jax
import jax.numpy as jnp

_BLOCK = 256  # entries of the vocabulary per block in `_draw`


def draw(
    logits: jax.Array, uniform: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token per row.

    The filters come in transformers' order: temperature, top-k, top-p. Entries that tie with the last one kept are kept.

    Args:
        logits: float32 [B, V].
        uniform: float32 [B] in [0, 1), the only randomness.
        temperature, top_k, top_p: scalars as in `rollout.engine.Engine.generate`.

    Returns:
        int32 [B].
    """

    def greedy(logits):
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    def sampled(logits):
        return _draw(filtered_weights(logits, temperature, top_k, top_p), uniform)

    return jax.lax.cond(temperature == 0, greedy, sampled, logits)


def filtered_weights(logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Unnormalised probabilities float32 [B, V], 0 for entries that the filters leave out."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / temperature
    weights = jnp.exp(scaled)
    order = _order(scaled)

    def keep_k(weights):
        def enough(threshold):
            return (order >= threshold[:, None]).sum(axis=1) >= top_k

        return jnp.where(order >= _largest(enough, weights)[:, None], weights, 0.0)

    def keep_p(weights):
        share = top_p * weights.sum(axis=1)

        def enough(threshold):
            return jnp.where(order >= threshold[:, None], weights, 0.0).sum(axis=1) >= share

        return jnp.where(order >= _largest(enough, weights)[:, None], weights, 0.0)

    weights = jax.lax.cond((top_k > 0) & (top_k < logits.shape[1]), keep_k, lambda weights: weights, weights)
    return jax.lax.cond(top_p < 1, keep_p, lambda weights: weights, weights)


def _order(values: jax.Array) -> jax.Array:
    """uint32 that compare as the floats do: the bit pattern, its negative half turned over."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(enough, like: jax.Array) -> jax.Array:
    """The largest threshold of each row, uint32 [B], that is `enough`: 32 halvings instead of a sort."""

    def halve(index, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(enough(higher), higher, threshold)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros(like.shape[0], jnp.uint32))


def _draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Invert the cumulative sum at `uniform`: first among blocks of the vocabulary, then within the block."""
    rows, size = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    block, rest = _invert(blocks.sum(axis=2), uniform)
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inner, _ = _invert(own, rest)
    return (block * _BLOCK + inner).astype(jnp.int32)


def _invert(weights: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index [B] where the cumulative share of weights [B, C] first exceeds uniform, and how far into it, in [0, 1)."""
    sums = jnp.cumsum(weights, axis=1)
    target = uniform * sums[:, -1]
    # Rounding may put the target at the very end: then the last entry that weighs anything, never one left out.
    last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
    index = jnp.minimum((sums <= target[:, None]).sum(axis=1), last)
    weight = jnp.take_along_axis(weights, index[:, None], axis=1)[:, 0]
    before = jnp.take_along_axis(sums, index[:, None], axis=1)[:, 0] - weight
    return index, jnp.clip((target - before) / weight, 0.0, 1.0)


__all__ = ["draw", "filtered_weights"]
