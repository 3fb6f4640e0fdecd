"""Every comparison, through merges and chunks, against a slow float64 reference written from the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.losses.compare import COMPARES, CompareOptions
from gold_jax.losses.distill import Head, distill_loss
from gold_jax.text.batch import Half, Row, build_batches

V, W, K, D, E = 19, 23, 11, 4, 6
# Two rows of groups of one to three tokens on either side.
GROUPS = [([0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 2, 3]), ([0, 1, 2, 2, 2], [0, 1, 1, 2])]


def setting(seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for s, t in GROUPS:
        halves = (
            Half(np.zeros(2, np.int32), rng.integers(0, n, len(g)).astype(np.int32), np.array(g))
            for g, n in ((s, V), (t, W))
        )
        rows.append(Row(*halves, groups=max(s) + 1, text="", stopped=False))
    arrays = [rng.standard_normal(s) for s in ((2, 32, D), (V, D), (2, 32, E), (W, E))]
    return rows, *arrays, rng.permutation(V), rng.permutation(W)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def merged(half, group, hidden, head, merge):
    """The group's distribution over the vocabulary in its own order, float64, straight from DESIGN 4.3."""
    at = [len(half.prompt) + i for i in np.flatnonzero(half.group == group)]
    tokens = half.completion[half.group == group]
    predict = log_softmax(hidden @ head.T)
    if merge == "chain":
        return np.exp(predict[at[-1] - 1]) * np.prod([np.exp(predict[p - 1, x]) for p, x in zip(at[:-1], tokens[:-1])])
    if merge == "observed":
        return np.exp(predict[at[0]]) * np.prod([np.exp(predict[p, x]) for p, x in zip(at[1:], tokens[1:])])
    return np.exp(predict[at[0] - 1])


def jsd(p, q, beta):
    m = (1 - beta) * p + beta * q
    kl = lambda a, b: np.sum(a * np.log(a / b))  # noqa: E731
    return kl(q, p) if beta == 0 else kl(p, q) if beta == 1 else beta * kl(q, m) + (1 - beta) * kl(p, m)


def l1(p, q):
    n = max(len(p), len(q))
    return np.abs(np.sort(np.pad(p, (0, n - len(p)))) - np.sort(np.pad(q, (0, n - len(q))))).sum()


def reference(compare, p, q, o):
    if compare == "sorted":
        return l1(p, q)
    a, b = p[:K], q[:K]
    if compare == "shared":
        return jsd(a / a.sum(), b / b.sum(), o.beta)
    a, b = np.maximum(a, 1e-8), np.maximum(b, 1e-8)
    weights = (K / W, 1 - K / W) if o.matched_weight is None else (o.matched_weight, o.unmatched_weight)
    return weights[0] * jsd(a, b, o.beta) + weights[1] * l1(p[K:], q[K:])


def slow(rows, hs, ws, ht, wt, order_s, order_t, merge, groups, compare, options):
    total, count = 0.0, 0
    for i, row in enumerate(rows):
        for g in range(row.groups):
            if groups == "one_to_one" and ((row.student.group == g).sum() > 1 or (row.teacher.group == g).sum() > 1):
                continue
            p = merged(row.student, g, hs[i], ws, merge)[order_s]
            q = merged(row.teacher, g, ht[i], wt, merge)[order_t]
            total, count = total + reference(compare, p, q, options), count + 1
    return total / count


@pytest.mark.parametrize("compare", COMPARES)
@pytest.mark.parametrize("merge", ["chain", "observed", "boundary"])
@pytest.mark.parametrize(
    "groups, beta, weights", [("all", 0, (1, 1)), ("one_to_one", 1, (None, None)), ("all", 0.3, (0.7, 0.2))]
)
def test_a_grid_point_is_what_its_formula_says_value_and_gradient(compare, merge, groups, beta, weights):
    rows, hs, ws, ht, wt, order_s, order_t = setting()
    options = CompareOptions(K, beta, *weights)
    (batch,) = jax.tree.map(jnp.asarray, build_batches(rows, 2, merge=merge, groups=groups))
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731

    def ours(hidden, head):
        student = Head(head[order_s], jnp.argsort(jnp.asarray(order_s)))
        teacher = Head(f32(wt)[order_t], jnp.argsort(jnp.asarray(order_t)))
        return distill_loss(
            hidden, student, batch.student, f32(ht), teacher, batch.teacher, batch.weight,
            compare=compare, options=options, chunk=3,
        )[0]  # fmt: skip

    value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(ours, (0, 1)))(f32(hs), f32(ws))
    args = (ht, wt, order_s, order_t, merge, groups, compare, options)
    np.testing.assert_allclose(value, slow(rows, hs, ws, *args), rtol=3e-6)
    # Directional derivatives by central differences in float64.
    rng = np.random.default_rng(1)
    for _ in range(3):
        dh, dw, eps = rng.standard_normal(hs.shape), rng.standard_normal(ws.shape), 1e-5
        slope = (slow(rows, hs + eps * dh, ws + eps * dw, *args) - slow(rows, hs - eps * dh, ws - eps * dw, *args)) / (
            2 * eps
        )
        got = np.sum(np.asarray(d_hidden, np.float64) * dh) + np.sum(np.asarray(d_head, np.float64) * dw)
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("compare", COMPARES)
def test_a_comparison_with_itself_is_zero_when_everything_is_matched(compare, beta):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, V)), jnp.float32)
    target, options = jax.nn.log_softmax(logits), CompareOptions(V, beta)

    def loss(logits):
        # The same operations on both sides: an L1 distance has no gradient at zero, but either sign next to it.
        return COMPARES[compare](jax.nn.log_softmax(logits), target, options)[0].sum()

    value, grad = jax.value_and_grad(loss)(logits)
    assert abs(value) < 1e-6 and jnp.abs(grad).max() < 1e-6


def test_top_k_tails_leave_out_no_more_than_the_bound_they_report():
    rng = np.random.default_rng(0)
    p, q = (jax.nn.log_softmax(jnp.asarray(rng.standard_normal((3, n)) * 2, jnp.float32)) for n in (200, 300))
    for name in ("sorted", "hybrid"):
        exact, _ = COMPARES[name](p, q, CompareOptions(50, 0.5, 1.0, 1.0))
        cut, parts = COMPARES[name](p, q, CompareOptions(50, 0.5, 1.0, 1.0, top_k=20))
        assert (jnp.abs(exact - cut) <= parts["tail_bound"] + 1e-6).all()
