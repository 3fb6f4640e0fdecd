"""Importance weights, for terms of the loss on text that the student drew with earlier weights.

A mean over text drawn from `q` estimates one over text drawn from `p` if each term is weighted by `p / q` of all tokens
that it depends on: for a group, those of the row up to the last that its comparison reads. Letters: `B` rows, `T` labels
of a row (label `j` is token `j + 1`), `G` groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ImportanceSampling(NamedTuple):
    """How terms are weighted."""

    temperature: float  # that completions are drawn at
    cap: float | None  # the largest weight; None: no limit


def log_weights(log_ratio: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the weights of groups, float32 `[B, G]`, and of labels, `[B, T]`, which depend on their own token too.

    Args:
        log_ratio: float32 `[B, T]` in nats, `log p - log q` of each label; 0 where it was not drawn, or from `p`.
        last: int32 `[B, G]`, the last token of the row that a group depends on.

    >>> groups, labels = log_weights(jnp.array([[0.0, 0.5, -1.5]]), jnp.array([[1, 2, 3]]))
    >>> groups.tolist(), labels.tolist()
    ([[0.0, 0.5, -1.0]], [[0.0, 0.5, -1.0]])
    """
    labels = jnp.cumsum(log_ratio, axis=1)
    tokens = jnp.pad(labels, ((0, 0), (1, 0)))  # of tokens: the first is no label
    return jnp.take_along_axis(tokens, last, axis=1), labels


def truncated(log_weight: jax.Array, cap: float | None) -> jax.Array:
    """`min(exp(log_weight), cap)`, and 1 for NaN: terms are kept by `weight > 0`, and one that is NaN must not be lost.

    Source: Ionides, "Truncated Importance Sampling" (2008).

    >>> truncated(jnp.log(jnp.array([0.5, 3.0])), 2.0).tolist()
    [0.5, 2.0]
    """
    weight = jnp.exp(log_weight) if cap is None else jnp.minimum(jnp.exp(log_weight), cap)
    return jnp.where(jnp.isnan(log_weight), 1.0, weight)
