"""The jitted programs of a server: decoding a round of tokens, and scoring prompts.

Cache and state are those of `rollout.decode_state`. Unlike there, each row has its own settings, a call decodes a few
tokens and returns them to the host, with the most likely ones if requested. One device.

Shapes: R slots, N tokens of a round, K likeliest tokens, B prompts, T their width, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.models.decoder import Cache
from gold_jax.models.functional import merge
from gold_jax.rollout.decode_state import DecodeState, SamplingOptions
from gold_jax.rollout.token_sampling import sample_tokens

_LOGITS = 2**24  # about how many logits `score_tokens` holds at once


class Drawn(NamedTuple):
    """Tokens with their log-probabilities at temperature 1, and the K most likely tokens, in descending order."""

    tokens: jax.Array  # int32 [R, N]
    logprobs: jax.Array  # float32 [R, N]
    top_tokens: jax.Array  # int32 [R, N, K]
    top_logprobs: jax.Array  # float32 [R, N, K]


def row_options(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, stops, limit) -> SamplingOptions:
    """`SamplingOptions` with a value per row [R], and stops [K]; temperature 0: greedy, top_k 0 and top_p 1: off.

    Options that no row uses are None and not compiled into the program.
    """
    drawn = temperature > 0
    return SamplingOptions(
        temperature.astype(np.float32) if drawn.any() else None,
        np.where(top_k > 0, top_k, np.iinfo(np.int32).max).astype(np.int32) if (drawn & (top_k > 0)).any() else None,
        # A probability above 1 is never reached: nothing is filtered.
        np.where(top_p < 1, top_p, 2).astype(np.float32) if (drawn & (top_p < 1)).any() else None,
        np.asarray(stops, np.int32),
        limit.astype(np.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "top"), donate_argnames="cache")
def decode_round(
    graphdef, params, weights, cache: Cache, state: DecodeState, options, done, max_steps, min_active, *, top
):
    """Decodes up to `max_steps` tokens of all rows that are not `done` (bool [R]), while more than `min_active` continue.

    Returns the cache, the state, `Drawn` with N the columns of `state.tokens`, and int32 [R], how many of the N tokens
    each row sampled. `top` (static) is K; the cache is donated.
    """
    model = merge(graphdef, params)
    rows, length = state.tokens.shape
    shapes = ((rows, length), jnp.int32), ((rows, length), jnp.float32)
    drawn = Drawn(*(jnp.zeros((*shape, *more), dtype) for more in ((), (top,)) for shape, dtype in shapes))

    def keep_going(carry):
        steps, _, state, *_ = carry
        return (steps < max_steps) & ((~state.done).sum() > min_active)

    def step(carry):
        steps, cache, state, drawn, counts = carry
        hidden, cache = model.decode_step(state.next_token, cache, weights)
        cache = cache._replace(length=jnp.where(state.done, 0, cache.length))  # finished rows are decoded into slot 0
        logits = model.decode_logits(hidden, weights)
        token = _sample(logits, state, options)
        new = _costs(logits, token, top)
        drawn = Drawn(*(old.at[:, steps].set(x) for old, x in zip(drawn, new)))
        count = state.count + ~state.done
        ended = (token[:, None] == options.stops).any(axis=1) | (count >= options.limit)
        counts = counts + ~state.done
        state = state._replace(next_token=token, count=count, done=state.done | ended)
        return steps + 1, cache, state, drawn, counts

    carry = jnp.int32(0), cache, state._replace(done=done), drawn, jnp.zeros(rows, jnp.int32)
    _, cache, state, drawn, counts = jax.lax.while_loop(keep_going, step, carry)
    return cache, state, drawn, counts


def _sample(logits: jax.Array, state: DecodeState, options: SamplingOptions) -> jax.Array:
    """One token a row, int32 [R], as `rollout.token_sampling.sample_tokens` with each row's own settings."""
    if options.temperature is None:
        return sample_tokens(logits, state.key)
    greedy = options.temperature == 0
    keys = jax.vmap(jax.random.fold_in)(state.key, state.count)
    temperature = jnp.where(greedy, 1, options.temperature)[:, None]
    token = sample_tokens(logits, keys, temperature, options.top_k, options.top_p)
    return jnp.where(greedy, sample_tokens(logits, keys), token)


def _costs(logits: jax.Array, tokens: jax.Array, top: int) -> Drawn:
    """`Drawn` of tokens [...] under logits [..., V], with the `top` most likely tokens."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total
    best, best_tokens = jax.lax.top_k(logits, top)
    return Drawn(tokens, own, best_tokens.astype(jnp.int32), best - total[..., None])


@jax.jit
def row_keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """PRNG keys [R] of seeds and indices int32 [R], as `Engine.generate` makes them of a seed and a prompt's index."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed, index)


@functools.partial(jax.jit, static_argnames=("graphdef", "top"))
def score_tokens(graphdef, params, tokens: jax.Array, lengths: jax.Array, *, top: int) -> Drawn:
    """Log-probabilities of tokens int32 [B, T] given those before them, as `Drawn` [B, T - 1]; `lengths` is int32 [B].

    Column `t` is of token `t + 1`; the first token has none. `top` (static) is K.
    """
    model = merge(graphdef, params)
    rows, width = tokens.shape
    hidden = model(tokens, jnp.arange(width) < lengths[:, None])
    size = max(1, min(width, _LOGITS // (rows * model.config.vocab_size)))
    size = 1 << size.bit_length() - 1  # widths are powers of two, so that chunks are too
    behind = jnp.roll(tokens, -1, axis=1)

    def chunk(_, part):
        hidden, behind = part
        return None, _costs(model.logits(hidden), behind, top)

    def cut(x):  # [B, T, …] -> [T / size, B, size, …]
        return jnp.moveaxis(x.reshape(rows, width // size, size, *x.shape[2:]), 1, 0)

    _, found = jax.lax.scan(chunk, None, (cut(hidden), cut(behind)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, width, *x.shape[3:])[:, :-1], found)
