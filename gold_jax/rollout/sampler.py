"""Sampling completions on the device: prefill, then one jitted loop with a key-value cache.

Temperature, top-k, top-p, key and stop tokens are traced values, so that changing them compiles nothing.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gold_jax.models.decoder import Decoder

STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that their number is no new shape
_BLOCK = 256  # entries of the vocabulary per block in `_draw`


class Rollout(NamedTuple):
    """What was sampled.

    Attributes:
        tokens: int32 [B, N]; 0 after a row's end.
        lengths: int32 [B], tokens of each row, its stop token included; 0 for rows whose prompt is empty.
        logprobs: float32 [B, N], log-probability of each token under the model itself (temperature 1, nothing left out).
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


def generate_tokens(
    model: Decoder | tuple,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    max_new_tokens: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
) -> Rollout:
    """Sample a completion of every prompt.

    What a row draws depends on the key, its index and its own prompt, not on how far the batch was padded.

    Args:
        model: a `Decoder`, or its `(graphdef, params)`.
        tokens, mask: int32 and bool [B, P], prompts padded on the left. A row without tokens is left out (length 0).
        max_new_tokens: N, a static size: each new value, like each new shape, compiles once.
        key: PRNG key.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: draw among the k likeliest tokens; 0 is off.
        top_p: then among the fewest tokens that together have this share; 1 is off.
        stop_ids: tokens that end a row.

    Raises:
        ValueError: a setting out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}.")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or more, got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], 1 being off, got {top_p}.")
    graphdef, params = nnx.split(model) if isinstance(model, nnx.Module) else model
    stops = np.full(-(-max(len(stop_ids), 1) // STOP_SLOTS) * STOP_SLOTS, -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    return _generate(
        graphdef,
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(mask, bool),
        key,
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
        jnp.asarray(stops),
        max_new_tokens=max_new_tokens,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def _generate(graphdef, params, tokens, mask, key, temperature, top_k, top_p, stops, *, max_new_tokens):
    model = nnx.merge(graphdef, params)
    rows, prompt = tokens.shape
    hidden, cache = model.prefill(tokens, mask, prompt + max_new_tokens)
    weights = model.decoding_weights()
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))

    def sample(hidden, step, rollout, done):
        """Draw one token per row and note it; rows that are done stay as they are."""
        logits = model.decode_logits(hidden)
        uniform = jax.vmap(lambda row_key: jax.random.uniform(jax.random.fold_in(row_key, step)))(row_keys)
        token = jnp.where(done, 0, draw(logits, uniform, temperature, top_k, top_p))
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = jnp.where(done, 0.0, chosen - jax.nn.logsumexp(logits, axis=1))
        rollout = Rollout(
            jax.lax.dynamic_update_slice(rollout.tokens, token[:, None], (0, step)),
            rollout.lengths + ~done,
            jax.lax.dynamic_update_slice(rollout.logprobs, logprob[:, None], (0, step)),
        )
        return token, rollout, done | (token[:, None] == stops).any(axis=1)

    shape = (rows, max_new_tokens)
    empty = Rollout(jnp.zeros(shape, jnp.int32), jnp.zeros(rows, jnp.int32), jnp.zeros(shape, jnp.float32))
    start = sample(hidden, jnp.int32(0), empty, ~mask.any(axis=1))

    def body(state):
        step, cache, (token, rollout, done) = state
        hidden, cache = model.decode_step(token, cache, weights)
        return step + 1, cache, sample(hidden, step, rollout, done)

    def going(state):
        step, _, (_, _, done) = state
        return (step < max_new_tokens) & ~done.all()

    return jax.lax.while_loop(going, body, (jnp.int32(1), cache, start))[2][1]


def draw(
    logits: jax.Array, uniform: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """One token per row.

    The filters come in transformers' order: temperature, top-k, top-p. Entries that tie with the last one kept are kept.

    Args:
        logits: float32 [B, V].
        uniform: float32 [B] in [0, 1), the only randomness.
        temperature, top_k, top_p: scalars as in `generate_tokens`.

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


__all__ = ["Rollout", "draw", "filtered_weights", "generate_tokens"]
