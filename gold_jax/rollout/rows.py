"""The rows that are being written, on the device, and the programs that change them.

Rows are independent: each has its own slots in the cache, its own key and its own count of tokens, so that what it draws
does not depend on where it stands or on what the others do. Temperature, top-k, top-p, key, stop tokens and limits are
traced values; a program is compiled for each number of rows and slots (and, for `admit`, width of prompts).

Shapes: R rows, S slots of the cache, N most tokens of a completion, F rows that join, P width of their prompts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Cache
from gold_jax.rollout.draw import draw


class Settings(NamedTuple):
    """How tokens are drawn, all traced.

    Attributes:
        temperature, top_k, top_p: as in `rollout.engine.Engine.generate`.
        stops: int32 [any], tokens that end a row; -1 is none.
        limit: int32, most tokens of a row.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    stops: jax.Array
    limit: jax.Array


class Ledger(NamedTuple):
    """What is known of each row beside its cache.

    Attributes:
        pending: int32 [R], the token that it reads next.
        key: PRNG key [R]; what a row draws is a function of it and of how many tokens it has drawn.
        count: int32 [R], tokens drawn.
        done: bool [R]; a row that nobody has joined is done.
        tokens, logprobs: int32 and float32 [R, N], what was drawn and its log-probability under the model itself.
    """

    pending: jax.Array
    key: jax.Array
    count: jax.Array
    done: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "dtype", "rows", "slots", "new"))
def empty(key, *, config: DecoderConfig, dtype, rows: int, slots: int, new: int) -> tuple[Cache, Ledger]:
    """Rows that nobody has joined, with room for `new` tokens each."""
    zeros = jnp.zeros(rows, jnp.int32)
    keys, values = (
        tuple(jnp.zeros((rows, config.kv_heads, *shape), dtype) for _ in range(config.layers))
        for shape in ((config.head_dim, slots), (slots, config.head_dim))
    )
    ledger = Ledger(
        pending=zeros,
        key=jnp.broadcast_to(key, (rows,)),
        count=zeros,
        done=jnp.ones(rows, bool),
        tokens=jnp.zeros((rows, new), jnp.int32),
        logprobs=jnp.zeros((rows, new), jnp.float32),
    )
    return Cache(keys, values, zeros), ledger


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def admit(
    graphdef, params, cache: Cache, ledger: Ledger, tokens, lengths, pending, index, places, key
) -> tuple[Cache, Ledger]:
    """Read prompts into rows that are free.

    Args:
        graphdef, params: the model.
        cache: given away.
        ledger: of the same rows.
        tokens: int32 [F, P], all of each prompt but its last token, padded on the right.
        lengths: int32 [F], how many tokens that is.
        pending: int32 [F], the last one.
        index: int32 [F], number of the prompt among all; folded into the key.
        places: int32 [F], the rows that they join; R for none, where there are fewer prompts than F.
        key: PRNG key of all prompts.
    """
    width = tokens.shape[1]
    _, fresh = nnx.merge(graphdef, params).prefill(tokens, jnp.arange(width) < lengths[:, None], width)

    cache = Cache(
        tuple(old.at[places, :, :, :width].set(new, mode="drop") for old, new in zip(cache.keys, fresh.keys)),
        tuple(old.at[places, :, :width].set(new, mode="drop") for old, new in zip(cache.values, fresh.values)),
        cache.length.at[places].set(lengths, mode="drop"),
    )
    ledger = ledger._replace(
        pending=ledger.pending.at[places].set(pending, mode="drop"),
        key=ledger.key.at[places].set(jax.vmap(functools.partial(jax.random.fold_in, key))(index), mode="drop"),
        count=ledger.count.at[places].set(0, mode="drop"),
        done=ledger.done.at[places].set(False, mode="drop"),
    )
    return cache, ledger


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def write(
    graphdef, params, weights, cache: Cache, ledger: Ledger, settings: Settings, most, fewest
) -> tuple[Cache, Ledger, jax.Array]:
    """Draw tokens for all rows until there is something else to do.

    Args:
        graphdef, params: the model.
        weights: its `decoding_weights()`.
        cache: given away; the slots left in every row that goes on must be `most` or more.
        ledger: of the same rows.
        settings: how to draw.
        most: int32, most tokens to draw now.
        fewest: int32; ends when no more than this many rows go on.

    Returns:
        The cache, the ledger, and how many tokens were drawn.
    """
    model = nnx.merge(graphdef, params)

    def going(state):
        steps, _, ledger = state
        return (steps < most) & ((~ledger.done).sum() > fewest)

    def step(state):
        steps, cache, ledger = state
        hidden, cache = model.decode_step(ledger.pending, cache, weights)
        return (
            steps + 1,
            # A row that is done reads on without harm in its first slot, where there is always room.
            cache._replace(length=jnp.where(ledger.done, 0, cache.length)),
            _note(model.decode_logits(hidden, weights), ledger, settings),
        )

    steps, cache, ledger = jax.lax.while_loop(going, step, (jnp.int32(0), cache, ledger))
    return cache, ledger, steps


@jax.named_scope("draw")
def _note(logits: jax.Array, ledger: Ledger, settings: Settings) -> Ledger:
    """Draw one token per row and write it down; rows that are done stay as they are."""
    done, count = ledger.done, ledger.count
    keys = jax.vmap(jax.random.fold_in)(ledger.key, count)
    token = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    logprob = chosen - jax.nn.logsumexp(logits, axis=1)
    at = jnp.arange(len(token)), jnp.where(done, ledger.tokens.shape[1], count)
    after = count + ~done
    return ledger._replace(
        pending=token,
        count=after,
        done=done | (token[:, None] == settings.stops).any(axis=1) | (after == settings.limit),
        tokens=ledger.tokens.at[at].set(token, mode="drop"),
        logprobs=ledger.logprobs.at[at].set(logprob, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames="slots")
def resize(cache: Cache, ledger: Ledger, rows: jax.Array, *, slots: int) -> tuple[Cache, Ledger]:
    """Go on with some of the rows, and with more or fewer slots, enough for what these rows hold.

    Args:
        cache, ledger: of R rows.
        rows: int32 [any], which to keep, in their new order.
        slots: of the new cache.
    """

    def fit(old: jax.Array, axis: int) -> jax.Array:
        kept = jax.lax.slice_in_dim(old[rows], 0, min(slots, old.shape[axis]), axis=axis)
        return jnp.pad(kept, [(0, slots - kept.shape[axis] if other == axis else 0) for other in range(4)])

    keys, values = (tuple(fit(old, axis) for old in both) for both, axis in ((cache.keys, 3), (cache.values, 2)))
    cache = Cache(keys, values, cache.length[rows])
    return cache, jax.tree.map(lambda old: old[rows], ledger)


__all__ = ["Ledger", "Settings", "admit", "empty", "resize", "write"]
