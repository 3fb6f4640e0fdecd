"""Output projections applied a chunk of positions at a time, so that no array of all positions × vocabulary exists.

Both functions loop over the chunks that hold live positions alone: packed to the front, padding costs nothing, and
shapes stay static. Letters: `N` positions, `C` positions of a chunk, `D` width, `V` rows of the head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def head_logits(hidden: jax.Array, head: jax.Array | None, softcap: float | None = None) -> jax.Array:
    """`hidden [..., D] · head [V, D]ᵀ`, accumulated in float32, with the optional soft cap: float32 `[..., V]`.

    Without a head, `hidden` are logits already.
    """
    if head is None:
        return hidden.astype(jnp.float32)
    logits = _multiply("...d,vd->...v", hidden, head.astype(hidden.dtype))
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _multiply(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum accumulated in float32. Float32 factors are multiplied as such: GPUs and TPUs would round them first."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def chunk_positions(positions: Any, live: int | jax.Array, chunk: int) -> tuple[Any, jax.Array]:
    """Pads every `[N, ...]` leaf to whole chunks; returns it with the number of chunks that hold a live position."""
    size = jax.tree.leaves(positions)[0].shape[0]
    extra = -size % chunk
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)), positions)
    return padded, (live + chunk - 1) // chunk


def _slice(tree, start, chunk):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_chunks(
    fn: Callable,
    chunk: int,
    hidden: jax.Array,
    head: jax.Array | None,
    scale: jax.Array,
    shared: Any,
    positions: Any,
    live,
):
    """Sums `fn` over chunks of positions, and takes the gradient in the same pass.

    A scalar's gradient is known up to a factor before anyone asks for it. So each chunk goes forward and backward at
    once, nothing is recomputed, and one chunk's logits are all that is ever held; the head's gradient is accumulated in
    place, in float32. Without differentiation only the forward half runs.

    Args:
      fn: `fn(hidden @ headᵀ [C, V], scale [C], shared, positions) -> (scalar, {name: scalar})`. It must ignore padding
        positions by itself (a weight of zero).
      chunk: `C`.
      hidden: `[N, D]`, live positions first.
      head: `[V, D]`, or None where `hidden` are logits.
      scale: `[N]`, a second argument per position that is differentiated.
      shared: arrays that every chunk sees whole (not differentiated).
      positions: arrays `[N, ...]` cut along with `hidden` (not differentiated).
      live: number of live positions, an integer scalar.

    Returns:
      The sum, and the sums of the parts (not differentiated).
    """
    (hidden, scale, positions), count = chunk_positions((hidden, scale, positions), live, chunk)

    def step(i, carry):
        h, x, p = _slice((hidden, scale, positions), i * chunk, chunk)
        return jax.tree.map(jnp.add, carry, fn(head_logits(h, head), x, shared, p))

    return jax.lax.fori_loop(0, count, step, _zeros(fn, chunk, hidden, head, scale, shared, positions))


def _zeros(fn, chunk, hidden, head, scale, shared, positions):
    """What `fn` returns, as zeros: the sum before the first chunk."""
    h, x, p = _slice((hidden, scale, positions), 0, chunk)
    shapes = jax.eval_shape(lambda: fn(head_logits(h, head), x, shared, p))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _sum_forward(fn, chunk, hidden, head, scale, shared, positions, live):
    size = hidden.shape[0]
    (hidden, scale, positions), count = chunk_positions((hidden, scale, positions), live, chunk)
    weight = None if head is None else head.astype(hidden.dtype)

    def step(i, carry):
        total, d_hidden, d_head, d_scale = carry
        h, x, p = _slice((hidden, scale, positions), i * chunk, chunk)
        logits = head_logits(h, weight)
        value, pullback, parts = jax.vjp(lambda logits, x: fn(logits, x, shared, p), logits, x, has_aux=True)
        d_logits, d_x = pullback(jnp.ones_like(value))
        d_head, d_h = _through_head(d_head, d_logits, h, weight)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        total = jax.tree.map(jnp.add, total, (value, parts))
        return total, put(d_hidden, d_h.astype(d_hidden.dtype)), d_head, put(d_scale, d_x)

    start = (
        _zeros(fn, chunk, hidden, head, scale, shared, positions),
        jnp.zeros_like(hidden),
        _zero_gradient(head),
        jnp.zeros_like(scale),
    )
    total, d_hidden, d_head, d_scale = jax.lax.fori_loop(0, count, step, start)
    return total, (d_hidden[:size], _like_head(d_head, head), d_scale[:size])


def _through_head(d_head, d_logits: jax.Array, hidden: jax.Array, weight: jax.Array | None):
    """The head's gradient with one chunk's added, and the chunk's own; without a head the logits' gradient is that."""
    if weight is None:
        return None, d_logits
    d_logits = d_logits.astype(hidden.dtype)
    return d_head + _multiply("cv,cd->vd", d_logits, hidden), _multiply("cv,vd->cd", d_logits, weight)


def _zero_gradient(head: jax.Array | None) -> jax.Array | None:
    return None if head is None else jnp.zeros(head.shape, jnp.float32)


def _like_head(gradient: jax.Array | None, head: jax.Array | None) -> jax.Array | None:
    return None if head is None else gradient.astype(head.dtype)


def _sum_backward(fn, chunk, residuals, cotangent):
    d_hidden, d_head, d_scale = residuals
    factor = cotangent[0]
    scaled = jax.tree.map(lambda g: g * factor.astype(g.dtype), (d_hidden, d_head, d_scale))
    return (*scaled, None, None, None)


sum_over_chunks.defvjp(_sum_forward, _sum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_over_chunks(
    fn: Callable, chunk: int, hidden: jax.Array, head: jax.Array | None, positions: Any, live
) -> jax.Array:
    """One number per position from its logits; the backward pass makes each chunk's logits anew.

    Args:
      fn: `fn(hidden @ headᵀ [C, V], positions) -> [C]`.
      chunk: `C`.
      hidden: `[N, D]`, live positions first.
      head: `[V, D]`, or None where `hidden` are logits.
      positions: arrays `[N, ...]` cut along with `hidden` (not differentiated).
      live: number of live positions.

    Returns:
      `[N]` float32; zero beyond the last live chunk.
    """
    size = hidden.shape[0]
    (hidden, positions), count = chunk_positions((hidden, positions), live, chunk)

    def step(i, out):
        h, p = _slice((hidden, positions), i * chunk, chunk)
        return jax.lax.dynamic_update_slice_in_dim(out, fn(head_logits(h, head), p), i * chunk, 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros(hidden.shape[0], jnp.float32))[:size]


def _map_forward(fn, chunk, hidden, head, positions, live):
    return map_over_chunks(fn, chunk, hidden, head, positions, live), (hidden, head, positions, live)


def _map_backward(fn, chunk, residuals, cotangent):
    hidden, head, positions, live = residuals
    size = hidden.shape[0]
    (hidden, positions, cotangent), count = chunk_positions((hidden, positions, cotangent), live, chunk)
    weight = None if head is None else head.astype(hidden.dtype)

    def step(i, carry):
        d_hidden, d_head = carry
        h, p, c = _slice((hidden, positions, cotangent), i * chunk, chunk)
        _, pullback = jax.vjp(lambda logits: fn(logits, p), head_logits(h, weight))
        d_head, d_h = _through_head(d_head, pullback(c)[0], h, weight)
        return jax.lax.dynamic_update_slice_in_dim(d_hidden, d_h.astype(d_hidden.dtype), i * chunk, 0), d_head

    d_hidden, d_head = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(hidden), _zero_gradient(head)))
    return d_hidden[:size], _like_head(d_head, head), None, None


map_over_chunks.defvjp(_map_forward, _map_backward)
