"""The jitted programs of a server: decode some tokens of all slots, and the log-probabilities of prompts.

The cache and the state of the slots are those of `rollout.decode_state`; what differs is that each row has settings of its
own, that a call decodes a few tokens and hands them to the host, and that the likeliest tokens are kept where asked for.
One device.

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

_LOGITS = 2**24  # logits that `score_tokens` holds at once, about


class Drawn(NamedTuple):
    """Tokens with their log-probabilities at temperature 1, and the K likeliest in their place, likeliest first."""

    tokens: jax.Array  # int32 [R, N]
    logprobs: jax.Array  # float32 [R, N]
    top_tokens: jax.Array  # int32 [R, N, K]
    top_logprobs: jax.Array  # float32 [R, N, K]


def row_options(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, stops, limit) -> SamplingOptions:
    """`SamplingOptions` whose fields are each row's own [R], stops [K]; temperature 0 is greedy, top_k 0 and top_p 1 are off.

    What no row uses is None, and no part of the program.
    """
    drawn = temperature > 0
    return SamplingOptions(
        temperature.astype(np.float32) if drawn.any() else None,
        np.where(top_k > 0, top_k, np.iinfo(np.int32).max).astype(np.int32) if (drawn & (top_k > 0)).any() else None,
        # A share of more than all is never reached: nothing is left out.
        np.where(top_p < 1, top_p, 2).astype(np.float32) if (drawn & (top_p < 1)).any() else None,
        np.asarray(stops, np.int32),
        limit.astype(np.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "top"), donate_argnames="cache")
def decode_round(
    graphdef, params, weights, cache: Cache, state: DecodeState, options, done, max_steps, min_active, *, top
):
    """Decode up to `max_steps` tokens of all rows that are not `done` (bool [R]), while more than `min_active` go on.

    Returned are the cache, the state, `Drawn` (of as many tokens as `state.tokens` has columns) and int32 [R], how many
    of them each row drew. `top` (static) is K; the cache is donated.
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
    """`Drawn` of tokens [...] that logits [..., V] gave, with the `top` likeliest in their place."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total
    best, best_tokens = jax.lax.top_k(logits, top)
    return Drawn(tokens, own, best_tokens.astype(jnp.int32), best - total[..., None])


@jax.jit
def row_keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """PRNG keys [R] of seeds and indices int32 [R]: those that `Engine.generate` makes of a seed and a prompt's index."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed, index)


@functools.partial(jax.jit, static_argnames=("graphdef", "top"))
def score_tokens(graphdef, params, tokens: jax.Array, lengths: jax.Array, *, top: int) -> Drawn:
    """Of tokens int32 [B, T], the first `lengths` [B] of each row, what each costs after those before it: `Drawn` [B, T - 1].

    The first of a row has no cost: column `t` is that of token `t + 1`. `top` (static) is K.
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
