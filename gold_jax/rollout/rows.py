"""The rows that are being written, on the device, and the programs that change them.

Rows are independent: each has its own slots in the cache, its own key and its own count of tokens, so that what it draws
does not depend on where it stands or on what the others do. Temperature, top-k, top-p, key, stop tokens and limits are
traced values; a program is compiled for each number of rows and slots (and, for `admit`, width of prompts). On a mesh each shard
has an equal part of the rows, which stay there: caches never travel. What is known of all rows is known everywhere.

Shapes: R rows, S slots of the cache, N most tokens of a completion, F rows that join, P width of their prompts.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Cache
from gold_jax.models.functional import merge
from gold_jax.parallel.exchange import over_rows
from gold_jax.parallel.layout import ROWS, Placement
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


@functools.partial(jax.jit, static_argnames=("config", "dtype", "placement", "rows", "slots", "new"))
def empty(
    key, *, config: DecoderConfig, dtype, placement: Placement | None = None, rows: int, slots: int, new: int
) -> tuple[Cache, Ledger]:
    """Rows that nobody has joined, with room for `new` tokens each."""
    heads = config.kv_heads * (1 if placement is None else placement.kv_copies(config.heads, config.kv_heads))
    zeros = jnp.zeros(rows, jnp.int32)
    keys, values = (
        tuple(jnp.zeros((rows, heads, *shape), dtype) for _ in range(config.layers))
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
    return _settled(placement, Cache(keys, values, zeros)), _everywhere(placement, ledger)


def cache_shardings(placement: Placement, cache: Cache) -> Cache:
    """Where a cache lies on a mesh: rows over shards, heads over `tensor`."""
    rows, heads = cache.keys[0].shape[:2]
    by_head = placement.on(placement.rows(rows), placement.heads(heads))
    by_heads = (by_head,) * len(cache.keys)
    return Cache(by_heads, by_heads, placement.on(placement.rows(rows)))


def _settled(placement: Placement | None, cache: Cache) -> Cache:
    """A cache shared out over a mesh."""
    if placement is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, cache_shardings(placement, cache))


def _everywhere(placement: Placement | None, tree):
    return tree if placement is None else jax.lax.with_sharding_constraint(tree, placement.everywhere)


def _in_shards(placement: Placement | None, change: Callable, cache: Cache, places: jax.Array, *more: Cache) -> Cache:
    """`change(cache, places, *more)`, on a mesh in every shard by itself, where places number the shard's own rows."""
    if placement is None:
        return change(cache, places, *more)
    rows, heads = cache.keys[0].shape[:2]
    by_head, by_row = P(ROWS, placement.heads(heads)), P(ROWS)
    specs = Cache(by_head, by_head, by_row)

    def local(cache, places, *more):
        return change(cache, places - jax.lax.axis_index(ROWS) * (rows // placement.shards), *more)

    return over_rows(placement, local, (specs, by_row, *(specs,) * len(more)), specs)(cache, places, *more)


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
        places: int32 [F], the rows that they join; R for none, where there are fewer prompts than F. On a mesh the prompts
            that join a shard's rows stand in its part of F.
        key: PRNG key of all prompts.
    """
    width = tokens.shape[1]
    model = merge(graphdef, params)
    where = model.placement
    if where is not None:
        tokens, lengths = (where.by_rows(x) for x in (tokens, lengths))
    _, fresh = model.prefill(tokens, jnp.arange(width) < lengths[:, None], width)
    cache = _in_shards(where, _put_in, cache, places, fresh._replace(length=lengths))
    ledger = ledger._replace(
        pending=ledger.pending.at[places].set(pending, mode="drop"),
        key=ledger.key.at[places].set(jax.vmap(functools.partial(jax.random.fold_in, key))(index), mode="drop"),
        count=ledger.count.at[places].set(0, mode="drop"),
        done=ledger.done.at[places].set(False, mode="drop"),
    )
    return _settled(where, cache), _everywhere(where, ledger)


def _put_in(cache: Cache, places: jax.Array, fresh: Cache) -> Cache:
    """A cache with the first slots of some rows, those there are, taken from another."""
    width = fresh.values[0].shape[2]
    return Cache(
        tuple(old.at[places, :, :, :width].set(new, mode="drop") for old, new in zip(cache.keys, fresh.keys)),
        tuple(old.at[places, :, :width].set(new, mode="drop") for old, new in zip(cache.values, fresh.values)),
        cache.length.at[places].set(fresh.length, mode="drop"),
    )


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def write(
    graphdef, params, weights, cache: Cache, ledger: Ledger, settings: Settings, most, fewest, fewest_each
) -> tuple[Cache, Ledger, jax.Array]:
    """Draw tokens for all rows until there is something else to do.

    Args:
        graphdef, params: the model.
        weights: its `decoding_weights()`.
        cache: given away; the slots left in every row that goes on must be `most` or more.
        ledger: of the same rows.
        settings: how to draw.
        most: int32, most tokens to draw now.
        fewest: int32; ends when no more than this many rows go on …
        fewest_each: int32; … or no more than this many in any shard of the mesh.

    Returns:
        The cache, the ledger, and how many tokens were drawn.
    """
    model = merge(graphdef, params)
    shards = 1 if model.placement is None else model.placement.shards

    def going(state):
        steps, _, ledger = state
        each = (~ledger.done).reshape(shards, -1).sum(axis=1)
        return (steps < most) & (each.sum() > fewest) & (each.max() > fewest_each)

    def step(state):
        steps, cache, ledger = state
        hidden, cache = model.decode_step(ledger.pending, cache, weights)
        # A row that is done reads on without harm in its first slot, where there is always room.
        cache = cache._replace(length=jnp.where(ledger.done, 0, cache.length))
        ledger = _note(model.decode_logits(hidden, weights), ledger, settings)
        return steps + 1, _settled(model.placement, cache), _everywhere(model.placement, ledger)

    steps, cache, ledger = jax.lax.while_loop(going, step, (jnp.int32(0), cache, ledger))
    return _settled(model.placement, cache), *_everywhere(model.placement, (ledger, steps))


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


@functools.partial(jax.jit, static_argnames=("placement", "slots"))
def resize(
    cache: Cache, ledger: Ledger, rows: jax.Array, *, placement: Placement | None = None, slots: int
) -> tuple[Cache, Ledger]:
    """Go on with some of the rows, and with more or fewer slots, enough for what these rows hold.

    Args:
        cache, ledger: of R rows.
        rows: int32 [any], which to keep, in their new order; on a mesh as many of each shard, in the order of the shards.
        placement: of the model.
        slots: of the new cache.
    """
    cache = _in_shards(placement, functools.partial(_taken, slots), cache, rows)
    ledger = jax.tree.map(lambda old: old[rows], ledger)
    return _settled(placement, cache), _everywhere(placement, ledger)


def _taken(slots: int, cache: Cache, rows: jax.Array) -> Cache:
    """Some rows of a cache, with as many slots."""

    def fit(old: jax.Array, axis: int) -> jax.Array:
        kept = jax.lax.slice_in_dim(old[rows], 0, min(slots, old.shape[axis]), axis=axis)
        return jnp.pad(kept, [(0, slots - kept.shape[axis] if other == axis else 0) for other in range(4)])

    keys, values = (tuple(fit(old, axis) for old in both) for both, axis in ((cache.keys, 3), (cache.values, 2)))
    return Cache(keys, values, cache.length[rows])


__all__ = ["Ledger", "Settings", "admit", "cache_shardings", "empty", "resize", "write"]
