"""Importance weights: what a comparison counts for on text that the student drew with earlier weights.

Text drawn from `q` stands for text drawn from `p` where each term is weighted by `p / q` of all that it depends on: of a
group, the product over the row's tokens up to the last that its comparison reads. Letters: `B` rows, `T` labels of a row
(label `j` is token `j + 1`), `G` groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ImportanceSampling(NamedTuple):
    """How terms are weighted."""

    temperature: float  # that completions are drawn at
    cap: float | None  # the largest weight; None: there is none


def log_weights(log_ratio: jax.Array, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the weights of groups `[B, G]` and of labels `[B, T]`, whose own token each of them depends on.

    Args:
        log_ratio: float32 `[B, T]`, `log p - log q` of each label; 0 where it was not drawn, or not by another student.
        last: int32 `[B, G]`, the last token of the row that a group depends on.

    >>> groups, labels = log_weights(jnp.array([[0.0, 0.5, -1.5]]), jnp.array([[1, 2, 3]]))
    >>> groups.tolist(), labels.tolist()
    ([[0.0, 0.5, -1.0]], [[0.0, 0.5, -1.0]])
    """
    labels = jnp.cumsum(log_ratio, axis=1)
    tokens = jnp.pad(labels, ((0, 0), (1, 0)))  # of the row's tokens: nothing stands before the first
    return jnp.take_along_axis(tokens, last, axis=1), labels


def truncated(log_weight: jax.Array, cap: float | None) -> jax.Array:
    """`min(exp(log_weight), cap)`. What is no number has weight 1, so that its term, which is none either, is not left out.

    Source: Ionides, "Truncated Importance Sampling" (2008).

    >>> truncated(jnp.log(jnp.array([0.5, 3.0])), 2.0).tolist()
    [0.5, 2.0]
    """
    weight = jnp.exp(log_weight) if cap is None else jnp.minimum(jnp.exp(log_weight), cap)
    return jnp.where(jnp.isnan(log_weight), 1.0, weight)
