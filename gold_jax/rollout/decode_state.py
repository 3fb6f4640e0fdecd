"""The device side of sampling: the state of the rows being decoded, and the jitted programs that change it.

Continuous batching: R decode slots ("rows") hold prompts in any order and at any length. Rows are independent: each has
its own cache slots, PRNG key and token count, so that what a row samples depends neither on its index nor on the other
rows. Temperature, top-k, top-p, keys, stop tokens and limits are traced values: changing them compiles nothing (turning
one of the first three on or off does). A program is compiled for each number of rows and slots (and, for
`prefill_into_slots`, of prompts and their width). On a mesh every row shard has an equal part of the rows, which stay
there, so that caches are never sent; `DecodeState` is replicated between programs, and sharded by rows while they decode.

Shapes: R rows, S slots of the cache, N most tokens of a completion, F rows to prefill, U prompts that they answer, P
width of these.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gold_jax.models.config import DecoderConfig
from gold_jax.models.decoder import Cache
from gold_jax.models.functional import merge
from gold_jax.models.quantization import Int8
from gold_jax.rollout.token_sampling import sample_tokens
from gold_jax.sharding.collectives import map_shards
from gold_jax.sharding.placement import ROW_AXES, Placement

# Tokens that are decoded between checks of whether any row is unfinished, at most.
TOKENS_PER_CHECK = 8


def tokens_per_check(platform: str) -> int:
    """Tokens between two checks on a platform: 1, but on GPUs, whose host decides a loop's condition and waits for it."""
    return 1 if platform in ("cpu", "tpu") else TOKENS_PER_CHECK


class SamplingOptions(NamedTuple):
    """How tokens are sampled; all traced."""

    temperature: jax.Array | None  # this and the next two as in `token_sampling.sample_tokens`, None being off
    top_k: jax.Array | None
    top_p: jax.Array | None
    stops: jax.Array  # int32 [any], tokens that end a row; -1 is none
    limit: jax.Array  # int32, most tokens of a row


def sampling_filters(temperature: float, top_k: int, top_p: float) -> tuple:
    """The first three of `SamplingOptions`, of the numbers that `rollout.engine.Engine.generate` takes: None where one is off."""
    temperature, top_p = np.float32(temperature), np.float32(top_p)
    if temperature == 0:
        return None, None, None
    return temperature, np.int32(top_k) if top_k else None, top_p if top_p < 1 else None


class DecodeState(NamedTuple):
    """The state of each row beside its cache."""

    next_token: jax.Array  # int32 [R], sampled (or the prompt's last) but not yet fed to the model
    key: jax.Array  # PRNG key [R]; sample number `count` takes `fold_in(key, count)`, and so is independent of timing
    count: jax.Array  # int32 [R], tokens sampled so far
    done: jax.Array  # bool [R]; an empty slot is done
    tokens: jax.Array  # int32 [R, N], the samples
    logprobs: jax.Array  # float32 [R, N], their log-probabilities at temperature 1, unfiltered
    sampling_logprobs: jax.Array | None = None  # float32 [R, N], the same at the sampling temperature; None: not kept


@functools.partial(
    jax.jit, static_argnames=("config", "dtype", "placement", "rows", "slots", "new", "sampling_logprobs", "int8_cache")
)
def empty_slots(
    key,
    *,
    config: DecoderConfig,
    dtype,
    placement: Placement | None = None,
    rows: int,
    slots: int,
    new: int,
    sampling_logprobs: bool = False,
    int8_cache: bool = False,
) -> tuple[Cache, DecodeState]:
    """Empty decode slots with room for `new` tokens each, and with `sampling_logprobs` for those of `DecodeState`.

    With `int8_cache` keys and values are held in 8 bits.
    """
    heads = config.kv_heads * (1 if placement is None else placement.kv_repeats(config.heads, config.kv_heads))
    zeros, size = jnp.zeros(rows, jnp.int32), config.head_dim

    def held() -> Cache:
        keys, values = (
            tuple(jnp.zeros((rows, heads, *shape), dtype) for _ in range(config.layers))
            for shape in ((size, slots), (slots, size))
        )
        cache = Cache(keys, values, zeros)
        return cache.to_int8() if int8_cache else cache

    samples = (jnp.zeros((rows, new), dtype) for dtype in (jnp.int32, *(jnp.float32,) * (1 + sampling_logprobs)))
    state = DecodeState(zeros, jnp.broadcast_to(key, (rows,)), zeros, jnp.ones(rows, bool), *samples)
    # Its shapes alone: XLA rounds constants while it compiles, and takes minutes for those of a large cache.
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(held))
    return _constrain(placement, cache, state)


def cache_shardings(placement: Placement, cache: Cache) -> Cache:
    """The shardings of a cache: rows over the row shards, heads over `tensor`."""
    rows, heads = jax.tree.leaves(cache.keys)[0].shape[:2]
    axes = placement.row_axes(rows), placement.head_axis(heads)
    return jax.tree.map(lambda x: placement.sharding(*axes[: x.ndim]), cache)


def _constrain(placement: Placement | None, cache: Cache, replicated):
    """The cache with its shardings imposed, and what every device has a full copy of."""
    if placement is None:
        return cache, replicated
    constrain = jax.lax.with_sharding_constraint
    return constrain(cache, cache_shardings(placement, cache)), constrain(replicated, placement.replicated)


def _per_shard(placement: Placement | None, change: Callable, cache: Cache, row_index, *more: Cache) -> Cache:
    """`change(cache, row_index, *more)`, on a mesh in every shard by itself, where indices count the shard's own rows."""
    if placement is None:
        return change(cache, row_index, *more)
    specs = jax.tree.map(lambda sharding: sharding.spec, cache_shardings(placement, cache))
    by_row, own = specs.length, len(cache.length) // placement.row_shards

    def local(cache, row_index, *more):
        return change(cache, row_index - jax.lax.axis_index(ROW_AXES) * own, *more)

    return map_shards(placement, local, (specs, by_row, *(specs,) * len(more)), specs)(cache, row_index, *more)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def prefill_into_slots(
    graphdef,
    params,
    cache: Cache,
    decode_state: DecodeState,
    tokens,
    lengths,
    next_token,
    index,
    row_index,
    source,
    key,
) -> tuple[Cache, DecodeState]:
    """Prefill prompts into free rows.

    Args:
        graphdef, params: the model.
        cache, decode_state: of R rows; the cache is donated.
        tokens: int32 [U, P], all of each prompt but its last token, padded on the right.
        lengths: int32 [U], how many tokens that is.
        next_token: int32 [F], the last token of each row's prompt, the first that decoding feeds.
        index: int32 [F], the row's index in the call; folded into the key.
        row_index: int32 [F], the rows that they join; R for none, where there are fewer than F.
        source: int32 [F], which of the U prompts a row has; None: each its own (F = U). On a mesh the rows that join a
            shard's, and their prompts, stand in its part of F and of U.
        key: PRNG key of all rows; or [F], each row's own, which nothing is folded into.
    """
    width = tokens.shape[1]
    model = merge(graphdef, params)
    placement = model.placement
    if placement is not None:
        tokens, lengths = (placement.shard_rows(x) for x in (tokens, lengths))
    _, prefilled = model.prefill(tokens, jnp.arange(width) < lengths[:, None], width)
    prefilled = prefilled._replace(length=lengths)
    if any(isinstance(keys, Int8) for keys in cache.keys):
        prefilled = prefilled.to_int8()
    if source is not None:
        prefilled = _per_shard(placement, functools.partial(_gather_rows, width), prefilled, source)
    cache = _per_shard(placement, _scatter_rows, cache, row_index, prefilled)

    def joined(name, new):
        return getattr(decode_state, name).at[row_index].set(new, mode="drop")

    decode_state = decode_state._replace(
        next_token=joined("next_token", next_token),
        key=joined("key", key if key.ndim else jax.vmap(functools.partial(jax.random.fold_in, key))(index)),
        count=joined("count", 0),
        done=joined("done", False),
    )
    return _constrain(placement, cache, decode_state)


def _scatter_rows(cache: Cache, row_index: jax.Array, prefilled: Cache) -> Cache:
    """The cache with some rows overwritten: their first slots, and zeros behind; indices beyond the last row are dropped."""
    overwritten = jnp.zeros(len(cache.length), bool).at[row_index].set(True, mode="drop")

    def put(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
        # What an earlier row left there may be no number, which a weight of 0 does not make one.
        old = jnp.where(jnp.expand_dims(overwritten, range(1, old.ndim)), jnp.zeros((), old.dtype), old)
        return old.at[row_index, *(slice(None),) * (axis - 1), : prefilled.slots].set(new, mode="drop")

    return cache.map_slots(put, prefilled)._replace(
        length=cache.length.at[row_index].set(prefilled.length, mode="drop")
    )


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode_until(
    graphdef, params, weights, cache, decode_state, options, max_steps, min_active, min_active_per_shard
) -> tuple[Cache, DecodeState, jax.Array]:
    """Decode all rows in a `while_loop` until the host has something to do (refill, shrink or grow).

    Rows that end while others go on are decoded with them, for up to `TOKENS_PER_CHECK` tokens on GPUs.

    Args:
        graphdef, params, weights: the model, and its `decoding_weights()`.
        cache, decode_state: of the same rows. The cache is donated; the slots left in every row that goes on must be
            `max_steps` or more, or all that the row may still draw.
        options, max_steps: `SamplingOptions`; int32, most tokens to decode now (the third result says how many it were).
        min_active, min_active_per_shard: int32; stops when at most this many rows are unfinished, or at most this many in
            every shard.
    """
    model = merge(graphdef, params)
    shards = 1 if model.placement is None else model.placement.row_shards

    at_once = tokens_per_check(model.platform)

    def keep_going(state):
        steps, _, decode_state = state
        each = (~decode_state.done).reshape(shards, -1).sum(axis=1)
        room = steps + at_once <= max_steps
        return room & (each.sum() > min_active) & (each.max() > min_active_per_shard)

    def step(_, state):
        cache, decode_state = state
        hidden, cache = model.decode_step(decode_state.next_token, cache, weights)
        # Shapes are static, so finished rows are decoded too: into slot 0, which is always there and no longer needed.
        cache = cache._replace(length=jnp.where(decode_state.done, 0, cache.length))
        decode_state = _sample_and_record(model.decode_logits(hidden, weights), decode_state, options)
        return _shard_by_rows(model.placement, cache, decode_state)

    def steps_at_once(state):
        steps, *state = state
        return steps + at_once, *(step(0, state) if at_once == 1 else jax.lax.fori_loop(0, at_once, step, tuple(state)))

    before = jnp.int32(0), *_shard_by_rows(model.placement, cache, decode_state)
    steps, cache, decode_state = jax.lax.while_loop(keep_going, steps_at_once, before)
    cache, (decode_state, steps) = _constrain(model.placement, cache, (decode_state, steps))
    return cache, decode_state, steps


def _shard_by_rows(placement: Placement | None, cache: Cache, decode_state: DecodeState) -> tuple[Cache, DecodeState]:
    """Both with the shardings imposed that they have while rows decode: each device has its own rows."""
    if placement is None:
        return cache, decode_state
    by_row = placement.sharding(placement.row_axes(len(decode_state.done)))
    constrain = jax.lax.with_sharding_constraint
    return constrain(cache, cache_shardings(placement, cache)), constrain(decode_state, by_row)


@jax.named_scope("draw")
def _sample_and_record(logits: jax.Array, decode_state: DecodeState, options: SamplingOptions) -> DecodeState:
    """Sample one token per row and record it; finished rows keep what they have."""
    done, count = decode_state.done, decode_state.count
    keys = jax.vmap(jax.random.fold_in)(decode_state.key, count)
    token = sample_tokens(logits, keys, options.temperature, options.top_k, options.top_p)

    def logprob_of(logits):
        return jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    logprob, sampling_logprobs = logprob_of(logits), decode_state.sampling_logprobs
    # Compared, not scattered: on a mesh a scatter would gather what all devices' rows have drawn.
    here = ~done[:, None] & (count[:, None] == jnp.arange(decode_state.tokens.shape[1]))
    after = count + ~done
    if sampling_logprobs is not None:
        at_temperature = logprob if options.temperature is None else logprob_of(logits / options.temperature)
        sampling_logprobs = jnp.where(here, at_temperature[:, None], sampling_logprobs)
    return decode_state._replace(
        next_token=token,
        count=after,
        done=done | (token[:, None] == options.stops).any(axis=1) | (after == options.limit),
        tokens=jnp.where(here, token[:, None], decode_state.tokens),
        logprobs=jnp.where(here, logprob[:, None], decode_state.logprobs),
        sampling_logprobs=sampling_logprobs,
    )


@functools.partial(jax.jit, static_argnames=("placement", "slots"))
def resize_slots(cache: Cache, decode_state: DecodeState, rows, *, placement: Placement | None = None, slots: int):
    """Keep some of the rows, with more or fewer slots, at least as many as these rows have filled.

    `rows`, int32 [any], are those to keep, in their new order; on a mesh as many of each shard, in the order of shards.
    """
    cache = _per_shard(placement, functools.partial(_gather_rows, slots), cache, rows)
    return _constrain(placement, cache, jax.tree.map(lambda old: old[rows], decode_state))


def _gather_rows(slots: int, cache: Cache, rows: jax.Array) -> Cache:
    """Some rows of a cache, cut or padded to `slots`."""

    def fit(axis: int, old: jax.Array) -> jax.Array:
        kept = jax.lax.slice_in_dim(old[rows], 0, min(slots, old.shape[axis]), axis=axis)
        return jnp.pad(kept, [(0, slots - kept.shape[axis] if other == axis else 0) for other in range(old.ndim)])

    return cache.map_slots(fit)._replace(length=cache.length[rows])
