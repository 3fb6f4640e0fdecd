import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.losses.chunked import head_logits, map_over_chunks, sum_over_chunks
from gold_jax.losses.distill import Head, cross_entropy, order_rows, pack, token_logp

pytestmark = pytest.mark.usefixtures("quick_compiles")
N, D, V = 13, 5, 17


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def a_loss(logits, scale, shared, positions):
    labels, weight = positions
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits + shared), labels[:, None], 1)[:, 0]
    return jnp.sum(weight * jnp.sin(logp + scale)), {"mean": jnp.sum(weight * logp)}


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("live", [0, 5, 13])
def test_a_sum_over_chunks_equals_the_sum_at_once_with_its_gradient(chunk, live):
    hidden, head, scale, shared = normal(N, D), normal(V, D, seed=1), normal(N, seed=2), normal(V, seed=3)
    labels = jnp.arange(N) % V
    weight = jnp.where(jnp.arange(N) < live, normal(N, seed=4), 0.0)

    def chunked(hidden, head, scale):
        return 3 * sum_over_chunks(a_loss, chunk, hidden, head, scale, shared, (labels, weight), live)[0]

    def at_once(hidden, head, scale):
        return 3 * a_loss(head_logits(hidden, head), scale, shared, (labels, weight))[0]

    ours = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(hidden, head, scale)
    theirs = jax.value_and_grad(at_once, (0, 1, 2))(hidden, head, scale)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_close(jax.jit(chunked)(hidden, head, scale), theirs[0], rtol=2e-5, atol=2e-6)


def test_the_parts_of_a_sum_come_with_and_without_a_gradient():
    hidden, head = normal(N, D), normal(V, D, seed=1)
    positions = (jnp.arange(N) % V, jnp.ones(N))

    def loss(hidden):
        return sum_over_chunks(a_loss, 4, hidden, head, jnp.zeros(N), jnp.zeros(V), positions, N)

    plain = loss(hidden)[1]
    (_, parts), _ = jax.value_and_grad(loss, has_aux=True)(hidden)
    chex.assert_trees_all_close(plain, parts, rtol=1e-6)


def test_chunks_without_live_positions_are_never_computed():
    """A chunk beyond the live ones would bring its NaN in."""
    hidden = normal(N, D).at[4:].set(jnp.nan)
    weight = jnp.where(jnp.arange(N) < 4, 1.0, 0.0)
    args = (normal(V, D), jnp.zeros(N), jnp.zeros(V), (jnp.zeros(N, int), weight), 4)
    value, grad = jax.value_and_grad(lambda h: sum_over_chunks(a_loss, 4, h, *args)[0])(hidden)
    chex.assert_tree_all_finite((value, grad))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_map_over_chunks_equals_the_map_at_once_with_its_gradient(chunk):
    hidden, head, ask = normal(N, D), normal(V, D, seed=1), normal(N, seed=2)

    def per_position(logits, labels):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]

    labels = jnp.arange(N) % V

    def chunked(hidden, head):
        return jnp.sum(ask * map_over_chunks(per_position, chunk, hidden, head, labels, N))

    def at_once(hidden, head):
        return jnp.sum(ask * per_position(head_logits(hidden, head), labels))

    ours = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    chex.assert_trees_all_close(ours, jax.value_and_grad(at_once, (0, 1))(hidden, head), rtol=2e-5, atol=2e-6)


def test_packing_puts_what_counts_in_front_in_order():
    index, live = pack(jnp.array([[False, True, True], [True, False, False]]))
    assert index[:3].tolist() == [1, 2, 3] and live == 3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_probabilities_follow_head_order_soft_cap_and_temperature(softcap):
    hidden, head = normal(2, 4, D), normal(V, D, seed=1)
    order = jnp.asarray(np.random.default_rng(3).permutation(V))
    place = jnp.argsort(order)
    position, token = jnp.array([[0, 3, 1]] * 2), jnp.array([[5, 16, 0], [2, 2, 9]])
    mask = jnp.array([[True, True, False], [True, False, True]])
    ours = token_logp(hidden, Head(head[order], place, softcap, 0.7), position, token, mask, 2)
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / 0.7)
    for i in range(2):
        for j in range(3):
            expected = logp[i, position[i, j], token[i, j]] if mask[i, j] else 0.0
            np.testing.assert_allclose(ours[i, j], expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_the_weighted_negative_log_likelihood_with_its_gradient():
    hidden, head = normal(2, 6, D), normal(V, D, seed=1)
    labels = jnp.array([[3, -1, 5, 7, -1, 2], [-1, -1, 4, 4, 1, -1]])
    weight = jnp.where(labels >= 0, 0.2, 0.0)
    place = jnp.arange(V)

    def direct(hidden, head):
        logp = jax.nn.log_softmax(hidden @ head.T)
        return -jnp.sum(weight * jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0])

    def ours(hidden, head):
        return cross_entropy(hidden, Head(head, place), labels, weight, chunk=4)[0]

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    chex.assert_trees_all_close(got, jax.value_and_grad(direct, (0, 1))(hidden, head), rtol=2e-5, atol=2e-6)
    right = jnp.sum(jnp.where((hidden @ head.T).argmax(-1) == labels, weight, 0.0))
    np.testing.assert_allclose(cross_entropy(hidden, Head(head, place), labels, weight)[1]["correct"], right, rtol=1e-6)


def test_ordering_a_heads_rows_has_the_gradient_of_a_permutation():
    head = normal(V, D)
    order = jnp.asarray(np.random.default_rng(0).permutation(V))
    ask = normal(V, D, seed=9)
    grad = jax.grad(lambda h: jnp.sum(ask * order_rows(h, order, jnp.argsort(order))))(head)
    chex.assert_trees_all_close(grad, jnp.zeros_like(head).at[order].set(ask))


def test_in_bfloat16_logits_and_the_heads_gradient_are_accumulated_in_float32():
    hidden, head = normal(64, 32).astype(jnp.bfloat16), normal(V, 32, seed=1)
    assert head_logits(hidden, head).dtype == jnp.float32
    positions = (jnp.zeros(64, int), jnp.ones(64))
    fn = functools.partial(sum_over_chunks, a_loss, 4)
    grad = jax.grad(lambda w: fn(hidden, w, jnp.zeros(64), jnp.zeros(V), positions, 64)[0])(head)
    exact = jax.grad(
        lambda w: a_loss(head_logits(hidden.astype(jnp.float32), w), jnp.zeros(64), jnp.zeros(V), positions)[0]
    )(head)
    assert grad.dtype == jnp.float32
    assert jnp.linalg.norm(grad - exact) < 2e-2 * jnp.linalg.norm(exact)  # bfloat16 has 8 bits
