"""Rows of packed sequences and back: values, and gradients that sum over the rows which share a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.models import repack
from gold_jax.text.packing import pack


def packed(rows: int, shared: int, own: int):
    """Rows with a prefix in common, one of them empty, in two sequences."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(1, 100, shared)
    texts = [np.r_[prefix, rng.integers(100, 200, rng.integers(1, own))] for _ in range(rows - 1)]
    return pack([np.asarray(x, np.int32) for x in texts], rows, 2)


def holders(batch):
    """Of each token of a sequence, the slots of all rows that hold it."""
    for s, tokens in enumerate(batch.tokens):
        valid = batch.mask[s].reshape(-1)
        index = np.where(valid, batch.gather_index[s].reshape(-1), -1)
        for n in range(len(tokens)):
            yield s, n, np.flatnonzero(index == n)


def test_gradients_are_those_of_loops():
    batch = packed(8, 5, 9)
    sequences, tokens = batch.tokens.shape
    slots = batch.mask[0].size
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((sequences, tokens, 3), dtype=np.float32))
    at_rows = rng.standard_normal((sequences, slots, 3), dtype=np.float32) * batch.mask.reshape(sequences, -1, 1)
    _, pullback = jax.vjp(lambda x: repack.to_rows(x, jnp.asarray(batch.gather_index)), x)
    (found,) = pullback(jnp.asarray(at_rows))
    rows = jnp.asarray(rng.standard_normal((sequences, slots, 3), dtype=np.float32))
    _, pullback = jax.vjp(lambda r: repack.to_sequences(r, batch.gather_index, batch.first_slot), rows)
    held = np.zeros((sequences, tokens, 1), np.float32)
    expected, back = np.zeros_like(x), np.zeros_like(rows)
    at_tokens = rng.standard_normal(x.shape, dtype=np.float32)
    for s, n, own in holders(batch):
        expected[s, n] = at_rows[s, own].sum(0)
        if own.size:
            held[s, n], back[s, own[0]] = 1, at_tokens[s, n]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pullback(jnp.asarray(at_tokens * held))[0], back)


def test_tokens_that_many_rows_share_sum_their_gradients_in_float32():
    batch = packed(128, 2, 3)
    _, pullback = jax.vjp(
        lambda x: repack.to_rows(x, jnp.asarray(batch.gather_index)), jnp.zeros((*batch.tokens.shape, 1), jnp.bfloat16)
    )
    gradient = jnp.asarray(batch.mask.reshape(2, -1, 1) * 1.0078125, jnp.bfloat16)
    expected = 64 * 1.0078125  # of sequence 0, whose rows are all there; summed in bfloat16 it would be 64.0
    assert float(pullback(gradient)[0][0, 0, 0]) == pytest.approx(expected, rel=2**-8)
    assert float(pullback(gradient)[0][0, 0, 0]) != 64.0


def test_the_way_back_has_no_scatter():
    batch = packed(4, 2, 5)
    rows = jnp.zeros((2, batch.mask[0].size, 3))

    def summed(rows):
        return jnp.sum(repack.to_sequences(rows, batch.gather_index, batch.first_slot) ** 2)

    assert "scatter" not in jax.jit(jax.grad(summed)).lower(rows).as_text()
