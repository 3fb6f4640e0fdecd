"""Every comparison, through merges and chunks, against the slow reference, and the facts that hold for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gold_jax.loss_spec import COMPARISONS, OF_TEXT, PROJECTING
from gold_jax.losses.compare import COMPARES, CompareOptions, GroupDistribution, prefix_events, text_events
from gold_jax.losses.distill import Head, distill_loss
from gold_jax.text.batch import Row, SideTokens, build_batches
from losses import reference
from losses.arranged import in_rows

pytestmark = pytest.mark.usefixtures("quick_compiles")
V, W, K, D, E = 19, 23, 11, 4, 6
# Two rows of groups of one to three tokens on either side.
GROUPS = [([0, 1, 1, 2, 3, 3], [0, 0, 1, 2, 2, 2, 3]), ([0, 1, 2, 2, 2, 3], [0, 1, 1, 2, 3])]


def setting(seed=0, masked=False):
    """Rows, hidden states and heads of both sides, orders, and routes (to every kind of event)."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, (s, t) in enumerate(GROUPS):
        halves = (
            SideTokens(np.full(2, i, np.int32), rng.integers(0, n, len(g)).astype(np.int32), np.array(g))
            for g, n in ((s, V), (t, W))
        )
        rows.append(Row(*halves, groups=max(s) + 1, text="", stopped=False))
    arrays = [rng.standard_normal(s) for s in ((2, 32, D), (V, D), (2, 32, E), (W, E))]
    orders = [rng.permutation(n) for n in (V, W)]
    routes = [np.sort(np.r_[rng.integers(0, 6, n - K - 2), K, K + masked]).astype(np.int32) for n in (V, W)]
    return rows, *arrays, *orders, *routes


def slow(rows, hs, ws, ht, wt, orders, routes, merge, groups, compare, options, at=None):
    """The mean over groups. `at`: the student's `hs, ws` at which rewards are frozen, to take their slope."""
    losses = []
    for i, row in enumerate(rows):
        for g in reference.groups_of(row, groups):

            def student(hs, ws, i=i, row=row, g=g):
                return reference.merged(row.student, g, hs[i], ws, orders[0], routes[0], merge)

            t = reference.merged(row.teacher, g, ht[i], wt, orders[1], routes[1], merge)
            frozen = None
            if at is not None and compare == "reverse_kl":
                frozen = reference.compare(compare, student(*at), t, options)
            losses.append(reference.compare(compare, student(hs, ws), t, options, frozen))
    return np.mean(losses)


POINTS = [
    (merge, compare)
    for merge in ("chain", "observed", "boundary")
    for compare in COMPARES
    if not (merge == "observed" and compare in (*OF_TEXT, *PROJECTING))
]


@pytest.mark.parametrize("merge, compare", POINTS, ids="-".join)
@pytest.mark.parametrize(
    "groups, beta, weights, masked",
    [("all", 0, (1, 1), False), ("one_to_one", 1, (None, None), True), ("all", 0.3, (0.7, 0.2), True)],
)
def test_a_grid_point_is_what_its_formula_says_value_and_gradient(merge, compare, groups, beta, weights, masked):
    rows, hs, ws, ht, wt, order_s, order_t, route_s, route_t = setting(masked=masked)
    options = CompareOptions(K, beta, *weights, masked=masked, temperature=3.0)
    built = build_batches(rows, 2, merge=merge, groups=groups, text=compare in OF_TEXT)
    batch = jax.tree.map(jnp.asarray, in_rows(*built))
    f32 = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731

    def ours(hidden, head):
        student = Head(head[order_s], jnp.argsort(jnp.asarray(order_s)), prefix_of_unmatched=jnp.asarray(route_s))
        teacher = Head(f32(wt)[order_t], jnp.argsort(jnp.asarray(order_t)), prefix_of_unmatched=jnp.asarray(route_t))
        return distill_loss(
            hidden, student, batch.student, f32(ht), teacher, batch.teacher, batch.weight,
            compare=compare, options=options, merge=merge, chunk=3,
        )[0]  # fmt: skip

    value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(ours, (0, 1)))(f32(hs), f32(ws))
    args = (ht, wt, (order_s, order_t), (route_s, route_t), merge, groups, compare, options)
    np.testing.assert_allclose(value, slow(rows, hs, ws, *args), rtol=3e-6)
    # Directional derivatives by central differences in float64.
    rng = np.random.default_rng(1)
    for _ in range(3):
        dh, dw, eps = rng.standard_normal(hs.shape), rng.standard_normal(ws.shape), 1e-5
        ahead, behind = (slow(rows, hs + e * dh, ws + e * dw, *args, at=(hs, ws)) for e in (eps, -eps))
        got = np.sum(np.asarray(d_hidden, np.float64) * dh) + np.sum(np.asarray(d_head, np.float64) * dw)
        np.testing.assert_allclose(got, (ahead - behind) / (2 * eps), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("merge, compare", [("chain", "hybrid"), ("boundary", "events"), ("chain", "sorted")])
def test_a_loss_of_logits_is_that_of_hidden_states_and_heads(merge, compare):
    rows, hs, ws, ht, wt, order_s, order_t, route_s, route_t = setting()
    built = build_batches(rows, 2, merge=merge, groups="all", text=compare in OF_TEXT)
    batch = jax.tree.map(jnp.asarray, in_rows(*built))
    hs, ws, ht, wt = (jnp.asarray(x, jnp.float32) for x in (hs, ws, ht, wt))
    orders = [jnp.asarray(o) for o in (order_s, order_t)]
    heads = [
        Head(None, jnp.argsort(o), 5.0, 0.7, jnp.asarray(r), column_order=o) for o, r in zip(orders, (route_s, route_t))
    ]

    def loss(student, teacher, student_head, teacher_head):
        return distill_loss(
            student, student_head, batch.student, teacher, teacher_head, batch.teacher, batch.weight,
            compare=compare, options=CompareOptions(K, 0.5, 1.0, 0.5), merge=merge, chunk=3,
        )[0]  # fmt: skip

    def of_hidden(hidden):
        heads_ordered = [h._replace(weight=w[o], column_order=None) for h, w, o in zip(heads, (ws, wt), orders)]
        return loss(hidden, ht, *heads_ordered)

    value, d_hidden = jax.value_and_grad(of_hidden)(hs)
    again, d_logits = jax.value_and_grad(lambda logits: loss(logits, ht @ wt.T, *heads))(hs @ ws.T)
    np.testing.assert_allclose(again, value, rtol=2e-6)
    np.testing.assert_allclose(d_logits @ ws, d_hidden, rtol=1e-4, atol=2e-6)


def sides(rng, groups=40, masked=False, scaled=False):
    """Random groups of both models as `GroupDistribution` (numpy) and as the reference's sides."""
    found = []
    for size in (V, W):
        logp = reference.log_softmax(2 * rng.standard_normal((groups, size)))
        inner = np.where(rng.random(groups) < 0.5, 0.0, np.log(rng.random(groups)))
        place = rng.integers(0, size, groups)
        route = np.sort(np.r_[rng.integers(0, 6, size - K - 2), K, K + masked]).astype(np.int32)
        event = np.r_[np.arange(K), route]
        company = np.array([(event == e).sum() - (e <= K) for e in event])
        if scaled:
            zero, whole = np.zeros(groups), np.ones(groups, bool)
            side = GroupDistribution(logp + inner[:, None], -np.expm1(inner), place, zero, whole, route, company)
        else:
            side = GroupDistribution(logp, np.zeros(groups), place, inner, inner == 0, route, company)
        text = np.exp(side.logp[np.arange(groups), place] + side.suffix_logp)
        slow = [
            reference.Side(np.exp(side.logp[i]), place[i], text[i], side.is_single_token[i], route)
            for i in range(groups)
        ]
        found.append((side, slow))
    return found


@pytest.mark.parametrize("compare", [c for c in COMPARES if c not in ("sorted", "hybrid")])  # those are float32 alone
@pytest.mark.parametrize("beta", [0, 0.4, 1])
@pytest.mark.parametrize("masked, rest, scaled", [(False, True, False), (True, True, True), (True, False, False)])
def test_in_double_precision_values_and_gradients_are_exact(compare, beta, masked, rest, scaled):
    (s, slow_s), (t, slow_t) = sides(np.random.default_rng(3), masked=masked, scaled=scaled)
    options = CompareOptions(K, beta, rest=rest, masked=masked, temperature=5.0)
    with jax.enable_x64(True):
        s, t = jax.tree.map(jnp.asarray, (s, t))

        def loss(logp, rest):
            return COMPARES[compare](s._replace(logp=logp, suffix_logp=rest), t, options)[0]

        values = loss(s.logp, s.suffix_logp)
        gradient = jax.grad(lambda *x: loss(*x).sum(), (0, 1))(s.logp, s.suffix_logp)
        values, gradient = jax.tree.map(np.asarray, (values, gradient))
    expected = [reference.compare(compare, a, b, options) for a, b in zip(slow_s, slow_t)]
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
    rng, eps = np.random.default_rng(4), 1e-5
    for i, (a, b) in enumerate(zip(slow_s, slow_t)):
        frozen = expected[i] if compare == "reverse_kl" else None
        # A direction that keeps the distribution's sum, as every step of a model does.
        d = rng.standard_normal(V)
        d -= (a.p * d).sum() / a.p.sum()
        d_rest = 0.0 if a.is_single_token else rng.standard_normal()
        slopes = []
        for e in (eps, -eps):
            text = a.text * np.exp(e * (d[a.token_column] + d_rest))
            p = a.p * np.exp(e * d)
            p *= a.p.sum() / p.sum()
            slopes.append(reference.compare(compare, dataclasses.replace(a, p=p, text=text), b, options, frozen))
        got = (gradient[0][i] * d).sum() + gradient[1][i] * d_rest
        np.testing.assert_allclose(got, (slopes[0] - slopes[1]) / (2 * eps), rtol=1e-6, atol=1e-8)


def single(side):
    """In single precision."""
    kinds = {"f": jnp.float32, "i": jnp.int32, "b": bool}
    return jax.tree.map(lambda x: jnp.asarray(x, kinds[x.dtype.kind]), side)


def one_side(logits, seed=0):
    """One tokenizer: everything is matched, nothing is routed."""
    groups = logits.shape[0]
    rng = np.random.default_rng(seed)
    inner = jnp.asarray(np.where(np.arange(groups) % 2, 0.0, -rng.random(groups)), jnp.float32)
    place = jnp.asarray(rng.integers(0, logits.shape[1], groups))
    logp = jax.nn.log_softmax(logits)
    alone = jnp.zeros(logits.shape[1], int)
    return GroupDistribution(logp, jnp.zeros(groups), place, inner, inner == 0, jnp.zeros(0, int), alone)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("compare", COMPARES)
def test_a_comparison_with_itself_is_zero_when_everything_is_matched(compare, beta):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, V)), jnp.float32)
    target, options = one_side(logits), CompareOptions(V, beta, rest=False)

    def loss(logits):
        # The same operations on both sides: an L1 distance has no gradient at zero, but either sign next to it.
        return COMPARES[compare](one_side(logits), target, options)[0].sum()

    value, grad = jax.value_and_grad(loss)(logits)
    assert abs(value) < 1e-6 and jnp.abs(grad).max() < 1e-6


@pytest.mark.parametrize("masked, rest, scaled", [(False, True, False), (True, True, True), (True, False, False)])
def test_both_sides_of_projected_and_events_sum_to_one_whatever_the_groups(masked, rest, scaled):
    options = CompareOptions(K, rest=rest, masked=masked)
    for seed in range(20):
        for side, _ in sides(np.random.default_rng(seed), masked=masked, scaled=scaled):
            side = single(side)
            for apart in (True, False):
                p = text_events(side, jnp.full(side.token_column.shape, apart), options)
                np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
            np.testing.assert_allclose(prefix_events(side, options).sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("compare", PROJECTING)
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_probabilities_that_underflow_leave_loss_and_gradient_finite(compare, beta):
    (s, _), (t, _) = sides(np.random.default_rng(0))
    extreme = jnp.asarray(np.random.default_rng(1).standard_normal((40, V)) * 200, jnp.float32)
    s, t = single(s), single(t)

    def loss(logits, rest):
        return COMPARES[compare](
            s._replace(logp=jax.nn.log_softmax(logits), suffix_logp=rest), t, CompareOptions(K, beta)
        )[0].sum()

    value, grads = jax.value_and_grad(loss, (0, 1))(extreme, s.suffix_logp * 1e3)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in grads)


def test_top_k_tails_leave_out_no_more_than_the_bound_they_report():
    rng = np.random.default_rng(0)
    logits = [jnp.asarray(rng.standard_normal((3, n)) * 2, jnp.float32) for n in (200, 300)]
    p, q = map(one_side, logits)
    for name in ("sorted", "hybrid"):
        exact, _ = COMPARES[name](p, q, CompareOptions(50, 0.5, 1.0, 1.0))
        cut, parts = COMPARES[name](p, q, CompareOptions(50, 0.5, 1.0, 1.0, top_k=20))
        assert (jnp.abs(exact - cut) <= parts["tail_bound"] + 1e-6).all()


def test_every_comparison_has_a_flag_value_and_a_reference():
    assert set(COMPARES) == set(COMPARISONS)
