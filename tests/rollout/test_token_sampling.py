import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.rollout.decode_state import sampling_filters
from gold_jax.rollout.token_sampling import in_nucleus, inverse_cdf, sample_tokens, top_k_weights


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities [V] after transformers' filters, by sorting."""
    logits = logits.astype(np.float64) / temperature
    if top_k:
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(probabilities)[::-1]
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature", (0.5, 1.0, 1.7))
@pytest.mark.parametrize("top_k", (0, 1, 5, 999, 5000))
@pytest.mark.parametrize("top_p", (1.0, 0.9, 0.3, 1e-6))
def test_the_filters_keep_what_sorting_would_keep(temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 1000)).astype(np.float32)
    weights = jax.jit(top_k_weights)(logits, temperature, top_k or None)
    share = top_p * weights.sum(axis=1)
    inside = jax.vmap(lambda token: in_nucleus(weights, jnp.full(4, token), share), out_axes=1)(jnp.arange(1000))
    kept = np.where((top_p == 1) | inside, weights, 0).astype(np.float64)
    for row in range(4):
        expected = reference(logits[row], temperature, min(top_k, 1000), top_p)
        np.testing.assert_array_equal(kept[row] > 0, expected > 0)
        np.testing.assert_allclose(kept[row] / kept[row].sum(), expected, rtol=1e-4)


def test_entries_that_tie_with_the_last_one_kept_are_kept():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0, -jnp.inf]])
    assert (top_k_weights(logits, 1.0, 1) > 0).tolist() == [[False, True, True, False, False]]
    assert (top_k_weights(logits, 1.0, 4) > 0).tolist() == [[True, True, True, True, False]]
    weights = top_k_weights(jnp.repeat(logits, 5, axis=0), 1.0, None)
    assert in_nucleus(weights, jnp.arange(5), 0.1 * weights.sum(axis=1)).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 40, 1.0), (1.2, 60, 0.9)]
)
def test_tokens_come_as_often_as_their_probabilities_say(temperature, top_k, top_p):
    count, size = 40_000, 600  # several blocks of the vocabulary, the last one partly filled
    logits = 2 * np.random.default_rng(1).standard_normal(size).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), count)
    filters = sampling_filters(temperature, top_k, top_p)
    tokens = jax.jit(jax.vmap(lambda key: sample_tokens(logits[None], key[None], *filters)[0]))(keys)
    expected = reference(logits, temperature, top_k, top_p)
    found = np.bincount(tokens, minlength=size)
    assert not found[expected == 0].any()
    kept = expected > 0
    # Pearson's statistic is near its degrees of freedom, with variance twice that: six deviations off is chance never.
    statistic = (((found - count * expected) ** 2)[kept] / (count * expected[kept])).sum()
    freedom = kept.sum() - 1
    assert abs(statistic - freedom) < 6 * np.sqrt(2 * freedom) + 10


def test_the_ends_of_the_unit_interval_draw_tokens_that_are_kept():
    logits = np.full((1, 600), -40.0, np.float32)
    logits[0, [5, 300, 301]] = 0
    for u, expected in ((0.0, 5), (1 - 2**-24, 301), (0.5, 300)):
        weights = top_k_weights(jnp.asarray(logits), 1.0, 3)
        assert int(inverse_cdf(weights, jnp.array([u], jnp.float32))[0]) == expected


def test_logits_that_are_no_numbers_end_the_draw():
    logits = jnp.full((1, 600), jnp.nan)
    jax.block_until_ready(sample_tokens(logits, jax.random.split(jax.random.key(0), 1), 1.0, None, 0.5))
