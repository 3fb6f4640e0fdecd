"""The jitted programs of a server: prefill, decode some tokens of all slots, and the log-probabilities of prompts.

The cache and the state of the slots are those of `rollout.decode_state`; what differs is that each row has settings of its
own, that a call decodes a few tokens and hands them to the host, and that the likeliest tokens are kept on request.
The settings of requests are traced and choose at run time which part of a program runs: `decode_round` is compiled once for
each number of slots, `prefill` and `score_tokens` once for each width of prompts. One device.

Shapes: R slots, N tokens of a round, K = `MOST_TOP` likeliest tokens, B prompts, T their width, V vocabulary.
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

MOST_TOP = 20  # likeliest tokens that are kept; fewer where the vocabulary is smaller
_LOGITS = 2**24  # logits that `score_tokens` holds at once, about
_NO_TOP_K = np.iinfo(np.int32).max


class Drawn(NamedTuple):
    """Tokens with their log-probabilities at temperature 1, and the K likeliest in their place, likeliest first."""

    tokens: jax.Array  # int32 [R, N]
    logprobs: jax.Array  # float32 [R, N]
    top_tokens: jax.Array  # int32 [R, N, K]
    top_logprobs: jax.Array  # float32 [R, N, K]


def row_options(temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, stops, limit) -> SamplingOptions:
    """`SamplingOptions` whose fields are each row's own [R], stops [K]; temperature 0 is greedy, top_k 0 and top_p 1 are off."""
    temperature = temperature.astype(np.float32)
    temperature = np.where(temperature < np.finfo(np.float32).tiny, np.float32(0), temperature)  # divided by, it is 0
    drawn = temperature > 0
    return SamplingOptions(
        temperature,
        np.where(drawn & (top_k > 0), top_k, _NO_TOP_K).astype(np.int32),
        # A share of more than all is never reached: nothing is left out.
        np.where(drawn & (top_p < 1), top_p, 2).astype(np.float32),
        np.asarray(stops, np.int32),
        limit.astype(np.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "int8_cache"))
def prefill(graphdef, params, tokens: jax.Array, lengths: jax.Array, *, int8_cache: bool = False) -> Cache:
    """The cache [B, T slots] of tokens int32 [B, T], of which the first `lengths` [B] of each row count."""
    width = tokens.shape[1]
    _, cache = merge(graphdef, params).prefill(tokens, jnp.arange(width) < lengths[:, None], width)
    cache = cache._replace(length=lengths)
    return cache.to_int8() if int8_cache else cache


@functools.partial(jax.jit, donate_argnames="cache")
def insert(
    cache: Cache, state: DecodeState, prefilled: Cache, source, row_index, joining, next_token, keys
) -> tuple[Cache, DecodeState]:
    """Copies prefilled prompts into rows, of which nothing else is left.

    Args:
        cache, state: of R rows; the cache is donated.
        prefilled: of B prompts, in no more slots than the cache has.
        source, row_index: int32 [R], which prompt goes into which row; only the first `joining` (int32) of them.
        next_token, keys: int32 and PRNG keys [R], the last token of each one's prompt, and its key.
    """

    def put(at, cache):
        def copy(old, new):
            one = jax.lax.dynamic_index_in_dim(new, source[at])
            # All of the row: what stood in its other slots may be no number, which a weight of 0 does not make one.
            one = jnp.pad(one, [(0, size - filled) for size, filled in zip((1, *old.shape[1:]), one.shape)])
            return jax.lax.dynamic_update_slice(old, one, (row_index[at],) + (0,) * (old.ndim - 1))

        return jax.tree.map(copy, cache, prefilled)

    cache = jax.lax.fori_loop(0, joining, put, cache)
    rows = jnp.where(jnp.arange(len(row_index)) < joining, row_index, len(row_index))  # the others are dropped
    new = {"next_token": next_token, "key": keys, "count": 0, "done": False}
    joined = {name: getattr(state, name).at[rows].set(value, mode="drop") for name, value in new.items()}
    return cache, state._replace(**joined)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode_round(
    graphdef, params, weights, cache: Cache, state: DecodeState, options, done, max_steps, min_active, wants_top
):
    """Decode up to `max_steps` tokens of all rows that are not `done` (bool [R]), while more than `min_active` are unfinished.

    Returned are the cache, the state, `Drawn` (of as many tokens as `state.tokens` has columns) and int32 [R], how many
    of them each row drew. Without `wants_top` (bool) the likeliest tokens are left zero. The cache is donated.
    """
    model = merge(graphdef, params)
    (rows, length), top = state.tokens.shape, _top(model)
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
        new = _logprobs(logits, token, top, wants_top)
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
    greedy, likeliest = options.temperature == 0, sample_tokens(logits, state.key)
    keys = jax.vmap(jax.random.fold_in)(state.key, state.count)
    temperature = jnp.where(greedy, 1, options.temperature)[:, None]
    top_k, top_p = options.top_k, options.top_p

    def sample(*filters):
        return lambda: sample_tokens(logits, keys, temperature, *filters)

    ways = [lambda: likeliest, sample(), sample(top_k), sample(None, top_p), sample(top_k, top_p)]
    filters = (top_k < _NO_TOP_K).any() + 2 * (top_p < 1).any()
    return jnp.where(greedy, likeliest, jax.lax.switch(jnp.where(greedy.all(), 0, 1 + filters), ways))


def _top(model) -> int:
    """K."""
    return min(MOST_TOP, model.config.vocab_size)


def _logprobs(logits: jax.Array, tokens: jax.Array, top: int, wants_top: jax.Array) -> Drawn:
    """`Drawn` of tokens [...] that logits [..., V] gave, with the `top` likeliest in their place if `wants_top`."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - total

    def likeliest():
        best, best_tokens = jax.lax.top_k(logits, top)
        return best_tokens.astype(jnp.int32), best - total[..., None]

    shape = (*tokens.shape, top)
    nothing = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))  # noqa: E731
    return Drawn(tokens, own, *jax.lax.cond(wants_top, likeliest, nothing))


@jax.jit
def row_keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """PRNG keys [R] of seeds and indices int32 [R]: those that `Engine.generate` makes of a seed and a prompt's index."""
    return jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seed, index)


@functools.partial(jax.jit, static_argnames="graphdef")
def score_tokens(graphdef, params, tokens: jax.Array, lengths: jax.Array, wants_top) -> Drawn:
    """Log-probabilities of prompts, tokens int32 [B, T] of `lengths` [B]: `Drawn` [B, T - 1].

    Column `t` is that of token `t + 1`: the first token of a row has none. `wants_top` as in `decode_round`.
    """
    model = merge(graphdef, params)
    rows, width = tokens.shape
    hidden = model(tokens, jnp.arange(width) < lengths[:, None])
    size = max(1, min(width, _LOGITS // (rows * model.config.vocab_size)))
    size = 1 << size.bit_length() - 1  # widths are powers of two, so that chunks are too
    behind = jnp.roll(tokens, -1, axis=1)

    def chunk(_, part):
        hidden, behind = part
        return None, _logprobs(model.logits(hidden), behind, _top(model), wants_top)

    def cut(x):  # [B, T, …] -> [T / size, B, size, …]
        return jnp.moveaxis(x.reshape(rows, width // size, size, *x.shape[2:]), 1, 0)

    _, found = jax.lax.scan(chunk, None, (cut(hidden), cut(behind)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, width, *x.shape[3:])[:, :-1], found)
