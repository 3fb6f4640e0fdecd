import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.losses import distill, fused_head, projection
from gold_jax.losses.distill import Head, compact, cross_entropy, order_rows, token_logp
from gold_jax.losses.fused_head import InnerTokens, fused_linear_map, fused_linear_sum
from gold_jax.losses.projection import head_logits

N, D, V = 13, 5, 17


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def a_loss(logits, scale, shared, positions):
    labels, weight = positions
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits + shared), labels[:, None], 1)[:, 0]
    return jnp.sum(weight * jnp.sin(logp + scale)), {"mean": jnp.sum(weight * logp)}


def a_token(logits, places):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), places[:, None], 1)[:, 0]


ROWS = jnp.array([3, 3, 0, 7, 5, 1, 2, 9, 12, 4, 6, 8, 10])  # in any order, one of them twice


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("live", [0, 5, 13])
@pytest.mark.parametrize("tokens", [None, 0, 3])
def test_a_fused_linear_sum_equals_the_sum_at_once_with_its_gradient(chunk, live, tokens):
    hidden, head, shared = normal(N, D), normal(V, D, seed=1), normal(V, seed=3)
    labels = jnp.arange(N) % V
    weight = jnp.where(jnp.arange(N) < live, normal(N, seed=4), 0.0)
    inner = (
        None
        if tokens is None
        else InnerTokens(*(jnp.array(x) for x in ([3, 8, 3, 11], [2, 0, 16, 5], [0, 4, 0, 1])), tokens)
    )

    def chunked(hidden, head):
        args = hidden, head, ROWS, inner, shared, (labels, weight), live
        return 3 * fused_linear_sum(a_loss, a_token, chunk, *args)[0]

    def at_once(hidden, head):
        scale = jnp.zeros(N)
        if tokens:
            logp = a_token(head_logits(hidden[inner.rows[:tokens]], head), inner.columns[:tokens])
            scale = scale.at[inner.slots[:tokens]].add(logp)
        return 3 * a_loss(head_logits(hidden[ROWS], head), scale, shared, (labels, weight))[0]

    ours = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    theirs = jax.value_and_grad(at_once, (0, 1))(hidden, head)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=4e-6)
    chex.assert_trees_all_close(jax.jit(chunked)(hidden, head), theirs[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_a_heads_gradient_is_the_same_however_many_rows_are_made_at_once(monkeypatch, rows):
    hidden, head, positions = normal(N, D), normal(V, D, seed=1), (jnp.arange(N) % V, normal(N, seed=4))

    def gradient(head):
        return jax.grad(
            lambda w: fused_linear_sum(a_loss, None, 4, hidden, w, ROWS, None, jnp.zeros(V), positions, N)[0]
        )(head)

    whole = gradient(head)
    monkeypatch.setattr(projection, "GRADIENT_BLOCK_ROWS", rows)
    chex.assert_trees_all_close(gradient(head), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_the_same_however_many_chunks_are_multiplied_at_once(monkeypatch, dtype):
    """Of 13 chunks the last product has one, and chunks of an earlier one beside it."""
    hidden, head = normal(N, D).astype(dtype), normal(V, D, seed=1).astype(dtype)
    positions = jnp.arange(N) % V, normal(N, seed=4)

    def gradients(together):
        monkeypatch.setattr(fused_head, "MOST_CHUNKS", together)
        loss = lambda h, w: fused_linear_sum(a_loss, None, 1, h, w, ROWS, None, jnp.zeros(V), positions, N)[0]  # noqa: E731
        grad = jax.jit(jax.grad(loss, (0, 1)))
        traced = str(jax.make_jaxpr(grad)(hidden, head))
        assert f"[{together},{V}]" in traced  # so many gradients of logits at once
        barriers = [line for line in traced.splitlines() if "optimization_barrier" in line]
        assert len(barriers) == (0 if together == 1 else 2)
        assert not any(f"[{V},{D}]" in line for line in barriers)  # GPUs would copy the head's gradient
        return grad(hidden, head)

    alone = gradients(1)
    for together in (2, 4, 13):
        chex.assert_trees_all_close(gradients(together), alone, rtol=1e-6 if dtype == jnp.float32 else 1e-2, atol=1e-6)


def test_logits_take_the_place_of_hidden_states_where_there_is_no_head():
    logits, shared = normal(N, V), normal(V, seed=3)
    positions = jnp.arange(N) % V, normal(N, seed=4)
    inner = InnerTokens(*(jnp.array(x) for x in ([3, 8], [2, 0], [0, 4])), 2)

    def ours(logits):
        return fused_linear_sum(a_loss, a_token, 4, logits, None, ROWS, inner, shared, positions, N)[0]

    def theirs(logits):
        scale = jnp.zeros(N).at[inner.slots].add(a_token(logits[inner.rows], inner.columns))
        return a_loss(logits[ROWS], scale, shared, positions)[0]

    pair = (jax.value_and_grad(f)(logits) for f in (ours, theirs))
    chex.assert_trees_all_close(*pair, rtol=2e-5, atol=2e-6)


def test_the_parts_of_a_sum_come_with_and_without_a_gradient():
    hidden, head = normal(N, D), normal(V, D, seed=1)
    positions = (jnp.arange(N) % V, jnp.ones(N))

    def loss(hidden):
        return fused_linear_sum(a_loss, None, 4, hidden, head, ROWS, None, jnp.zeros(V), positions, N)

    plain = loss(hidden)[1]
    (_, parts), _ = jax.value_and_grad(loss, has_aux=True)(hidden)
    chex.assert_trees_all_close(plain, parts, rtol=1e-6)


def test_chunks_without_live_positions_are_never_computed():
    """A chunk beyond the live ones would bring its NaN in."""
    hidden = normal(N, D).at[4:].set(jnp.nan)
    weight = jnp.where(jnp.arange(N) < 4, 1.0, 0.0)
    args = (normal(V, D), jnp.arange(N), None, jnp.zeros(V), (jnp.zeros(N, int), weight), 4)
    value, grad = jax.value_and_grad(lambda h: fused_linear_sum(a_loss, None, 4, h, *args)[0])(hidden)
    chex.assert_tree_all_finite((value, grad))


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("live", [0, 6, 13])
def test_a_fused_linear_map_equals_the_map_at_once(chunk, live):
    hidden, head, labels = normal(N, D), normal(V, D, seed=1), jnp.arange(N) % V
    ours = jax.jit(lambda *args: fused_linear_map(a_token, chunk, *args))(hidden, head, ROWS, labels, live)
    theirs = jnp.where(jnp.arange(N) < live, a_token(head_logits(hidden[ROWS], head), labels), 0.0)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_packing_puts_what_counts_in_front_in_order():
    index, live = compact(jnp.array([[False, True, True], [True, False, False]]))
    assert index[:3].tolist() == [1, 2, 3] and live == 3


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_probabilities_follow_head_order_soft_cap_and_temperature(softcap):
    hidden, head = normal(2, 4, D), normal(V, D, seed=1)
    order = jnp.asarray(np.random.default_rng(3).permutation(V))
    row_of_token = jnp.argsort(order)
    position, token = jnp.array([[0, 3, 1]] * 2), jnp.array([[5, 16, 0], [2, 2, 9]])
    mask = jnp.array([[True, True, False], [True, False, True]])
    flat = position + 4 * jnp.arange(2)[:, None]
    ours = token_logp(hidden, Head(head[order], row_of_token, softcap, 0.7), flat, token, mask, 2)
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
    row_of_token, position = jnp.arange(V), jnp.arange(12).reshape(2, 6)

    def direct(hidden, head):
        logp = jax.nn.log_softmax(hidden @ head.T)
        return -jnp.sum(weight * jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], -1)[..., 0])

    def ours(hidden, head):
        return cross_entropy(hidden, Head(head, row_of_token), position, labels, weight, chunk=4)[0]

    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    chex.assert_trees_all_close(got, jax.value_and_grad(direct, (0, 1))(hidden, head), rtol=2e-5, atol=2e-6)
    right = jnp.sum(jnp.where((hidden @ head.T).argmax(-1) == labels, weight, 0.0))
    correct = cross_entropy(hidden, Head(head, row_of_token), position, labels, weight)[1]["correct"]
    np.testing.assert_allclose(correct, right, rtol=1e-6)


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
    fn = functools.partial(fused_linear_sum, a_loss, None, 4)
    grad = jax.grad(lambda w: fn(hidden, w, jnp.arange(64), None, jnp.zeros(V), positions, 64)[0])(head)
    exact = jax.grad(
        lambda w: a_loss(head_logits(hidden.astype(jnp.float32), w), jnp.zeros(64), jnp.zeros(V), positions)[0]
    )(head)
    assert grad.dtype == jnp.float32
    assert jnp.linalg.norm(grad - exact) < 2e-2 * jnp.linalg.norm(exact)  # bfloat16 has 8 bits


def test_the_first_of_several_stop_tokens_has_the_probability_of_all():
    """As one event, with its gradient, and without a scatter, which would not fuse into the softmax."""
    hidden, head = normal(1, D), normal(V, D, seed=1)
    order = jnp.asarray(np.random.default_rng(3).permutation(V))
    row_of_token, stops = jnp.argsort(order), jnp.array([9, 2, 4])
    side = Head(head[order], row_of_token, stop_rows=row_of_token[stops])
    one, weight = jnp.zeros((1, 1), int), jnp.ones((1, 1), jnp.float32)

    def loss(hidden, label):
        return cross_entropy(hidden, side, one, jnp.array([[label]]), weight, chunk=2)[0]

    def expected(hidden):
        return -jax.nn.logsumexp(jax.nn.log_softmax(head @ hidden[0])[stops])

    assert jnp.isinf(loss(hidden, 4)) and jnp.isinf(loss(hidden, 2))  # 9 alone stands for all three
    found, right = (jax.value_and_grad(f)(hidden) for f in (lambda h: loss(h, 9), expected))
    chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        loss(hidden, 7), -jax.nn.log_softmax(head @ hidden[0])[7], rtol=1e-6
    )  # the others are what they were

    def summed(logits):
        return jnp.sum(jnp.where(jnp.arange(V) < 3, distill._log_softmax(logits, side), 0.0))

    assert "scatter" not in jax.jit(jax.grad(summed)).lower(jnp.zeros((2, V))).as_text()
